"""The scheduler beside other servers' policies in virtual time: tables and plots of docs/scheduling.md.

`python -m benchmarks.scheduling` writes docs/plots/*.svg and prints the tables; `--quick` is for CI. Each
baseline has, at each load, the best of a grid of settings: better than a user who does not know the load
could choose. The figures are means over other chance than the one that the settings were chosen with: the
best of many noisy figures is above its own mean.

`python -m benchmarks.scheduling resnet50-v100 --deadline-ms 200 --policy cobatch --policy triton:delay_ms=5`
compares policies with the settings given, on a profile of `cobatch simulate --list` or of `cobatch profile`.
With `--seeds 30` each of them meets the same 30 draws of arrivals and run times: means, and the ratio of its
goodput to the first policy's, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.scheduling.policies import COBATCH, Policy, parse_policy
from cobatch.batcher.simulator.bound import capacity
from cobatch.batcher.simulator.engine import Profile, ProfileError, load_profile
from cobatch.batcher.simulator.scenario import Closed, Results, Scenario, results_of
from cobatch.batcher.simulator.traffic import Bursty, Caller, Poisson
from cobatch.server.cli.plots import Line, chart, draw_lines
from cobatch.server.cli.simulate import OptionError, make_scenarios, parse_numbers

LOADS = (0.5, 0.8, 0.95, 1.2, 2.0)
_OTHER_SEEDS = (2, 3, 4)
_PLOTS = Path(__file__).parents[2] / "docs" / "plots"
_BOUND = "bound"
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Case:
    """One plot."""

    name: str
    profile: str
    deadline_ms: float
    arrivals: type[Poisson | Bursty] = Poisson


CASES = (
    Case("bert-large-a100", "bert-large-a100", 100.0),
    Case("bert-large-a100-bursty", "bert-large-a100", 100.0, Bursty),
    Case("resnet50-v100", "resnet50-v100", 200.0),
    Case("resnet50-t4", "resnet50-t4", 100.0),
)


class Simulation(NamedTuple):
    """One policy at one load."""

    load: float | None
    policy: Policy
    scenario: Scenario

    def run(self) -> Results:
        """Run it."""
        return results_of(self.policy.run(self.scenario))


class Best(NamedTuple):
    """A policy's best simulation at a load, and its results: the one that it was chosen for, or others."""

    simulation: Simulation
    results: list[Results]


def main(arguments: list[str] | None = None) -> int:
    """Return 0; 2 if an option is refused."""
    options = _parse(arguments)
    with ProcessPoolExecutor(options.processes) as pool:
        if options.profile is None:
            _write_json(options.json, _all_cases(pool, options.quick, options.requests or 60_000))
            return 0
        try:
            simulations = list(_comparison(options))
        except (OptionError, ProfileError) as error:
            print(f"benchmarks.scheduling: {error}", file=sys.stderr)
            return 2
        results = list(pool.map(Simulation.run, simulations))
    _print_comparison(simulations, results, options.seeds)
    _write_json(
        options.json,
        [
            {"policy": one.policy.label, "load": one.load, **asdict(each)}
            for one, each in zip(simulations, results, strict=True)
        ],
    )
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling", description=about)
    parser.add_argument("--quick", action="store_true", help="few requests, two cases, no plots")
    parser.add_argument("--requests", type=int, help="of each simulation (default: 60000)")
    parser.add_argument("--processes", type=int, help="(default: one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    compared = parser.add_argument_group("a comparison of given policies")
    compared.add_argument("profile", nargs="?", metavar="PROFILE", help="a profile's name or file")
    compared.add_argument("--policy", action="append", metavar="NAME[:KEY=VALUE,...]", default=[])
    compared.add_argument("--deadline-ms", type=float, metavar="MS")
    compared.add_argument("--load", default="0.8", metavar="PARTS", help="of the capacity (default: 0.8)")
    compared.add_argument("--connections", type=int, metavar="N", help="in place of --load: a closed loop")
    compared.add_argument("--handover-ms", type=float, metavar="MS", default=0.0)
    compared.add_argument("--seeds", type=int, metavar="N", default=1, help="draws of chance (default: 1)")
    return parser.parse_args(arguments)


def _comparison(options: argparse.Namespace) -> Iterator[Simulation]:
    base = Scenario(
        load_profile(options.profile),
        Poisson(1.0) if options.connections is None else Closed(options.connections),
        (Caller(deadline_ms=options.deadline_ms),),
        handover_ms=options.handover_ms,
    )
    policies = [parse_policy(text) for text in options.policy or [COBATCH]]
    loads = parse_numbers("--load", options.load)
    requests = options.requests or 100_000
    for load, scenario in make_scenarios(
        base, rate=None, loads=loads, arrivals="poisson", seconds=None, requests=requests
    ):
        for policy, seed in product(policies, range(scenario.seed, scenario.seed + options.seeds)):
            yield Simulation(load, policy, replace(scenario, seed=seed))


def _print_comparison(simulations: list[Simulation], results: list[Results], seeds: int) -> None:
    print("| policy | load | goodput/s | of bound | of the first's | p50 ms | p99 ms | batch rows |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    firsts: dict[float | None, list[float]] = {}
    for at in range(0, len(simulations), seeds):
        one, each = simulations[at], results[at : at + seeds]
        load = "-" if one.load is None else f"{one.load:g}"
        goodputs = [result.total.goodput for result in each]
        first = firsts.setdefault(one.load, goodputs)
        of_bound = _interval([100 * result.total.goodput / result.bound for result in each if result.bound])
        of_first = _interval([goodput / other for goodput, other in zip(goodputs, first, strict=True)], 3)
        p50, p99 = (mean([result.total.latency_ms[name] for result in each]) for name in ("p50", "p99"))
        print(
            f"| {one.policy.label} | {load} | {mean(goodputs):,.0f} | {of_bound} % | {of_first} "
            f"| {p50:.1f} | {p99:.1f} | {mean([result.mean_batch for result in each]):.1f} |"
        )


def _interval(values: list[float], places: int = 1) -> str:
    """Return the mean, and half of its 95 % interval if there are several values."""
    if not values:
        return "-"
    text = f"{mean(values):.{places}f}"
    if len(values) > 1:
        text += f" ± {_NORMAL_95 * stdev(values) / math.sqrt(len(values)):.{places}f}"
    return text


def _write_json(file: Path | None, figures: list[dict[str, Any]]) -> None:
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n")


def _all_cases(pool: ProcessPoolExecutor, quick: bool, requests: int) -> list[dict[str, Any]]:
    """Run, print and draw the cases of docs/scheduling.md; return their figures."""
    figures = []
    for case in CASES[:3:2] if quick else CASES:
        simulations = [
            one for load in LOADS for one in _simulations(case, load, 10_000 if quick else requests)
        ]
        best = best_of(simulations, list(pool.map(Simulation.run, simulations, chunksize=4)))
        if not quick:
            best = _measured_again(pool, best)
        _print_case(case, best)
        if not quick:
            _plot(case, best)
        figures += [
            {
                "case": case.name,
                "load": load,
                "policy": label,
                "settings": one.simulation.policy.settings,
                **_figures(one),
            }
            for (label, load), one in best.items()
        ]
    return figures


def _simulations(case: Case, load: float, requests: int) -> Iterator[Simulation]:
    """Yield cobatch with its defaults, and each baseline with each of its settings."""
    profile = load_profile(case.profile)
    most, _ = capacity(profile, profile.max_rows, case.deadline_ms / 1000)
    arrivals = case.arrivals(load * most)
    seconds = requests / arrivals.rate
    if case.arrivals is Bursty:
        seconds *= 4  # bursts are few, and the figures depend on their number
    scenario = Scenario(
        profile, arrivals, (Caller(deadline_ms=case.deadline_ms),), seconds=seconds, warmup_s=2.0
    )
    for policy in _policies(profile, case.deadline_ms):
        yield Simulation(load, policy, scenario)


def _policies(profile: Profile, deadline_ms: float) -> Iterator[Policy]:
    yield Policy(COBATCH, {}, COBATCH)
    sizes = [rows for rows in (16, 32, 64, 128, 256) if rows <= profile.max_rows]
    waits_ms = (0.0, 5.0, deadline_ms / 4)
    for size, wait_ms in product(sizes, waits_ms[1:]):
        yield _baseline("fixed-window", max_batch_size=size, window_ms=wait_ms)
    for size, wait_ms in product(sizes, waits_ms):
        yield _baseline("size-or-timeout", max_batch_size=size, timeout_ms=wait_ms)
        yield _baseline("triton", max_batch_size=size, delay_ms=wait_ms)
        yield _baseline("triton", preferred=(size,), delay_ms=wait_ms)
        # The best choice of a user who knows the deadline and the run time of this size.
        left_ms = deadline_ms - profile.quantile_s(size, 0.95) * 1000
        if left_ms > 0:
            tuned = {"max_batch_size": size, "delay_ms": wait_ms, "queue_timeout_ms": left_ms}
            yield Policy("triton", tuned, "triton, queue timeout tuned")
    for part in (1, 2, 3):
        yield _baseline("clipper", objective_ms=deadline_ms / part)


def _baseline(name: str, **settings: Any) -> Policy:
    return Policy(name, settings, name)


def best_of(simulations: list[Simulation], results: list[Results]) -> dict[tuple[str, float], Best]:
    """Return the best goodput of each policy at each load; of equal ones the one with the lowest p99."""
    best: dict[tuple[str, float], Best] = {}
    for one, each in zip(simulations, results, strict=True):
        assert one.load is not None
        key = (one.policy.label, one.load)
        if key not in best or _worth(each) > _worth(best[key].results[0]):
            best[key] = Best(one, [each])
    return best


def _measured_again(
    pool: ProcessPoolExecutor, best: dict[tuple[str, float], Best]
) -> dict[tuple[str, float], Best]:
    """Return the same simulations with their results for other chance."""
    again = [
        one.simulation._replace(scenario=replace(one.simulation.scenario, seed=seed))
        for one in best.values()
        for seed in _OTHER_SEEDS
    ]
    results = iter(pool.map(Simulation.run, again, chunksize=2))
    return {key: Best(one.simulation, [next(results) for _ in _OTHER_SEEDS]) for key, one in best.items()}


def _worth(results: Results) -> tuple[float, float]:
    # Results within half a percent are equal: then latency decides.
    bound = results.bound or 1.0
    return round(200 * results.total.goodput / bound), -results.total.latency_ms["p99"]


def _figures(best: Best) -> dict[str, Any]:
    results = best.results
    return {
        "of_bound": mean([one.total.goodput / (one.bound or 1.0) for one in results]),
        "goodput": mean([one.total.goodput for one in results]),
        "bound": mean([one.bound or 0.0 for one in results]),
        "p50_ms": mean([one.total.latency_ms["p50"] for one in results]),
        "p99_ms": mean([one.total.latency_ms["p99"] for one in results]),
        "mean_batch": mean([one.mean_batch for one in results]),
    }


def _print_case(case: Case, best: dict[tuple[str, float], Best]) -> None:
    print(f"\n{case.name}: deadline {case.deadline_ms:g} ms; goodput in % of the bound (p99 in ms)\n")
    print("| policy | " + " | ".join(f"{load:g}" for load in LOADS) + " |")
    print("|---" * (len(LOADS) + 1) + "|")
    for label in dict.fromkeys(label for label, _ in best):
        cells = [_figures(best[label, load]) for load in LOADS]
        shown = [f"{100 * cell['of_bound']:.1f} ({cell['p99_ms']:.0f})" for cell in cells]
        print(f"| {label} | " + " | ".join(shown) + " |", flush=True)


def _plot(case: Case, best: dict[tuple[str, float], Best]) -> None:
    lines: dict[str, Line] = {}
    for label in dict.fromkeys(label for label, _ in best):
        lines[label] = [(load, _figures(best[label, load])["goodput"]) for load in LOADS]
    lines[_BOUND] = [(load, _figures(best[COBATCH, load])["bound"]) for load in LOADS]
    _PLOTS.mkdir(parents=True, exist_ok=True)
    title = f"{load_profile(case.profile).name}: deadline {case.deadline_ms:g} ms"
    with chart(_PLOTS / f"{case.name}.svg", title, "load, parts of capacity", "goodput per second") as axes:
        draw_lines(axes, lines, [_BOUND])


if __name__ == "__main__":
    sys.exit(main())
