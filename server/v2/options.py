"""The `parameters` of V2 requests: what may stand there and what it means."""

from __future__ import annotations

from typing import NamedTuple

from cobatch.server.http.problem import Problem
from cobatch.server.v2.messages import Parameters

_RESERVED = ("triton_", "headers")
_STATEFUL = ("sequence_id", "sequence_start", "sequence_end")
_MOST_PRIORITY = 2**32 - 1
_MOST_TIMEOUT_US = 86_400_000_000


class Wishes(NamedTuple):
    """What a request's parameters ask for: priority (1 the highest, 0 the default), timeout, usage.

    `usage`: the answer's parameters say in which company its rows rode and where its time went.
    """

    priority: int = 0
    timeout_s: float | None = None
    usage: bool = False


NO_WISHES = Wishes()


def read_parameters(parameters: Parameters) -> Wishes:
    """What a request's parameters ask for. Raises Problem.

    The protocol's `timeout` is in microseconds, 0 for none. Parameters that nobody here knows are left
    alone, but for those that would need a state that no model here keeps.
    """
    for name, value in parameters.items():
        if name.startswith(_RESERVED):
            raise Problem("bad-parameter", f"parameter {name!r} is reserved", parameter=name)
        if name in _STATEFUL and value:
            raise Problem("bad-parameter", f"{name}: the model keeps no sequences", parameter=name)
    priority = _whole(parameters, "priority", _MOST_PRIORITY)
    timeout_us = _whole(parameters, "timeout", _MOST_TIMEOUT_US)
    usage = read_flag(parameters, "usage", False)
    return Wishes(priority, timeout_us / 1e6 if timeout_us else None, usage)


def _whole(parameters: Parameters, name: str, most: int) -> int:
    value = parameters.get(name, 0)
    # Clients with one string type for parameters send digits.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise Problem(
            "bad-parameter", f"{name} must be a whole number from 0 to {most}, got {value!r}", parameter=name
        )
    return value


def read_flag(parameters: Parameters | None, name: str, default: bool) -> bool:
    """A parameter that is true or false. Raises Problem."""
    if not parameters:
        return default
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Problem("bad-parameter", f"{name} must be true or false, got {value!r}", parameter=name)
    return value
