"""Options of `cobatch bench`, parsed from the command line and checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cobatch.batcher.simulator.traffic import PROCESSES, Arrivals, Trace, TraceError, trace_of
from cobatch.server.console import option, switch

Span = tuple[float, float]  # lowest and highest value

_SECONDS = 10.0
_WARMUP_S = 1.0
_CLOSED_CONNECTIONS = 16
_OPEN_CONNECTIONS = 512
_WHOLE_TRACE_S = 1e9
_CREDENTIALS = {"token_file": ("Authorization", "Bearer "), "api_key_file": ("X-API-Key", "")}
_TENANT_KEYS = ("name", "share", "rows", "priority", "deadline_ms", "token_file", "api_key_file")
_ARRIVALS = "poisson|constant|bursty|diurnal|FILE"
_PROCESS = "Arrival process, or trace with lines of seconds[,rows[,tenant]]."
_CONNECTIONS = "Closed loop: clients (16); open loop: limit (512)."
_SEARCH = "Search for the highest rate that holds --slo-ms."
_TIME = "Measured time for each rate (10; a trace: all of it)."
_SIZES = "Sizes of variable axes; SIZE may be LOW:HIGH."

_COMPUTED: Any = None  # from the other options, unless given
_NONE: Any = ()


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


@dataclass(kw_only=True)
class Options:
    """The options, checked when made; raises UsageError. Each annotated field is a flag of the command.

    `rates` empty: closed loop, trace at its own speed, or capacity search.
    """

    url: Annotated[str, typer.Argument(metavar="URL", help="http://HOST:PORT[/v2/models/NAME]")]
    model: Annotated[str | None, option("NAME", "Model to load (default: the only one).")] = None
    model_version: Annotated[str | None, option("VERSION", "Version of the model.")] = None
    rate: Annotated[str, option("PER_S,...", "Open loop: requests per second, in turn.")] = ""
    arrivals: Annotated[str, option(_ARRIVALS, _PROCESS)] = "poisson"
    connections: Annotated[int, option("N", _CONNECTIONS, min=1)] = _COMPUTED
    find_capacity: Annotated[bool, switch("--find-capacity", _SEARCH)] = False
    slo_ms: Annotated[float | None, option("MS", "Limit of p99.")] = None
    trials: Annotated[int, option("N", "Trials that confirm a capacity.", min=1)] = 5
    seconds: Annotated[float, option("S", _TIME)] = _COMPUTED
    warmup_s: Annotated[float, option("S", "Warm-up before measuring (1; a trace: 0).", min=0)] = _COMPUTED
    processes: Annotated[int, option("N", "Generator processes.", min=1)] = 1
    binary: Annotated[bool, switch("--binary", "Binary tensors in both directions.")] = False
    rows: Annotated[int, option("N", "Rows of each request.", min=1)] = 1
    shapes: Annotated[list[str], option("INPUT=SIZE,...", _SIZES, "--shape")] = _NONE
    values: Annotated[list[str], option("INPUT=LOW:HIGH", "Range of random values (integers: 0:99).")] = _NONE
    examples: Annotated[int, option("N", "Random inputs, sent in rotation.", min=1)] = 16
    inputs: Annotated[list[str], option("INPUT=FILE.npy|.jsonl", "Inputs from files instead.", "--input")] = (
        _NONE
    )
    expect: Annotated[list[str], option("OUTPUT=FILE.npy|.jsonl|URL", "Expected answers.")] = _NONE
    rtol: Annotated[float, option("R", "Relative tolerance.", min=0)] = 1e-3
    atol: Annotated[float, option("A", "Absolute tolerance.", min=0)] = 1e-5
    token: Annotated[str, option("TOKEN", "Bearer token.", envvar="COBATCH_BENCH_TOKEN")] = ""
    token_file: Annotated[Path | None, option("FILE", "The same, from a file.")] = None
    api_key: Annotated[str, option("KEY", "For X-API-Key.", envvar="COBATCH_BENCH_API_KEY")] = ""
    header: Annotated[list[str], option("'NAME: VALUE'", "Additional header.")] = _NONE
    tenant: Annotated[list[str], option("KEY=VALUE,...", f"{', '.join(_TENANT_KEYS)}.")] = _NONE
    priority: Annotated[int, option("N", "Of each request; 1 is the highest.", min=0)] = 0
    deadline_ms: Annotated[float | None, option("MS", "Deadline of each request (V2's timeout).")] = None
    timeout_s: Annotated[float, option("S", "Longest wait for an answer.")] = 30.0
    ca_file: Annotated[Path | None, option("FILE", "CA certificates to verify the server with.")] = None
    insecure: Annotated[bool, switch("--insecure", "Do not verify the server's certificate.")] = False
    seed: Annotated[int, option("N", "Equal seeds send equal loads.", min=0)] = 1
    rates: Sequence[float] = ()
    trace: Trace | None = None
    callers: Sequence[Caller] = ()

    def __post_init__(self) -> None:
        if self.find_capacity != (self.slo_ms is not None):
            raise UsageError("--find-capacity and --slo-ms go together")
        for name in ("slo_ms", "deadline_ms", "timeout_s", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')}: must be more than 0")
        self.trace, self.rates = _trace(self.arrivals), _rates(self.rate)
        if self.arrivals != "poisson" and not self.open_loop:
            raise UsageError(
                "--arrivals: a closed loop sends when answers arrive: give --rate for an open one"
            )
        if self.connections is None:
            self.connections = _OPEN_CONNECTIONS if self.open_loop else _CLOSED_CONNECTIONS
        self.connections = max(self.connections, self.processes)  # each process needs one
        if self.seconds is None:
            self.seconds = _SECONDS if self.trace is None or self.slo_ms is not None else _WHOLE_TRACE_S
        if self.warmup_s is None:
            self.warmup_s = _WARMUP_S if self.trace is None else 0.0
        token = self.token if self.token_file is None else _read_secret(self.token_file)
        headers = _headers(self.header)
        headers |= _credential("token_file", token) | _credential("api_key_file", self.api_key)
        default = Caller("all", 1.0, self.rows, self.priority, self.deadline_ms, headers)
        self.callers = parse_callers(self.tenant, default)

    def process(self, rate: float) -> Arrivals:
        """Return the arrival process at this mean rate."""
        if self.trace is None:
            return PROCESSES[self.arrivals](rate)
        return Trace(self.trace.requests, rate / self.trace.rate)

    @property
    def open_loop(self) -> bool:
        """True if requests are sent by the clock."""
        return bool(self.rates) or self.trace is not None or self.slo_ms is not None


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


def _credential(key: str, secret: str) -> dict[str, str]:
    name, prefix = _CREDENTIALS[key]
    return {name: prefix + secret} if secret else {}


def _trace(arrivals: str) -> Trace | None:
    """Read the trace file, or return None if `arrivals` names a process."""
    try:
        return trace_of(arrivals)
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


def parse_spans(flag: str, texts: Sequence[str]) -> dict[str, list[Span]]:
    """Parse each NAME=SPAN,SPAN, where a span is LOW:HIGH or one number. Raises UsageError."""
    spans = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        parts = [part.partition(":") for part in value.split(",")]
        try:
            spans[name] = [(float(low), float(high or low)) for low, _, high in parts]
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"{flag}: expected NAME= and a number or LOW:HIGH, got {text!r}")
        if any(not low <= high for low, high in spans[name]):
            raise UsageError(f"{flag}: LOW must not be more than HIGH, got {text!r}")
    return spans


def _headers(texts: Sequence[str]) -> dict[str, str]:
    headers = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or not text.isascii() or not text.isprintable():
            raise UsageError(f"--header: expected 'NAME: VALUE', got {text!r}")
        headers[name.strip()] = value.strip()
    return headers
