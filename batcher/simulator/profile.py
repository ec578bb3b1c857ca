"""A latency profile: how long a run of so many rows takes, with how it varies.

Measured by `cobatch profile`, or one of those in the folder profiles, made from published figures. A JSON
file: `runs` has for each measured number of rows some quantiles in microseconds ("p0" the fastest, "p50",
"p95", ...). A run's time is drawn from them: between two quantiles, and between two sizes, times lie on a
line.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
