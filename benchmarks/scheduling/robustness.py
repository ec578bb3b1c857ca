"""Hundreds of random models under random load: cobatch with its defaults beside other servers' policies.

`python -m benchmarks.scheduling.robustness [--cells 300] [--requests 20000] [--baselines FILE]`. Each cell
(`benchmarks.scheduling.cells`) is simulated with cobatch, with each baseline as it comes (*untuned*), and
with the best of a grid of settings for each baseline, chosen afterwards with the model known (*tuned*). It
prints for groups of cells the ratio of goodput to the best of both, and the cells in which cobatch has less
than 97 % of the best untuned one. Those are simulated again, with more requests and other chance, because the
best of several noisy figures is above their mean: until the 95 % interval of the mean ratio does not contain
97 %, at least three and at most forty times. For the same reason the best tuned baseline is compared with
other chance than it was chosen with. The exit status is 1 if the mean ratio of a cell stays below.

Baselines take most of the time: with `--baselines FILE` their figures are kept for the next run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, product
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

from benchmarks.scheduling.cells import Cell, cell
from benchmarks.scheduling.policies import COBATCH, Policy
from cobatch.batcher.simulator.scenario import results_of

_LEAST = 0.97
_REPEATS = 2  # of the best tuned baseline
_MORE_REQUESTS = 3
# Student's t for 95 %, by the number of samples. Beyond ten the interval is looked at twice only: each look
# is one more chance to stop by chance.
_T = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 20: 2.09, 40: 2.02}


class Figures(NamedTuple):
    """A policy in a cell: answers in time per second, and the median latency."""

    goodput: float
    p50_ms: float


class Task(NamedTuple):
    """A policy to simulate in a cell."""

    number: int
    requests: int
    repeat: int
    label: str
    policy: Policy

    @property
    def key(self) -> str:
        """All of it as text."""
        settings = ",".join(f"{key}={value}" for key, value in self.policy.settings.items())
        return f"{self.number}/{self.requests}/{self.repeat}/{self.label}/{self.policy.name}:{settings}"

    def run(self) -> Figures:
        """Run it."""
        total = results_of(self.policy.run(cell(self.number, self.requests, self.repeat).scenario)).total
        return Figures(total.goodput, total.latency_ms["p50"])


class Verdict(NamedTuple):
    """A cell's goodput: cobatch's, and the best untuned and tuned baselines' with their settings.

    `best`: the best of all baselines. `of_tuned`: the ratio to it.
    """

    cell: Cell
    own: Figures
    untuned: tuple[float, str]
    tuned: tuple[float, str]
    best: Task
    of_tuned: float

    @property
    def of_untuned(self) -> float:
        """The ratio to the best untuned baseline."""
        return self.own.goodput / max(self.untuned[0], 1e-9)


def main() -> int:
    """Return 1 if a cell is below 97 % of the best untuned baseline."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling.robustness")
    parser.add_argument("--cells", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the first cell's number")
    parser.add_argument("--requests", type=int, default=20_000, help="of each simulation")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--untuned", dest="tuned", action="store_false", help="leave the tuned ones out")
    parser.add_argument("--baselines", type=Path, metavar="FILE", help="keep the baselines' figures here")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.cells)
    known: dict[str, Figures] = {}
    if options.baselines is not None and options.baselines.exists():
        known = {key: Figures(*one) for key, one in json.loads(options.baselines.read_text()).items()}
    with ProcessPoolExecutor(options.processes) as pool:
        verdicts = judge(pool, numbers, options.requests, 0, known, tuned=options.tuned)
        if options.tuned:
            verdicts = with_other_chance(pool, verdicts)
        doubtful = [one for one in verdicts if one.of_untuned < _LEAST]
        _keep(options.baselines, known)
        ratios = measured_again(pool, doubtful, options.requests * _MORE_REQUESTS)
    print_groups(verdicts)
    below = list(print_doubtful(doubtful, ratios))
    print(f"{len(below)} of {len(verdicts)} cells below {_LEAST:.0%} of the best untuned baseline: {below}")
    return 1 if below else 0


def _keep(file: Path | None, known: dict[str, Figures]) -> None:
    if file is not None:
        file.write_text(json.dumps(known))


def judge(
    pool: ProcessPoolExecutor,
    numbers: Iterable[int],
    requests: int,
    repeat: int,
    known: dict[str, Figures],
    *,
    tuned: bool,
) -> list[Verdict]:
    """Simulate all policies in these cells; add the baselines' figures to `known`."""
    cells = [cell(number, requests, repeat) for number in numbers]
    tasks = [
        Task(one.number, requests, repeat, label, policy)
        for one in cells
        for label, policy in policies(one)
        if tuned or label != "tuned"
    ]
    new = [task for task in tasks if task.key not in known]
    figures = dict(zip([task.key for task in new], pool.map(Task.run, new, chunksize=4), strict=True))
    known |= {task.key: figures[task.key] for task in new if task.label != COBATCH}
    figures |= known
    verdicts = []
    for each in cells:
        mine = [task for task in tasks if task.number == each.number]
        best = {
            label: max(
                [
                    (figures[task.key].goodput, task.key.split("/")[-1])
                    for task in mine
                    if task.label == label
                ],
                default=(0.0, ""),
            )
            for label in ("untuned", "tuned")
        }
        own, *others = mine
        rival = max(others, key=lambda task: figures[task.key].goodput)
        ratio = figures[own.key].goodput / max(figures[rival.key].goodput, 1e-9)
        verdicts.append(Verdict(each, figures[own.key], best["untuned"], best["tuned"], rival, ratio))
    return verdicts


def with_other_chance(pool: ProcessPoolExecutor, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts with the ratio to the best of all baselines measured again."""
    tasks = [
        one.best._replace(repeat=repeat, label=label, policy=policy)
        for one in verdicts
        for label, policy in ((COBATCH, Policy(COBATCH, {})), (one.best.label, one.best.policy))
        for repeat in range(1, _REPEATS + 1)
    ]
    goodput = [each.goodput for each in pool.map(Task.run, tasks, chunksize=2)]
    sums = iter([sum(goodput[n : n + _REPEATS]) for n in range(0, len(goodput), _REPEATS)])
    return [one._replace(of_tuned=next(sums) / max(next(sums), 1e-9)) for one in verdicts]


def measured_again(
    pool: ProcessPoolExecutor, doubtful: Sequence[Verdict], requests: int
) -> dict[int, list[float]]:
    """Return, for each cell, the ratios to the best untuned baseline, with other chance."""
    repeats: dict[int, list[list[float]]] = {one.cell.number: [] for one in doubtful}
    for repeat in range(1, max(_T) + 1):
        left = [number for number, each in repeats.items() if not (each and is_decided(_least(each)))]
        tasks = [
            Task(number, requests, repeat, label, policy)
            for number in left
            for label, policy in policies(cell(number, requests, repeat))
            if label != "tuned"
        ]
        goodput = iter([each.goodput for each in pool.map(Task.run, tasks)])
        each_cell = len(tasks) // max(1, len(left))
        for number in left:
            own, *others = islice(goodput, each_cell)
            repeats[number].append([own / max(other, 1e-9) for other in others])
    return {number: _least(each) for number, each in repeats.items()}


def _least(repeats: Sequence[Sequence[float]]) -> list[float]:
    """Return the ratios to the baseline whose mean ratio is least; a repeat has one for each baseline."""
    return min([list(ratios) for ratios in zip(*repeats, strict=True)], key=mean)


def is_decided(ratios: Sequence[float]) -> bool:
    """Return whether the interval of the mean ratio is on one side of 97 %."""
    return len(ratios) in _T and abs(mean(ratios) - _LEAST) > half_width(ratios)


def half_width(ratios: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of the mean of at least three ratios."""
    return _T[len(ratios)] * stdev(ratios) / sqrt(len(ratios))


def policies(one: Cell) -> Iterator[tuple[str, Policy]]:
    """Yield cobatch, and the baselines as they come and with settings for this cell."""
    yield COBATCH, Policy(COBATCH, {})
    yield "untuned", Policy("triton", {})
    yield "untuned", Policy("size-or-timeout", {"timeout_ms": 10.0})
    yield "untuned", Policy("clipper", {"objective_ms": one.deadline_ms or 100.0})
    most, full_ms = one.scenario.batch_rows, one.full_ms
    for size, runs in product(sorted({most, max(1, most // 4)}), (0.0, 0.5, 3.0)):
        waits = {"max_batch_size": size, "delay_ms": runs * full_ms}
        yield "tuned", Policy("triton", waits)
        if one.deadline_ms is not None:
            left_ms = one.deadline_ms - one.scenario.profile.quantile_s(size, 0.95) * 1000
            if left_ms > 0:
                yield "tuned", Policy("triton", {**waits, "queue_timeout_ms": left_ms})


def print_groups(verdicts: Sequence[Verdict]) -> None:
    """Print for groups of cells the least, the tenth percentile and the median of the ratios."""
    print("| cells | count | of the best untuned: least | 10 % | median | of the best: 10 % | median |")
    print("|---|" + "---:|" * 6)
    groups: dict[str, list[Verdict]] = {}
    for one in verdicts:
        for group in ("all", *_groups_of(one.cell)):
            groups.setdefault(group, []).append(one)
    for group, ones in groups.items():
        untuned, tuned = (sorted(getattr(one, f"of_{kind}") for one in ones) for kind in ("untuned", "tuned"))
        cells = [untuned[0], untuned[len(ones) // 10], median(untuned), tuned[len(ones) // 10], median(tuned)]
        print(f"| {group} | {len(ones)} | " + " | ".join(f"{figure:.1%}" for figure in cells) + " |")


def _groups_of(one: Cell) -> Iterator[str]:
    kind = one.tail.split()[0]
    yield one.curve
    yield f"tail: {kind if kind.isalpha() or '-' in kind else 'bimodal' if ' x ' in one.tail else 'stalling'}"
    yield "no deadline" if one.deadline_ms is None else "deadline"
    yield "closed" if one.traffic.startswith("closed") else f"load {one.load:g}"
    yield f"drift: {one.drift.rstrip('0123456789.x% ')}"


def print_doubtful(doubtful: Sequence[Verdict], again: dict[int, list[float]]) -> Iterator[int]:
    """Print the cells that were measured again; yield the numbers of those that stay below."""
    for one in doubtful:
        ratios = again[one.cell.number]
        shown = (
            f"{one.of_untuned:.1%}; {len(ratios)} times again {mean(ratios):.1%} +- {half_width(ratios):.1%}"
        )
        tuned = f"; tuned {one.of_tuned:.1%} of {one.tuned[1]}" if one.tuned[1] else ""
        print(f"{one.cell.name}\n    {shown} of {one.untuned[1]}{tuned}")
        if mean(ratios) < _LEAST:
            yield one.cell.number


if __name__ == "__main__":
    sys.exit(main())
