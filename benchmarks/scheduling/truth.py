"""The accuracy of the simulator: a real server and `cobatch simulate` with the same arrivals.

`python -m benchmarks.scheduling.truth [--model wide] [--seconds 10] [--rounds 3]` measures the model's
profile as `cobatch profile` does; then, for each load, it sends a server on this machine requests with
deadlines at random times (Poisson) and plays the same times in the simulator. It compares goodput (answers
within the deadline, counted from the time they were due) and the p99 of the answers. The CPU time of HTTP in
server and generator is measured too, since they share a core (the simulator's `--request-us`). The profile is
measured in each round, because the machine's speed drifts. Loads are parts of the profile's capacity under
the deadline.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.open_loop import Load, drive, poisson
from benchmarks.common.processes import Server, cobatch
from cobatch.batcher.simulator.bound import capacity
from cobatch.batcher.simulator.engine import Profile
from cobatch.batcher.simulator.measure import measure
from cobatch.batcher.simulator.scenario import Scenario, results_of, run
from cobatch.batcher.simulator.traffic import Caller, Recorded, Trace
from cobatch.engines.loader import load_engine

LOADS = (0.5, 0.8, 1.2, 2.0)
_BODIES = 32
_MAX_BATCH_SIZE = 64
_PROFILE_S = 4.0
# From the loop to the engine's thread, and back: two wake-ups and the work of the loop.
_HANDOVER_MS = 0.1
# To measure the cost of HTTP on both sides.
_TRIED_LOADS = (0.1, 0.5)
_TRIED_S = 3.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of a run: answers in time per second, and the p99 latency in ms."""

    goodput: float
    p99_ms: float


def main() -> None:
    """Measure, simulate, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling.truth")
    parser.add_argument("--model", default="wide", choices=["wide", "deep", "magika"])
    parser.add_argument("--deadline-ms", type=float, default=150.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pairs_by_load: dict[float, list[tuple[Measurement, Measurement]]] = {load: [] for load in LOADS}
    for number in range(options.rounds):
        profile = profile_of(options.model)
        most, _ = capacity(profile, profile.max_rows, options.deadline_ms / 1000)
        us = request_us(options, most)
        print(f"round {number + 1}: capacity {most:,.0f}/s, a request {us:.0f} us of HTTP", flush=True)
        for load in LOADS:
            times_s = arrivals(load * most, options.seconds, seed=number)
            pair = real(options, times_s), simulated(options, profile, us, times_s)
            pairs_by_load[load].append(pair)
            print(f"  load {load:g}: real {shown(pair[0])}, simulated {shown(pair[1])}", flush=True)
    print("| load | goodput/s, real | simulated | ratio | p99 ms, real | simulated | ratio |")
    print("|---:" * 7 + "|")
    for load, pairs in pairs_by_load.items():
        print(f"| {load:g} | " + " | ".join(column(pairs, "goodput") + column(pairs, "p99_ms")) + " |")
    if options.json is not None:
        rows = [{"load": load, "rounds": [[asdict(one) for one in pair] for pair in pairs]}
                for load, pairs in pairs_by_load.items()]  # fmt: skip
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def shown(measurement: Measurement) -> str:
    return f"{measurement.goodput:,.0f}/s p99 {measurement.p99_ms:.1f} ms"


def column(pairs: Sequence[tuple[Measurement, Measurement]], name: str) -> list[str]:
    """Return the medians of both, and the median of the rounds' ratios."""
    real_, simulated_ = ([getattr(pair[which], name) for pair in pairs] for which in (0, 1))
    ratio = median(s / r for r, s in zip(real_, simulated_, strict=True))
    return [f"{median(real_):,.1f}", f"{median(simulated_):,.1f}", f"{ratio:.2f}"]


def profile_of(model: str) -> Profile:
    """Measure a profile as `cobatch profile` does."""
    engine = load_engine("auto", str(model_path(model)), _MAX_BATCH_SIZE)
    engine.open()
    try:
        return measure(engine, model, _PROFILE_S)
    finally:
        engine.close()


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return times of a Poisson process, the first at 0 s."""
    times_s = poisson(rate, seconds, [seed, 7])
    return [time_s - times_s[0] for time_s in times_s]


def real(options: argparse.Namespace, times_s: Sequence[float]) -> Measurement:
    """Send the requests to a server with default settings."""
    with cobatch(model_path(options.model), options.model, True) as server:
        bodies = [request(options, server, seed) for seed in range(_BODIES)]
        (counts,) = drive(server.address, Load(bodies, times_s), deadline_s=options.deadline_ms / 1000)
    return Measurement(counts.good / times_s[-1], counts.latency.quantile_us(0.99) / 1000)


def request(options: argparse.Namespace, server: Server, seed: int) -> bytes:
    """Return a request of one row with its deadline as bytes."""
    message = wire.encode(options.model, wire.rows_of(options.model, 1, seed), binary=True)
    timed = wire.with_deadline(message, options.deadline_ms)
    return wire.raw_request(timed, server.address, f"/v2/models/{options.model}/infer")


def request_us(options: argparse.Namespace, most: float) -> float:
    """Return the CPU time of a request in the server's event loop and the generator, in microseconds.

    They share the core that the engine leaves. The difference between two loads counts.
    """
    figures = []
    for load in _TRIED_LOADS:
        times_s = arrivals(load * most, _TRIED_S, seed=0)
        with cobatch(model_path(options.model), options.model, True) as server:
            bodies = [request(options, server, seed) for seed in range(_BODIES)]
            before_us = _loop_us(server.pid) + _own_us()
            drive(server.address, Load(bodies, times_s))
            figures.append((len(times_s), _loop_us(server.pid) + _own_us() - before_us))
    (few, few_us), (many, many_us) = figures
    return (many_us - few_us) / (many - few)


def _loop_us(pid: int) -> float:
    """Return the CPU time of the first thread, which runs the event loop."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e3


def _own_us() -> float:
    """Return the CPU time of this process and of its finished children, the generators."""
    who = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in who) * 1e6


def simulated(
    options: argparse.Namespace, profile: Profile, us: float, times_s: Sequence[float]
) -> Measurement:
    """Simulate the same arrivals."""
    scenario = Scenario(
        profile,
        Trace([Recorded(time_s, 1, "") for time_s in times_s]),
        (Caller(deadline_ms=options.deadline_ms),),
        seconds=times_s[-1] + 10,
        warmup_s=0.0,
        max_batch_size=_MAX_BATCH_SIZE,
        handover_ms=_HANDOVER_MS,
        request_us=us,
    )
    results = results_of(run(scenario))
    good = results.total.goodput * scenario.seconds
    return Measurement(good / times_s[-1], results.total.latency_ms["p99"])


if __name__ == "__main__":
    main()
