"""Options of `cobatch bench`, parsed from the command line and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from cobatch.batcher.simulator.traffic import PROCESSES, Arrivals, Trace, TraceError, read_trace

Span = tuple[float, float]  # lowest and highest value

_SECONDS = 10.0
_WARMUP_S = 1.0
_CLOSED_CONNECTIONS = 16
_OPEN_CONNECTIONS = 512
_WHOLE_TRACE_S = 1e9
_CREDENTIALS = {"token_file": ("Authorization", "Bearer "), "api_key_file": ("X-API-Key", "")}
_TENANT_KEYS = ("name", "share", "rows", "priority", "deadline_ms", "token_file", "api_key_file")


class BenchError(Exception):
    """The load test cannot run; the text is one line for the terminal."""


class UsageError(BenchError):
    """The options are invalid."""


class Caller(msgspec.Struct, frozen=True):
    """A class of requests. `share`: its weight among all callers; `headers`: its credentials and others."""

    name: str = "all"
    share: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    rows: Annotated[int, msgspec.Meta(ge=1)] = 1
    priority: Annotated[int, msgspec.Meta(ge=0)] = 0
    deadline_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    headers: dict[str, str] = {}

    @property
    def parameters(self) -> dict[str, int]:
        """The `parameters` object of each V2 request; unset ones are left out."""
        parameters = {"priority": self.priority} if self.priority else {}
        if self.deadline_ms is not None:
            parameters["timeout"] = max(1, round(self.deadline_ms * 1000))
        return parameters


@dataclass(frozen=True)
class Options:
    """Checked options. `rates` empty: closed loop, trace at its own speed, or capacity search."""

    url: str
    model: str | None
    version: str | None
    rates: Sequence[float]
    arrivals: str
    connections: int
    processes: int
    seconds: float
    warmup_s: float
    timeout_s: float
    seed: int
    binary: bool
    callers: Sequence[Caller]
    examples: int
    shapes: Sequence[str]
    values: Sequence[str]
    inputs: Sequence[str]
    expect: Sequence[str]
    rtol: float
    atol: float
    ca_file: str | None
    insecure: bool
    trace: Trace | None
    slo_ms: float | None  # set: search for the capacity
    trials: int

    def process(self, rate: float) -> Arrivals:
        """Return the arrival process at this mean rate."""
        if self.trace is None:
            return PROCESSES[self.arrivals](rate)
        return Trace(self.trace.requests, rate / self.trace.rate)

    @property
    def open_loop(self) -> bool:
        """True if requests are sent by the clock."""
        return bool(self.rates) or self.trace is not None or self.slo_ms is not None


def read_options(given: Mapping[str, Any]) -> Options:
    """Check the command's parameters, by name. Raises UsageError."""
    slo_ms, arrivals = given["slo_ms"], given["arrivals"]
    if given["find_capacity"] != (slo_ms is not None):
        raise UsageError("--find-capacity and --slo-ms go together")
    for name in ("slo_ms", "deadline_ms", "timeout_s", "seconds"):
        if given[name] is not None and not given[name] > 0:
            raise UsageError(f"--{name.replace('_', '-')}: must be more than 0")
    trace, rates = _trace(arrivals), _rates(given["rate"])
    open_loop = bool(rates) or trace is not None or slo_ms is not None
    if arrivals != "poisson" and not open_loop:
        raise UsageError("--arrivals: a closed loop sends when answers arrive: give --rate for an open loop")
    connections = given["connections"] or (_OPEN_CONNECTIONS if open_loop else _CLOSED_CONNECTIONS)
    seconds, warmup_s = given["seconds"], given["warmup_s"]
    if seconds is None:
        seconds = _SECONDS if trace is None or slo_ms is not None else _WHOLE_TRACE_S
    if warmup_s is None:
        warmup_s = _WARMUP_S if trace is None else 0.0
    unchanged = {name: given[name] for name in Options.__dataclass_fields__ if name in given}
    parsed = {
        "version": given["model_version"],
        "rates": rates,
        "connections": max(connections, given["processes"]),  # each process needs one
        "seconds": seconds,
        "warmup_s": warmup_s,
        "callers": parse_callers(given["tenant"] or [], _default_caller(given)),
        "shapes": given["shape"] or [],
        "values": given["values"] or [],
        "inputs": given["input_"] or [],
        "expect": given["expect"] or [],
        "ca_file": None if given["ca_file"] is None else str(given["ca_file"]),
        "trace": trace,
    }
    return Options(**(unchanged | parsed))


def _default_caller(given: Mapping[str, Any]) -> Caller:
    token = given["token"] if given["token_file"] is None else _read_secret(given["token_file"])
    headers = _headers(given["header"] or [])
    headers |= _credential("token_file", token) | _credential("api_key_file", given["api_key"])
    return Caller(
        rows=given["rows"], priority=given["priority"], deadline_ms=given["deadline_ms"], headers=headers
    )


def parse_callers(texts: Sequence[str], default: Caller) -> list[Caller]:
    """Parse each `name=a,share=2,...`; unset keys come from `default`. Raises UsageError."""
    callers = [_caller(text, default, number) for number, text in enumerate(texts)] or [default]
    if len({caller.name for caller in callers}) < len(callers):
        raise UsageError("--tenant: two have the same name")
    return callers


def _caller(text: str, default: Caller, number: int) -> Caller:
    given: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key.strip() not in _TENANT_KEYS:
            raise UsageError(
                f"--tenant: expected KEY=VALUE with a key of {', '.join(_TENANT_KEYS)}, got {part!r}"
            )
        given[key.strip()] = value.strip()
    headers = dict(default.headers)
    for key in _CREDENTIALS:
        if key in given:
            # A tenant's credential replaces the default one: a request must have only one.
            for name, _ in _CREDENTIALS.values():
                headers.pop(name, None)
            headers |= _credential(key, _read_secret(given.pop(key)))
    fields = msgspec.structs.asdict(default) | {"name": f"tenant {number + 1}", **given, "headers": headers}
    try:
        caller = msgspec.convert(fields, Caller, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"--tenant {text}: {error}") from None
    if not all(math.isfinite(value or 0) for value in (caller.share, caller.deadline_ms)):
        raise UsageError(f"--tenant {text}: share and deadline_ms must be finite")
    return caller


def _read_secret(path: str | Path) -> str:
    """Read the only line of a file. Raises UsageError."""
    try:
        secret = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    if not secret or not secret.isascii() or not secret.isprintable():
        raise UsageError(f"{path}: expected one line of ASCII text")
    return secret


def _credential(key: str, secret: str | None) -> dict[str, str]:
    name, prefix = _CREDENTIALS[key]
    return {name: prefix + secret} if secret else {}


def _trace(arrivals: str) -> Trace | None:
    """Read the trace file, or return None if `arrivals` names a process."""
    if arrivals in PROCESSES:
        return None
    if not Path(arrivals).exists():
        raise UsageError(f"--arrivals: expected {', '.join(PROCESSES)} or a trace file, got {arrivals!r}")
    try:
        return read_trace(Path(arrivals))
    except TraceError as error:
        raise UsageError(str(error)) from None


def _rates(text: str | None) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"--rate: expected numbers separated by commas, got {text!r}") from None
    if any(not 0 < rate < 1e7 for rate in rates):
        raise UsageError("--rate: must be more than 0 and less than 1e7")
    return rates


def parse_sizes(texts: Sequence[str]) -> dict[str, list[Span]]:
    """Parse each NAME=SIZE,SIZE, where a size may be a span LOW:HIGH. Raises UsageError."""
    sizes = {}
    for text in texts:
        name, value = _named("--shape", text)
        sizes[name] = [_span("--shape", part) for part in value.split(",")]
        if any(not (1 <= low <= high and low == int(low)) for low, high in sizes[name]):
            raise UsageError(f"--shape: sizes are whole numbers from 1, got {text!r}")
    return sizes


def parse_spans(texts: Sequence[str]) -> dict[str, Span]:
    """Parse each NAME=LOW:HIGH. Raises UsageError."""
    spans = {}
    for text in texts:
        name, value = _named("--values", text)
        low, high = spans[name] = _span("--values", value)
        if not low <= high:
            raise UsageError(f"--values: LOW must not be more than HIGH, got {text!r}")
    return spans


def _headers(texts: Sequence[str]) -> dict[str, str]:
    headers = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or not text.isascii() or not text.isprintable():
            raise UsageError(f"--header: expected 'NAME: VALUE', got {text!r}")
        headers[name.strip()] = value.strip()
    return headers


def _named(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.rpartition("=")
    if not equals:
        raise UsageError(f"{flag}: expected NAME=..., got {text!r}")
    return name, value


def _span(flag: str, text: str) -> Span:
    low, _, high = text.partition(":")
    try:
        return float(low), float(high or low)
    except ValueError:
        raise UsageError(f"{flag}: expected a number or LOW:HIGH, got {text!r}") from None
