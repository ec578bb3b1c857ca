"""One process and several on machines with more cores than this one, by simulation.

`python -m benchmarks.scaling.processes [--rows-per-s N] [--check]`. Event loops, cores, the engine and
closed-loop clients are simulated; their CPU time was measured (`benchmarks.scaling.process_costs`). Sizes of
datagrams and batches come out of it, and so does what limits the rate. `--check`: two cores with `wrk` on it,
beside the same cases of `benchmarks.processes`. docs/scaling.md has the assumptions.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median

import msgspec
from msgspec import structs

from benchmarks import processes
from benchmarks.scaling.process_costs import FILE, LOADS
from benchmarks.scaling.process_model import Costs, Result, simulate

_CORES = (2, 4, 8, 16, 32, 64)
_MOST_PROCESSES = 16  # of `auto`
# Of each front, or of the only process.
_CONNECTIONS = 64
_REQUESTS = 20_000
_CHECKED = ("tiny-json-64", "tiny-json-256", "tiny-binary-256", "row-json-64")
_TURNS, _TURN_S = 3, 2


def node(costs: Costs, cores: int, rows_per_s: float, requests: int = _REQUESTS) -> tuple[Result, Result]:
    """Return a machine with one process, and with as many as `auto` starts there."""
    number = min(cores - 1, _MOST_PROCESSES) if cores > 2 else cores
    connections = _CONNECTIONS * (number - 1)
    row_us = 1e6 / rows_per_s
    one = simulate(costs, cores, 1, connections, row_us, requests)
    return one, simulate(costs, cores, number, connections, row_us, requests)


def check(costs: dict[str, Costs]) -> None:
    """Compare ratios to one process on two cores, simulated and measured in this run."""
    titles = ("requests/s", "measured", "CPU", "measured", "home us", "measured")
    print(f"{'case':20}{'processes':>10}" + "".join(f"{title:>12}" for title in titles))
    for name in _CHECKED:
        case = processes.CASES[name]
        measured = processes.measure(case, (1, 2, 3), _TURNS, _TURN_S)
        one = on_two_cores(costs[case.load], 1, case.connections)
        for number in (2, 3):
            several = on_two_cores(costs[case.load], number, case.connections)
            pairs = list(zip(measured[number], measured[1], strict=True))
            ratios = (
                several.per_s / one.per_s,
                median([turn.per_s / alone.per_s for turn, alone in pairs]),
                several.all_us / one.all_us,
                median([turn.all_us / alone.all_us for turn, alone in pairs]),
                several.home_us,
                median([turn.home_us for turn in measured[number]]),
            )
            print(f"{name:20}{number:>10}" + "".join(f"{ratio:>12.2f}" for ratio in ratios), flush=True)


def on_two_cores(costs: Costs, number: int, connections: int, requests: int = _REQUESTS) -> Result:
    """Simulate processes and `wrk` on two cores."""
    return simulate(costs, 2, number, connections, 0.0, requests, wrk=True)


def main(arguments: list[str] | None = None) -> int:
    """Print the simulations."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling.processes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows-per-s", type=float, default=1e6, help="of the engine in full batches")
    parser.add_argument("--check", action="store_true", help="two cores, beside measured figures")
    options = parser.parse_args(arguments)
    costs = msgspec.json.decode(FILE.read_bytes(), type=dict[str, Costs])
    if options.check:
        check(costs)
        return 0
    titles = ("cores", "processes", "requests/s", "x one", "limit", "home us", "requests/s", "x one", "limit")
    print(f"{'':12}{'':24}{'home as on two shared cores':>48}{'on a core of its own':>36}")
    print(f"{'load':12}" + "".join(f"{title:>12}" for title in titles))
    for load in LOADS:
        for cores in _CORES:
            one, several = node(costs[load], cores, options.rows_per_s)
            _, best = node(structs.replace(costs[load], home_apart=0.0), cores, options.rows_per_s)
            number = sum(name.startswith("front") for name in several.busy) + 1
            print(
                f"{load:12}{cores:>12}{number:>12}{several.per_s:>12,.0f}{several.per_s / one.per_s:>12.1f}"
                f"{several.limit:>12}{several.home_us:>12.1f}"
                f"{best.per_s:>12,.0f}{best.per_s / one.per_s:>12.1f}{best.limit:>12}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
