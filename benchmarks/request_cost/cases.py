"""The cases: the figure measured, its reference, and the targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from benchmarks.common.turns import Turn


class Figure(StrEnum):
    """The ratio of a case. The value is its description."""

    CPU = "CPU per request / floor's"
    LATENCY = "median latency / floor's"
    SINGLE = "median latency / (offline row + floor's)"
    RATE = "rows per second / best offline"


@dataclass(frozen=True, slots=True)
class Case:
    """A line of the table. `target` and `aim` bound the ratio, from below for RATE, from above otherwise."""

    key: str
    group: str
    model: str
    binary: bool
    connections: int
    figure: Figure
    target: float
    aim: float | None = None
    fast_path: bool = True
    at_least_s: int = 1

    @property
    def title(self) -> str:
        """The name in the table, such as "tiny, JSON, 64 connections"."""
        many = f"{self.connections} connection{'s' if self.connections > 1 else ''}"
        way = "" if self.fast_path else ", through ASGI"
        return f"{self.model}, {'binary' if self.binary else 'JSON'}, {many}{way}"

    def within(self, ratio: float, bound: float) -> bool:
        """Return True if the ratio is within the bound."""
        return ratio >= bound if self.figure is Figure.RATE else ratio <= bound


CASES = (
    Case("tiny-json-64", "tiny", "tiny", False, 64, Figure.CPU, 0.80, aim=0.65),
    Case("tiny-binary-64", "tiny", "tiny", True, 64, Figure.CPU, 0.80, aim=0.65),
    Case("tiny-json-1", "tiny", "tiny", False, 1, Figure.LATENCY, 1.8),
    Case("tiny-json-64-asgi", "asgi", "tiny", False, 64, Figure.CPU, 1.7, fast_path=False),
    Case("wide-binary-256", "wide", "wide", True, 256, Figure.RATE, 0.93),
    Case("wide-json-256", "wide", "wide", False, 256, Figure.RATE, 0.93),
    Case("wide-binary-1", "wide", "wide", True, 1, Figure.SINGLE, 1.15),
    Case("wide-json-1", "wide", "wide", False, 1, Figure.SINGLE, 1.15),
    # A batch of 64 takes most of a second here: a turn must last for several.
    Case("magika-binary-64", "magika", "magika", True, 64, Figure.RATE, 0.92, at_least_s=6),
    Case("magika-json-64", "magika", "magika", False, 64, Figure.RATE, 0.92, at_least_s=6),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


@dataclass(frozen=True, slots=True)
class Round:
    """A turn of cobatch, and the references, each the mean of a turn before it and one after it."""

    cobatch: Turn
    floor: Turn | None
    offline: Turn | None


@dataclass(slots=True)
class Result:
    """The rounds of a case."""

    case: Case
    rounds: list[Round] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """The ratio of each round."""
        return [self.value(each) / self.reference(each) for each in self.rounds]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return median(self.ratios)

    @property
    def met(self) -> bool:
        """True if the target is met."""
        return self.case.within(self.ratio, self.case.target)

    @property
    def aim_met(self) -> bool:
        """True if there is an aim beyond the target and it is met."""
        return self.case.aim is not None and self.case.within(self.ratio, self.case.aim)

    def value(self, each: Round) -> float:
        """Return cobatch's figure: microseconds, or rows per second."""
        return _figure(self.case.figure, each.cobatch)

    def reference(self, each: Round) -> float:
        """Return the figure that it is divided by, in the same unit."""
        figure = self.case.figure
        total = 0.0
        if each.floor is not None:
            total += _figure(figure, each.floor)
        if each.offline is not None:
            total += _figure(figure, each.offline)
        return total


def _figure(figure: Figure, turn: Turn) -> float:
    if figure is Figure.CPU:
        return turn.cpu_us
    return turn.per_s if figure is Figure.RATE else turn.p50_us
