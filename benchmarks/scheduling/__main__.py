"""The scheduler beside others in virtual time: the table and the plots of docs/scheduling.md.

`python -m benchmarks.scheduling` writes docs/plots/*.svg and prints the tables; `--quick` is for CI. Each
baseline is given, at each load by itself, the best of a grid of settings: better than anybody could set it
who does not know the load beforehand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from cobatch.batcher.simulator.engine import Profile, load_profile
from cobatch.batcher.simulator.scenario import COBATCH, Results, Scenario, capacity, results_of, run
from cobatch.batcher.simulator.svg import Line, chart
from cobatch.batcher.simulator.traffic import Arrivals, Bursty, Caller, Poisson

LOADS = (0.5, 0.8, 0.95, 1.2, 2.0)
_PLOTS = Path(__file__).parents[2] / "docs" / "plots"
_BOUND = "bound"


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


class Turn(NamedTuple):
    """One simulation."""

    case: Case
    load: float
    label: str
    scenario: Scenario


class Best(NamedTuple):
    """A policy's best at a load, with the settings for it."""

    results: Results
    settings: dict[str, Any]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few requests, two cases, no plots")
    parser.add_argument("--requests", type=int, default=60_000)
    parser.add_argument("--processes", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    requests = 10_000 if arguments.quick else arguments.requests
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        for case in CASES[:3:2] if arguments.quick else CASES:
            turns = [turn for load in LOADS for turn in turns_of(case, load, requests)]
            best = best_of(turns, list(pool.map(_run, turns, chunksize=4)))
            _print(case, best)
            if not arguments.quick:
                _PLOTS.mkdir(parents=True, exist_ok=True)
                (_PLOTS / f"{case.name}.svg").write_text(_plot(case, best))
            found += [
                {"case": case.name, "load": load, "policy": label, "settings": one.settings, **_json(one)}
                for (label, load), one in best.items()
            ]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def turns_of(case: Case, load: float, requests: int) -> Iterator[Turn]:
    """cobatch as it comes, and each baseline with each of its settings."""
    profile = load_profile(case.profile)
    most, _ = capacity(profile, profile.max_rows, case.deadline_ms / 1000)
    arrivals: Arrivals = case.arrivals(load * most)
    seconds = requests / arrivals.rate
    if case.arrivals is Bursty:
        seconds *= 4  # bursts are few, and their number is what the figures depend on
    for label, policy, settings in _policies(profile, case.deadline_ms):
        yield Turn(
            case,
            load,
            label,
            Scenario(
                profile,
                arrivals,
                (Caller(deadline_ms=case.deadline_ms),),
                policy=policy,
                settings=settings,
                seconds=seconds,
                warmup_s=2.0,
            ),
        )


def _policies(profile: Profile, deadline_ms: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield COBATCH, COBATCH, {}
    most = profile.max_rows
    sizes = [rows for rows in (16, 32, 64, 128, 256) if rows <= most]
    waits = (0.0, 5.0, deadline_ms / 4)
    for size, wait in product(sizes, waits[1:]):
        yield "fixed-window", "fixed-window", {"max_batch_size": size, "window_ms": wait}
    for size, wait in product(sizes, waits):
        settings = {"max_batch_size": size, "timeout_ms": wait}
        yield "size-or-timeout", "size-or-timeout", settings
        yield "triton", "triton", {"max_batch_size": size, "delay_ms": wait}
        yield "triton", "triton", {"preferred": (size,), "delay_ms": wait}
        # What somebody can do who knows the deadline and how long a run of this size takes.
        left_ms = deadline_ms - profile.quantile_s(size, 0.95) * 1000
        if left_ms > 0:
            tuned = {"max_batch_size": size, "delay_ms": wait, "queue_timeout_ms": left_ms}
            yield "triton, queue timeout tuned", "triton", tuned
    for part in (1, 2, 3):
        yield "clipper", "clipper", {"objective_ms": deadline_ms / part}


def _run(turn: Turn) -> Results:
    return results_of(run(turn.scenario))


def best_of(turns: list[Turn], results: list[Results]) -> dict[tuple[str, float], Best]:
    """The best goodput of each policy at each load; of equal ones the one with the lowest p99."""
    best: dict[tuple[str, float], Best] = {}
    for turn, result in zip(turns, results, strict=True):
        key = (turn.label, turn.load)
        if key not in best or _worth(result) > _worth(best[key].results):
            best[key] = Best(result, turn.scenario.settings)
    return best


def _worth(results: Results) -> tuple[float, float]:
    # Within half a percent they are equal: then latency decides.
    bound = results.bound or 1.0
    return round(200 * results.total.goodput / bound), -results.total.latency_ms["p99"]


def _json(best: Best) -> dict[str, Any]:
    results = best.results
    return {
        "of_bound": results.total.goodput / (results.bound or 1.0),
        "goodput": results.total.goodput,
        "bound": results.bound,
        "p50_ms": results.total.latency_ms["p50"],
        "p99_ms": results.total.latency_ms["p99"],
        "mean_batch": results.mean_batch,
    }


def _print(case: Case, best: dict[tuple[str, float], Best]) -> None:
    labels = list(dict.fromkeys(label for label, _ in best))
    print(f"\n{case.name}: deadline {case.deadline_ms:g} ms; goodput in % of the bound (p99 in ms)\n")
    print("| policy | " + " | ".join(f"{load:g}" for load in LOADS) + " |")
    print("|---" * (len(LOADS) + 1) + "|")
    for label in labels:
        cells = [_json(best[label, load]) for load in LOADS]
        shown = [f"{100 * cell['of_bound']:.1f} ({cell['p99_ms']:.0f})" for cell in cells]
        print(f"| {label} | " + " | ".join(shown) + " |", flush=True)


def _plot(case: Case, best: dict[tuple[str, float], Best]) -> str:
    lines: dict[str, Line] = {}
    for label in dict.fromkeys(label for label, _ in best):
        lines[label] = [(load, best[label, load].results.total.goodput) for load in LOADS]
    lines[_BOUND] = [(load, best[COBATCH, load].results.bound or 0.0) for load in LOADS]
    profile = load_profile(case.profile)
    title = f"{profile.name}: deadline {case.deadline_ms:g} ms"
    return chart(title, "load, parts of capacity", "goodput per second", lines, [_BOUND])


if __name__ == "__main__":
    main()
