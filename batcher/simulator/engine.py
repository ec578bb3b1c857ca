"""A latency profile: how long a run of so many rows takes, with how it varies.

Measured by `cobatch profile`, or one of those in the folder profiles, made from published figures. A JSON
file: `runs` has for each measured number of rows some quantiles in microseconds ("p0" the fastest, "p50",
"p95", ...). A run's time is drawn from them: between two quantiles, and between two sizes, times lie on a
line.

The engine's stand-in: takes as long as its profile says, in virtual time, and computes nothing.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.engines.base import Array, RowShapes, Signature
from cobatch.engines.jobs import Deliver, Job, Outcome

_INCLUDED = Path(__file__).with_name("profiles")


class ProfileError(Exception):
    """A profile cannot be read; the text says why."""


class Profile:
    """`runs` maps rows to quantiles (0 to 1) to microseconds; every size has the same quantiles.

    `approximate` says in words in how far this is not a measurement, "" where it is one.
    """

    def __init__(
        self,
        name: str,
        runs: Mapping[int, Mapping[float, float]],
        *,
        source: str = "",
        approximate: str = "",
    ) -> None:
        self.name = name
        self.source = source
        self.approximate = approximate
        self.runs = {rows: dict(sorted(quantiles.items())) for rows, quantiles in sorted(runs.items())}
        if not self.runs or 0 in self.runs or len({tuple(q) for q in self.runs.values()}) != 1:
            raise ProfileError("a profile needs sizes of at least one row, with the same quantiles each")
        self.sizes = list(self.runs)
        self.max_rows = self.sizes[-1]
        levels = list(next(iter(self.runs.values())))
        # Beyond the outermost quantiles nothing is known: nothing is faster or slower than they.
        self._levels = [0.0, *levels, 1.0]
        self._times: dict[int, list[float]] = {}
        self._means: dict[int, float] = {}

    @classmethod
    def linear(cls, name: str, fixed_us: float, row_us: float, max_rows: int) -> Profile:
        """A run costs `fixed_us`, and each row `row_us` more; without noise."""
        return cls(name, {rows: {0.5: fixed_us + row_us * rows} for rows in {1, max_rows}})

    def draw_s(self, rows: int, number: float) -> float:
        """The seconds of a run, for a number drawn evenly from 0 to 1."""
        times = self._times.get(rows)
        if times is None:
            times = self._times[rows] = self._at(rows)
        levels = self._levels
        if len(levels) == 3:
            return times[1]
        index = min(bisect_right(levels, number), len(levels) - 1)
        low, high = levels[index - 1], levels[index]
        part = (number - low) / (high - low) if high > low else 0.0
        return times[index - 1] + part * (times[index] - times[index - 1])

    def quantile_s(self, rows: int, level: float) -> float:
        """The time that this part of the runs does not exceed."""
        return self.draw_s(rows, level)

    def mean_s(self, rows: int) -> float:
        """The mean of what `draw_s` draws."""
        mean = self._means.get(rows)
        if mean is None:
            times, levels = self._at(rows), self._levels
            parts = zip(levels, levels[1:], times, times[1:], strict=False)
            mean = self._means[rows] = sum((b - a) * (x + y) / 2 for a, b, x, y in parts)
        return mean

    def _at(self, rows: int) -> list[float]:
        """Seconds at each of `_levels`."""
        sizes = self.sizes
        index = bisect_right(sizes, rows)
        if index == 0 or sizes[index - 1] == rows or len(sizes) == 1:
            times = list(self.runs[sizes[max(0, index - 1)]].values())
        else:
            left, right = sizes[min(index, len(sizes) - 1) - 1], sizes[min(index, len(sizes) - 1)]
            part = (rows - left) / (right - left)
            pairs = zip(self.runs[left].values(), self.runs[right].values(), strict=True)
            times = [low + part * (high - low) for low, high in pairs]
        seconds = [us / 1e6 for us in times]
        return [seconds[0], *seconds, seconds[-1]]

    def as_json(self) -> dict[str, Any]:
        """What the file holds."""
        runs = [
            {"rows": rows, "us": {f"p{level * 100:g}": round(us, 3) for level, us in quantiles.items()}}
            for rows, quantiles in self.runs.items()
        ]
        return {"name": self.name, "source": self.source, "approximate": self.approximate, "runs": runs}


def included() -> list[str]:
    """The names of the profiles that come with cobatch."""
    return sorted(path.stem for path in _INCLUDED.glob("*.json"))


def load_profile(name_or_file: str) -> Profile:
    """An included profile by its name, or one from a file. Raises ProfileError."""
    path = _INCLUDED / f"{name_or_file}.json"
    if name_or_file not in included():
        path = Path(name_or_file)
    try:
        return _read(json.loads(path.read_text()))
    except OSError as error:
        names = ", ".join(included())
        raise ProfileError(f"{name_or_file}: {error.strerror}, and no included profile ({names})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProfileError(f"{name_or_file} is not a latency profile: {error!r}") from None


def _read(document: Any) -> Profile:
    runs = {
        int(run["rows"]): {float(name[1:]) / 100: float(us) for name, us in run["us"].items()}
        for run in document["runs"]
    }
    return Profile(
        str(document["name"]),
        runs,
        source=str(document.get("source", "")),
        approximate=str(document.get("approximate", "")),
    )


_CHUNK = 4096


class Clockwork:
    """How long runs take. All policies of a comparison draw the same numbers in the same order."""

    def __init__(self, profile: Profile, seed: int) -> None:
        self._profile = profile
        self._numbers = self._drawn(np.random.default_rng([seed, 2]))
        self._busy_s = 0.0
        self._ends_s = 0.0

    @staticmethod
    def _drawn(rng: np.random.Generator) -> Iterator[float]:
        while True:
            yield from rng.random(_CHUNK).tolist()

    def run_s(self, rows: int, began_s: float) -> float:
        """Of the next run, which begins now, or has while the loop did something else."""
        run_s = self._profile.draw_s(rows, next(self._numbers))
        self._busy_s += run_s
        self._ends_s = began_s + run_s
        return run_s

    def busy_until(self, now_s: float) -> float:
        """How long runs have taken so far, all together."""
        return self._busy_s - max(0.0, self._ends_s - now_s)


class SimulatedEngine:
    """What the batcher asks of an engine: how large batches may be, and how many it holds."""

    platform = "simulated"
    signature = Signature(inputs=(), outputs=(), fixed_batch=None)

    def __init__(self, max_batch_size: int, slots: int) -> None:
        self.max_batch_size = max_batch_size
        self.slots = slots

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:  # noqa: ARG002
        """No inputs: nothing to pack."""
        return ()

    def open(self) -> None:
        """Nothing to open."""

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """The worker keeps the time."""

    def wait(self, slot: int) -> tuple[Array, ...]:  # noqa: ARG002
        """The same."""
        return ()

    def close(self) -> None:
        """Nothing to close."""


class SimulatedWorker:
    """Runs one batch after another, as `engines.worker.Worker` does.

    `handover_s`: how long a batch is on its way from the loop to the engine, and its outcome back.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        max_batch_size: int,
        slots: int,
        loop: VirtualLoop,
        clockwork: Clockwork,
        handover_s: float = 0.0,
    ) -> None:
        self.engine = SimulatedEngine(max_batch_size, slots)
        self.deliver: Deliver | None = None
        self.warmup_us = warmup_us(profile, max_batch_size)
        self._loop = loop
        self._clockwork = clockwork
        self._handover_s = handover_s
        self._waiting: deque[Job] = deque()
        self._busy = False

    def submit(self, job: Job) -> None:
        """Run this job after those submitted before."""
        at_s = self._loop.now_s
        if self._handover_s:
            at_s += self._handover_s
            self._loop.call_at(at_s, self._arrive, job, at_s)
        else:
            self._arrive(job, at_s)

    # The engine does not wait for the loop: what happens here happens at its own time, however late the loop
    # comes to call it.

    def _arrive(self, job: Job, at_s: float) -> None:
        self._waiting.append(job)
        if not self._busy:
            self._start(at_s)

    def _start(self, at_s: float) -> None:
        self._busy = True
        job = self._waiting.popleft()
        end_s = at_s + self._clockwork.run_s(job.rows, at_s)
        self._loop.call_at(end_s, self._end, job, at_s, end_s)

    def _end(self, job: Job, started_s: float, ended_s: float) -> None:
        outcome = Outcome((), None, started_s, ended_s)
        if self._waiting:
            self._start(ended_s)
        else:
            self._busy = False
        deliver: Callable[[Job, Outcome], None] | None = self.deliver
        assert deliver is not None
        if self._handover_s:
            self._loop.call_at(ended_s + self._handover_s, deliver, job, outcome)
        else:
            deliver(job, outcome)


def warmup_us(profile: Profile, max_batch_size: int) -> dict[int, float]:
    """What the warm-up would have found: the best time of each power of two, and of the largest."""
    sizes = {1 << n for n in range(max_batch_size.bit_length()) if 1 << n <= max_batch_size}
    return {rows: profile.quantile_s(rows, 0.0) * 1e6 for rows in sorted({*sizes, max_batch_size})}
