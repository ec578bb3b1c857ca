"""The goals of the comparison: each with its worst case and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.peers.catalogue import OTHERS, OURS
from benchmarks.peers.results import Results, ratio
from benchmarks.peers.turns import Turn

_SLOWER = ("triton", "mlserver", "litserve", "bentoml", "ray")
_ALL = tuple(peer.name for peer in OTHERS)
_TITLES = {peer.name: peer.title for peer in OTHERS}
_ANY, _MANY = 1, 16


@dataclass(frozen=True, slots=True)
class Goal:
    """The factor by which cobatch has to be better, and the one found in the worst case (None: not measured).

    `missing` are the servers without a figure.
    """

    text: str
    at_least: float
    found: float | None
    where: str
    missing: tuple[str, ...] = ()

    @property
    def met(self) -> bool | None:
        """True or False; None if figures are missing."""
        if self.found is not None and self.found < self.at_least:
            return False
        return None if self.found is None or self.missing else True


def goals(results: Results) -> list[Goal]:
    """Return all goals."""
    turns = results.turns
    return [
        _goal(turns, "CPU per request, tiny", 5.0, _SLOWER, "tiny", _cpu),
        _goal(turns, "CPU beside mosec, tiny (1.5 is the aim)", 1.3, ("mosec",), "tiny", _cpu),
        _goal(turns, "requests/s, tiny, 16 connections and more", 1.0, _ALL, "tiny", _rate, _MANY),
        _goal(turns, "requests/s, wide, 16 connections and more", 1.0, _ALL, "wide", _rate, _MANY),
        _goal(turns, "median latency unloaded (tiny, 1 connection)", 5.0, _ALL, "tiny", _p50, most=1),
        _goal(turns, "requests/s, magika, 16 connections and more", 1.0, _ALL, "magika", _rate, _MANY),
        _goal(turns, "median latency, magika, 16 connections and more", 10.0, _ALL, "magika", _p50, _MANY),
        _goodput(results),
    ]


def _cpu(turn: Turn) -> float:
    return turn.cpu_us


def _p50(turn: Turn) -> float:
    return turn.p50_us


def _rate(turn: Turn) -> float:
    """Return the time per request, so that less is better as for the others."""
    return 1 / turn.per_s if turn.per_s else 0.0


def _goal(
    turns: Sequence[Turn],
    text: str,
    at_least: float,
    peers: tuple[str, ...],
    model: str,
    value: Callable[[Turn], float],
    least: int = _ANY,
    most: int = 1 << 30,
) -> Goal:
    """Find the case with the lowest median of the rounds' ratios."""
    cases = dict.fromkeys(
        (turn.peer, turn.kind, turn.connections)
        for turn in turns
        if turn.peer in peers and turn.model == model and least <= turn.connections <= most
    )
    factors: list[tuple[float, str]] = []
    seen = set()
    for peer, kind, connections in cases:
        factor = ratio(turns, peer, value, model=model, kind=kind, connections=connections)
        if factor is not None:
            seen.add(peer)
            factors.append((factor[0], f"{_TITLES[peer]}, {kind}, {connections} conn."))
    worst, where = min(factors, default=(None, ""))
    return Goal(text, at_least, worst, where, tuple(peer for peer in peers if peer not in seen))


def _goodput(results: Results) -> Goal:
    shares = [one.share for one in results.overload if one.peer == OURS.name]
    return Goal("goodput in overload / capacity", 0.9, median(shares) if shares else None, "cobatch")
