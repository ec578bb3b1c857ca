"""What `cobatch bench` was asked for, read from the words of the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cobatch.batcher.simulator.traffic import (
    Arrivals,
    Bursty,
    Diurnal,
    Even,
    Poisson,
    Trace,
    TraceError,
    read_trace,
)
from cobatch.server.loadtest.callers import Caller, api_key, bearer, callers, secret
from cobatch.server.loadtest.errors import UsageError
from cobatch.server.loadtest.examples import Span

_PROCESSES: dict[str, Callable[[float], Arrivals]] = {
    "poisson": Poisson,
    "constant": Even,
    "bursty": Bursty,
    "diurnal": Diurnal,
}
_SECONDS = 10.0
_WARMUP_S = 1.0
_CLOSED_CONNECTIONS = 16
_OPEN_CONNECTIONS = 512
_ALL_OF_IT_S = 1e9


@dataclass(frozen=True)
class Asked:
    """The options. `rates` empty: a closed loop, a trace at its own speed, or a search from anywhere."""

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
        """Arrivals at this mean rate."""
        if self.trace is None:
            return _PROCESSES[self.arrivals](rate)
        return Trace(self.trace.requests, rate / self.trace.rate)

    @property
    def open_loop(self) -> bool:
        """Whether requests leave by the clock."""
        return bool(self.rates) or self.trace is not None or self.slo_ms is not None


def read(options: Mapping[str, Any]) -> Asked:
    """From the command's options, under their own names. Raises UsageError."""
    slo_ms = options["slo_ms"]
    if options["find_capacity"] != (slo_ms is not None):
        raise UsageError("--find-capacity and --slo-ms go together")
    for name in ("slo_ms", "deadline_ms", "timeout_s", "seconds"):
        if options[name] is not None and not options[name] > 0:
            raise UsageError(f"--{name.replace('_', '-')}: must be more than 0")
    recorded, at_rates = trace(options["arrivals"]), rates(options["rate"])
    open_loop = bool(at_rates) or recorded is not None or slo_ms is not None
    if options["arrivals"] != "poisson" and not open_loop:
        raise UsageError("--arrivals: in a closed loop requests leave when answers come: give --rate")
    connections = options["connections"] or (_OPEN_CONNECTIONS if open_loop else _CLOSED_CONNECTIONS)
    seconds, warmup_s = options["seconds"], options["warmup_s"]
    if seconds is None:
        seconds = _SECONDS if recorded is None or slo_ms is not None else _ALL_OF_IT_S
    if warmup_s is None:
        warmup_s = _WARMUP_S if recorded is None else 0.0
    as_they_are = (
        "url", "model", "arrivals", "processes", "timeout_s", "seed", "binary", "examples", "rtol", "atol",
        "insecure", "slo_ms", "trials",
    )  # fmt: skip
    return Asked(
        **{name: options[name] for name in as_they_are},
        version=options["model_version"],
        rates=at_rates,
        # Each process needs one.
        connections=max(connections, options["processes"]),
        seconds=seconds,
        warmup_s=warmup_s,
        callers=callers(options["tenant"] or [], _caller(options)),
        shapes=options["shape"] or [],
        values=options["values"] or [],
        inputs=options["input_"] or [],
        expect=options["expect"] or [],
        ca_file=None if options["ca_file"] is None else str(options["ca_file"]),
        trace=recorded,
    )


def _caller(options: Mapping[str, Any]) -> Caller:
    """What holds for tenants that do not say otherwise."""
    token, key = options["token"], options["api_key"]
    if options["token_file"] is not None:
        token = secret(options["token_file"])
    more = headers(options["header"] or [])
    return Caller(
        rows=options["rows"],
        priority=options["priority"],
        deadline_ms=options["deadline_ms"],
        headers=more | (bearer(token) if token else {}) | (api_key(key) if key else {}),
    )


def trace(arrivals: str) -> Trace | None:
    """The recording, where the word names no process. Raises UsageError."""
    if arrivals in _PROCESSES:
        return None
    if not Path(arrivals).exists():
        raise UsageError(f"--arrivals: expected {', '.join(_PROCESSES)} or a trace's file, got {arrivals!r}")
    try:
        return read_trace(Path(arrivals))
    except TraceError as error:
        raise UsageError(str(error)) from None


def rates(text: str | None) -> list[float]:
    """Numbers with commas between them."""
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"--rate: expected numbers with commas between them, got {text!r}") from None
    if any(not 0 < rate < 1e7 for rate in found):
        raise UsageError("--rate: must be more than 0")
    return found


def sizes(texts: Sequence[str]) -> dict[str, list[Span]]:
    """Each NAME=SIZE,SIZE, where a size may be a span LOW:HIGH."""
    found = {}
    for text in texts:
        name, value = _named("--shape", text)
        found[name] = [_span("--shape", part) for part in value.split(",")]
        if any(not (1 <= low <= high and low == int(low)) for low, high in found[name]):
            raise UsageError(f"--shape: sizes are whole numbers from 1, got {text!r}")
    return found


def spans(texts: Sequence[str]) -> dict[str, Span]:
    """Each NAME=LOW:HIGH."""
    found = {}
    for text in texts:
        name, value = _named("--values", text)
        found[name] = _span("--values", value)
        if not found[name][0] <= found[name][1]:
            raise UsageError(f"--values: LOW must not be more than HIGH, got {text!r}")
    return found


def headers(texts: Sequence[str]) -> dict[str, str]:
    """Each NAME: VALUE."""
    found = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or not text.isascii() or not text.isprintable():
            raise UsageError(f"--header: expected 'NAME: VALUE', got {text!r}")
        found[name.strip()] = value.strip()
    return found


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
