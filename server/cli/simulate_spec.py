"""What `cobatch simulate` was asked for, as scenarios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from cobatch.batcher.simulator.engine import Profile
from cobatch.batcher.simulator.nodes import ROUTERS, Router
from cobatch.batcher.simulator.scenario import POLICIES, Closed, Scenario, capacity, settings_of
from cobatch.batcher.simulator.traffic import (
    Arrivals,
    Bursty,
    Caller,
    Diurnal,
    Even,
    Poisson,
    Trace,
    read_trace,
)

_PROCESSES: dict[str, Callable[[float], Arrivals]] = {
    "poisson": Poisson,
    "even": Even,
    "bursty": Bursty,
    "diurnal": Diurnal,
}
_WARMUP_PART = 0.1

Policy = tuple[str, str, dict[str, Any]]  # what it was called, its name, its settings


class SpecError(Exception):
    """Something that was asked for cannot be; the text is one line for a person."""


@dataclass
class Asked:
    """The command's options. `more`: what a scenario takes as it is."""

    profile: Profile
    rate: float | None
    loads: list[float]
    arrivals: str
    connections: int | None
    callers: tuple[Caller, ...]
    policies: list[Policy]
    seconds: float | None
    requests: int
    more: dict[str, Any]


def scenarios(asked: Asked) -> list[tuple[str, float | None, Scenario]]:
    """Each with its policy's name as it was given and its load, None where it has none."""
    arrivals: list[tuple[float | None, Arrivals | Closed]]
    if asked.connections is not None:
        arrivals = [(None, Closed(asked.connections))]
    elif asked.arrivals not in _PROCESSES:
        arrivals = [(None, _trace(asked.arrivals))]
    else:
        make = _PROCESSES[asked.arrivals]
        most = _capacity(asked)
        rates = [asked.rate] if asked.rate is not None else [load * most for load in asked.loads]
        if min(rates) <= 0:
            raise SpecError("the rate must be more than 0")
        arrivals = [(rate / most, make(rate)) for rate in rates]
    found = []
    for load, process in arrivals:
        seconds = asked.seconds or _seconds(asked, process)
        for called, policy, settings in asked.policies:
            scenario = Scenario(
                asked.profile,
                process,
                asked.callers,
                policy=policy,
                settings=dict(settings),
                seconds=seconds,
                warmup_s=_WARMUP_PART * seconds,
                **asked.more,
            )
            found.append((called, load, scenario))
    return found


def _capacity(asked: Asked) -> float:
    """Requests per second of all nodes at the most."""
    deadlines = [caller.deadline_ms for caller in asked.callers if caller.deadline_ms is not None]
    deadline_s = min(deadlines) / 1000 if len(deadlines) == len(asked.callers) else None
    rows = asked.more["max_batch_size"] or asked.profile.max_rows
    per_node, _ = capacity(asked.profile, rows, deadline_s)
    if not per_node:
        raise SpecError("no run is as short as the deadline")
    shares = sum(caller.share for caller in asked.callers)
    mean_rows = sum(caller.share * caller.rows for caller in asked.callers) / shares
    return float(asked.more["nodes"] * per_node / mean_rows)


def _seconds(asked: Asked, process: Arrivals | Closed) -> float:
    if isinstance(process, Trace):
        return max(process.requests[-1].time_s, 1e-3) / (1 + _WARMUP_PART)
    rate = _capacity(asked) if isinstance(process, Closed) else process.rate
    return asked.requests / rate / (1 + _WARMUP_PART)


def _trace(name: str) -> Trace:
    path = Path(name)
    if not path.exists():
        raise SpecError(f"--arrivals: expected {', '.join(_PROCESSES)} or a trace's file, got {name!r}")
    return read_trace(path)


def numbers(flag: str, text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SpecError(f"{flag}: expected numbers with commas between them, got {text!r}") from None


def router(text: str) -> Router:
    """A router by its name."""
    for known in ROUTERS:
        if text == known:
            return known
    raise SpecError(f"--router: expected one of {', '.join(ROUTERS)}, got {text!r}")


def callers(texts: list[str], deadline_ms: float | None) -> tuple[Caller, ...]:
    """One of each `name=a,share=2`; `deadline_ms` for those that say none."""
    if not texts:
        return (Caller(deadline_ms=deadline_ms),)
    known = {field.name: get_type_hints(Caller)[field.name] for field in fields(Caller)}
    found = []
    for text in texts:
        values = {key: _value("--tenant", key, value, known) for key, value in _pairs("--tenant", text)}
        found.append(Caller(**{"deadline_ms": deadline_ms, **values}))
    return tuple(found)


def policies(texts: list[str]) -> list[Policy]:
    """Each `name` or `name:key=value,key=value`."""
    found: list[Policy] = []
    for text in texts:
        name, _, settings = text.partition(":")
        if name not in POLICIES:
            raise SpecError(f"--policy: expected one of {', '.join(POLICIES)}, got {name!r}")
        known, needed = settings_of(name)
        given = {key: _value("--policy", key, value, known) for key, value in _pairs("--policy", settings)}
        missing = [key for key in needed if key not in given]
        if missing:
            raise SpecError(f"--policy: {name} needs {', '.join(missing)}: {name}:{missing[0]}=...")
        found.append((text, name, given))
    return found


def _pairs(flag: str, text: str) -> list[tuple[str, str]]:
    pairs = []
    for part in text.split(",") if text else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise SpecError(f"{flag}: expected key=value, got {part!r}")
        pairs.append((key.strip(), value.strip()))
    return pairs


def _value(flag: str, key: str, text: str, known: dict[str, Any]) -> Any:
    """One setting's value, as its annotation has it."""
    if key not in known:
        raise SpecError(f"{flag}: there is no {key!r}; there is {', '.join(known)}")
    kind = str(known[key])
    try:
        if "tuple" in kind:
            return tuple(int(part) for part in text.split("/"))
        if "bool" in kind:
            return {"true": True, "false": False}[text]
        if "str" in kind:
            return text
        return float(text) if "float" in kind else int(text)
    except (ValueError, KeyError):
        raise SpecError(f"{flag}: {text!r} is no value for {key}") from None
