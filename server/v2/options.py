"""The `parameters` of V2 requests: the accepted ones and their meaning."""

from typing import NamedTuple

from cobatch.server.http.problem import Problem
from cobatch.server.v2.messages import Parameters

_RESERVED = ("triton_", "headers")
_STATEFUL = ("sequence_id", "sequence_start", "sequence_end")
# Triton's clients have it as UINT64, the protocol's parameters as INT64.
_PRIORITIES = range(-(2**63), 2**64)
_TIMEOUTS_US = range(86_400_000_001)


class RequestOptions(NamedTuple):
    """Priority (1 the highest, 0 and below the default), timeout in seconds, usage.

    With `usage` the response's parameters say how large its batch was and where its time went.
    """

    priority: int = 0
    timeout_s: float | None = None
    usage: bool = False


DEFAULT_OPTIONS = RequestOptions()


def read_options(parameters: Parameters) -> RequestOptions:
    """The options among a request's parameters. Raises Problem.

    The protocol's `timeout` is in microseconds, 0 for none. Unknown parameters are ignored, except those
    that would need a model with state: no model here has any.
    """
    for name, value in parameters.items():
        if name.startswith(_RESERVED):
            raise Problem("bad-parameter", f"parameter {name!r} is reserved", parameter=name)
        if name in _STATEFUL and value:
            raise Problem("bad-parameter", f"{name}: the model keeps no sequences", parameter=name)
    priority = _whole(parameters, "priority", _PRIORITIES)
    timeout_us = _whole(parameters, "timeout", _TIMEOUTS_US)
    usage = read_flag(parameters, "usage", False)
    return RequestOptions(priority, timeout_us / 1e6 if timeout_us else None, usage)


def _whole(parameters: Parameters, name: str, allowed: range) -> int:
    value = parameters.get(name, 0)
    # Clients with one string type for parameters send digits.
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and len(value) < 21:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        detail = f"{name} must be a whole number from {allowed[0]} to {allowed[-1]}, got {value!r}"
        raise Problem("bad-parameter", detail, parameter=name)
    return value


def read_flag(parameters: Parameters | None, name: str, default: bool) -> bool:
    """A parameter that is true or false. Raises Problem."""
    value = parameters.get(name, default) if parameters else default
    if not isinstance(value, bool):
        raise Problem("bad-parameter", f"{name} must be true or false, got {value!r}", parameter=name)
    return value
