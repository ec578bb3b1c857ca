"""The figures to reach: what is measured, against what, and how far it may be from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

from benchmarks.common.turns import Turn


class Figure(StrEnum):
    """What a case compares. The value is the words for its ratio."""

    CPU = "CPU per request / floor's"
    LATENCY = "median latency / floor's"
    SINGLE = "median latency / (offline row + floor's)"
    RATE = "rows per second / best offline"


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. `target` and `aim` bound the ratio: from below for a RATE, else from above."""

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
        """For people: "tiny, JSON, 64 connections"."""
        many = f"{self.connections} connection{'s' if self.connections > 1 else ''}"
        way = "" if self.fast_path else ", through ASGI"
        return f"{self.model}, {'binary' if self.binary else 'JSON'}, {many}{way}"

    def within(self, ratio: float, bound: float) -> bool:
        """Whether the ratio is on the good side of the bound."""
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
    # A batch of 64 takes most of a second here, so a turn must be long enough to see several.
    Case("magika-binary-64", "magika", "magika", True, 64, Figure.RATE, 0.92, at_least_s=6),
    Case("magika-json-64", "magika", "magika", False, 64, Figure.RATE, 0.92, at_least_s=6),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


@dataclass(frozen=True, slots=True)
class Round:
    """cobatch's turn and, each the mean of a turn before it and one after, what it is compared with."""

    cobatch: Turn
    floor: Turn | None
    offline: Turn | None


@dataclass(slots=True)
class Result:
    """The rounds of a case, and the ratio in each."""

    case: Case
    rounds: list[Round] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """One per round, in order."""
        return [self.value(each) / self.reference(each) for each in self.rounds]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return median(self.ratios)

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.case.within(self.ratio, self.case.target)

    @property
    def aim_met(self) -> bool:
        """Whether there is an aim beyond the target, and it is met."""
        return self.case.aim is not None and self.case.within(self.ratio, self.case.aim)

    def value(self, each: Round) -> float:
        """cobatch's figure: microseconds, or rows per second."""
        return _figure(self.case.figure, each.cobatch)

    def reference(self, each: Round) -> float:
        """What it is divided by, in the same unit."""
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
