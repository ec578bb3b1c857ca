"""Data that crosses the pipe between the main process and a generator process."""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cobatch.batcher.simulator.traffic import Arrivals
from cobatch.server.loadtest.options import Caller

Arrays = Mapping[str, np.ndarray[Any, Any]]

# A sample of a request: the monotonic times in seconds when it was due, taken up, sent and answered, then
# the number of its error kind (0: success), the index of its caller, and the rows of its batch by
# Server-Timing (0: unknown).
COLUMNS = ("due", "taken", "sent", "done", "kind", "caller", "batch")


@dataclass(frozen=True)
class Address:
    """A server's address. `base`: path prefix before `/v2`."""

    host: str
    port: int
    tls: bool = False
    base: str = ""
    ca_file: Path | None = None
    insecure: bool = False

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def context(self) -> ssl.SSLContext | None:
        """Return the TLS context, None for plain HTTP. Raises OSError, ssl.SSLError."""
        if not self.tls:
            return None
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request's bytes. `example`: index of its inputs, and so of its expected answer."""

    data: bytes
    caller: int
    example: int


@dataclass(frozen=True)
class Expected:
    """Expected outputs by name for each example, with tolerances."""

    answers: Sequence[Arrays]
    rtol: float = 1e-3
    atol: float = 1e-5


@dataclass(frozen=True)
class Plan:
    """Constants of all trials.

    `requests`: by (index of the caller, rows), sent in rotation.
    """

    address: Address
    requests: Mapping[tuple[int, int], Sequence[PreparedRequest]]
    callers: Sequence[Caller]
    expected: Expected | None = None
    timeout_s: float = 30.0
    seed: int = 1


@dataclass(frozen=True)
class Trial:
    """One load. `arrivals` None: closed loop. `connections`: limit over all processes."""

    arrivals: Arrivals | None
    connections: int
    seconds: float
    warmup_s: float = 0.0
    seed: int = 1

    @property
    def lasts_s(self) -> float:
        """Seconds from the start until the last request may be sent."""
        return self.warmup_s + self.seconds


class Ready:
    """The connections are open."""


class Start(NamedTuple):
    """Start at this time of the monotonic clock, which all processes share."""

    at_s: float


class Stop:
    """Send no more requests and wait for no answers."""


class NewKind(NamedTuple):
    """Name of an error kind that samples refer to by `number`, with the server's first message."""

    number: int
    name: str
    message: str


class Samples(NamedTuple):
    """Float64 values: a row of COLUMNS for each finished request."""

    data: bytes


class Heartbeat(NamedTuple):
    """A process's requests in flight or waiting for a connection, and its CPU share since the last one."""

    open_requests: int
    cpu_share: float


class Done(NamedTuple):
    """End of a trial: CPU and wall seconds of the measured period, largest number of open connections."""

    cpu_s: float
    took_s: float
    connections: int


class Failed(NamedTuple):
    """The trial cannot be run, with the reason."""

    reason: str
