"""What cobatch is to be ahead by, and whether it is: for each goal, the peer that comes nearest.

Ratios are formed within each round, and the median of the rounds counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from benchmarks.peers.catalogue import OURS, PEERS
from benchmarks.peers.results import Results, pick, ratio
from benchmarks.peers.turns import Turn

_MOSEC = "mosec"
_FAR = ("bentoml", "litserve", "mlserver", "ray", "triton")
_TITLES = {peer.name: peer.title for peer in PEERS}
# Two runs of the same server differ by so much.
_NOISE = 0.02

Value = Callable[[Turn], float]
_cpu: Value = attrgetter("cpu_us")
_p50: Value = attrgetter("p50_us")


def _slowness(turn: Turn) -> float:
    """The larger the better for us, as with the others."""
    return 1.0 / turn.per_s if turn.per_s else 0.0


@dataclass(frozen=True, slots=True)
class Goal:
    """`least`: how many times ours the value of each of `peers` (all where empty) is to be, in each case."""

    words: str
    least: float
    value: Value
    model: str
    connections: tuple[int, ...]
    peers: tuple[str, ...] = ()


GOALS = (
    Goal("CPU per request, tiny: 1.3 times less than mosec's", 1.3, _cpu, "tiny", (64,), (_MOSEC,)),
    Goal("CPU per request, tiny: 5 times less than the five others'", 5.0, _cpu, "tiny", (64,), _FAR),
    Goal("requests/s, tiny, 16 and more connections: more than each", 1.0, _slowness, "tiny", (16, 64, 256)),
    Goal("requests/s, wide, 16 and more connections: more than each", 1.0, _slowness, "wide", (16, 64, 256)),
    Goal("median latency, tiny, unloaded: 5 times less than each", 5.0, _p50, "tiny", (1,)),
    Goal(
        "requests/s, magika, 64 connections: no fewer than the best", 1 - _NOISE, _slowness, "magika", (64,)
    ),
    Goal("median latency, magika, unloaded: no more than each", 1 - _NOISE, _p50, "magika", (1,)),
)
_OVERLOAD_LEAST = 0.9


def goals(results: Results) -> list[list[str]]:
    """Rows of a table: the goal, who comes nearest and in which case, how many times ours, whether met.

    Goals that this run has nothing to say about are left out.
    """
    rows = [row for goal in GOALS if (row := _row(results, goal)) is not None]
    own = [one.share for one in results.overload if one.peer == OURS.name]
    if own:
        mean = sum(own) / len(own)
        words = "goodput in overload, wide: 90 % of capacity"
        rows.append([words, "", f"{mean:.0%}", _said(mean >= _OVERLOAD_LEAST)])
    return rows


def _row(results: Results, goal: Goal) -> list[str] | None:
    found = list(_cases(results.turns, goal))
    if not found:
        return None
    least, who = min(found)
    return [goal.words, who, f"{least:.2f}", _said(least >= goal.least)]


def _cases(turns: list[Turn], goal: Goal) -> Iterator[tuple[float, str]]:
    for peer in goal.peers or tuple(name for name in _TITLES if name != OURS.name):
        mine = pick(turns, model=goal.model, peer=peer)
        for kind, level in dict.fromkeys((turn.kind, turn.connections) for turn in mine):
            if level not in goal.connections:
                continue
            case = {"model": goal.model, "kind": kind, "connections": level}
            beside = ratio(turns, peer, goal.value, **case)
            if beside is not None:
                yield beside[0], f"{_TITLES[peer]}, {kind}, {level} connections"


def _said(met: bool) -> str:
    return "yes" if met else "**no**"
