"""The results of a run as one document, with their medians and ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.peers.catalogue import OURS
from benchmarks.peers.overload import Overload
from benchmarks.peers.turns import Turn


@dataclass(slots=True)
class Results:
    """All turns; `skipped` maps servers that were left out to the reason."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    overload: list[Overload] = field(default_factory=list)
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        return asdict(self)

    def peers(self) -> list[str]:
        """Return the names of the servers measured, in order."""
        return list(dict.fromkeys([turn.peer for turn in self.turns] + [one.peer for one in self.overload]))


def read(document: dict[str, Any]) -> Results:
    """Read the results from a document."""
    turns = [Turn(**turn) for turn in document["turns"]]
    overload = [Overload(**one) for one in document["overload"]]
    return Results(**{**document, "turns": turns, "overload": overload})


def pick(turns: Iterable[Turn], **wanted: object) -> list[Turn]:
    """Return the turns with these attributes."""
    return [turn for turn in turns if all(getattr(turn, name) == value for name, value in wanted.items())]


def middle(turns: Sequence[Turn], name: str) -> float:
    return median(float(getattr(turn, name)) for turn in turns)


def ratio(
    turns: Sequence[Turn], peer: str, value: Callable[[Turn], float], **wanted: object
) -> tuple[float, float, float] | None:
    """Return median, lowest and highest of the rounds' ratios of a server's value to ours."""
    theirs = {turn.round: turn for turn in pick(turns, peer=peer, **wanted)}
    ours = {turn.round: turn for turn in pick(turns, peer=OURS.name, **wanted)}
    both = [(theirs[number], ours[number]) for number in theirs.keys() & ours.keys()]
    ratios = [value(their) / value(our) for their, our in both if value(our) and value(their)]
    return (median(ratios), min(ratios), max(ratios)) if ratios else None
