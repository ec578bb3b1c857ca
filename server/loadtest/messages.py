"""What a generator's process is told, and what it tells: all of it crosses a pipe."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cobatch.batcher.simulator.traffic import Arrivals

Arrays = Mapping[str, np.ndarray[Any, Any]]

# A sample: when it was due, when it was taken up, sent and answered, on the monotonic clock; what came of it,
# as a number (0: well), whose it was, and the rows of its batch as Server-Timing says (0: not said).
COLUMNS = ("due", "taken", "sent", "done", "kind", "caller", "batch")


@dataclass(frozen=True)
class Address:
    """Where the server is. `base`: what goes before `/v2`."""

    host: str
    port: int
    tls: bool = False
    base: str = ""
    ca_file: str | None = None
    insecure: bool = False

    @property
    def authority(self) -> str:
        """As the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def context(self) -> ssl.SSLContext | None:
        """For TLS, where the address says so. Raises OSError, ssl.SSLError."""
        if not self.tls:
            return None
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as it goes over the wire. `example`: the number of its inputs, and so of its answer."""

    data: bytes
    caller: int
    example: int


@dataclass(frozen=True)
class Expected:
    """The answers that are right: outputs by name for each example, and how near is right."""

    answers: Sequence[Arrays]
    rtol: float = 1e-3
    atol: float = 1e-5


@dataclass(frozen=True)
class Plan:
    """What stays the same in all trials.

    `requests`: by caller and rows, to be sent in turn. `names` and `shares`: of the callers; `rows`: of each
    caller's requests where a trace does not say.
    """

    address: Address
    requests: Mapping[tuple[int, int], Sequence[Prepared]]
    names: Sequence[str]
    shares: Sequence[float]
    rows: Sequence[int]
    expected: Expected | None = None
    timeout_s: float = 30.0
    seed: int = 1


@dataclass(frozen=True)
class Trial:
    """One load for some seconds. `arrivals` None: a closed loop. `connections`: at most, of all processes."""

    arrivals: Arrivals | None
    connections: int
    seconds: float
    warmup_s: float = 0.0
    seed: int = 1

    @property
    def lasts_s(self) -> float:
        """From the first request that may be sent to the last."""
        return self.warmup_s + self.seconds


@dataclass(frozen=True, slots=True)
class Ready:
    """The connections are open."""


@dataclass(frozen=True, slots=True)
class Start:
    """Begin at this moment of the monotonic clock, which is one for all processes."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Send nothing more, and wait for nobody."""


@dataclass(frozen=True, slots=True)
class NewKind:
    """The name of a number that is used in `kind` from now on, and what the server said the first time."""

    number: int
    name: str
    said: str


@dataclass(frozen=True, slots=True)
class Samples:
    """Float64 values, a row of COLUMNS for each request that is over."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pulse:
    """How a process does: requests it waits for or that wait for a connection, CPU in its last period."""

    open_requests: int
    cpu_share: float


@dataclass(frozen=True, slots=True)
class Done:
    """All is over. CPU seconds and seconds of the process while it measured; most connections it had."""

    cpu_s: float
    took_s: float
    connections: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The trial cannot be run; the text says why."""

    why: str
