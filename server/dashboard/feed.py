"""The live page's feed: the data of each second (`server.dashboard.seconds`) as server-sent events.

`hello` comes first, with models, settings and the kept seconds. Then one `tick` per second, encoded once for
all viewers. A viewer that misses a tick gets another `hello`. A stream ends when the server begins to stop,
or when the viewer's credential expires.
"""

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import msgspec
import numpy as np

from cobatch import __version__
from cobatch.batcher.durations import EDGES_S, DurationHistogram
from cobatch.batcher.scheduling.policy import REASONS
from cobatch.server.auth.principal import Principal
from cobatch.server.dashboard.seconds import Counts, ModelSampler, Second, size_bins, timeline
from cobatch.server.http.problem import KINDS
from cobatch.server.inference.model import Model
from cobatch.server.inference.served import ServedPipeline
from cobatch.server.inference.service import Inference
from cobatch.server.observability.history import History
from cobatch.server.observability.observer import FrontCounts

log = logging.getLogger("cobatch.live")

INTERVAL_S = 1.0
KEPT = 300  # seconds
_BATCHES = 40  # in the timeline of a model
_NO_USAGE = (0, 0, 0, 0.0)
# Settings with secrets or with paths of secrets.
_SECRET = frozenset(("tls_cert", "tls_key", "trace_endpoint"))


class LoopFigures(Protocol):
    """The CPU seconds of an event loop, None if unknown, and its lags."""

    @property
    def cpu_s(self) -> float | None: ...
    @property
    def lags(self) -> DurationHistogram: ...


class TenantSecond(msgspec.Struct, omit_defaults=True):
    """One tenant, or all other tenants together, in one second. `engine` is in seconds."""

    weight: float | None = None
    requests: int = 0
    rows: int = 0
    engine: float = 0.0
    refused: int = 0
    queued: int = 0


class FrontSecond(msgspec.Struct, omit_defaults=True):
    """One front-end process in one second; `loop` and `lag` as in `Tick`, `connections` at its end."""

    requests: int = 0
    connections: int = 0
    loop: float | None = None
    lag: float = 0.0


class Tick(msgspec.Struct, omit_defaults=True):
    """One second. `time` is its end in seconds since the epoch, `span` its measured length in seconds.

    `loop` is the event loop's share of a core, None if unknown; `lag` is its longest lag in seconds. They are
    those of the process with the engines; `fronts` has the others, by number.
    """

    time: float
    span: float
    models: dict[str, Second]
    tenants: dict[str, TenantSecond] = {}
    loop: float | None = None
    lag: float = 0.0
    fronts: dict[int, FrontSecond] = {}


class LoopSampler:
    """Takes the differences of an event loop's figures from second to second."""

    def __init__(self) -> None:
        self._cpu_s: float | None = None
        self._lags: Counts | None = None

    def second(self, loop: LoopFigures, span_s: float) -> tuple[float | None, float]:
        """Return the loop's share of a core, None if it is unknown, and its longest lag in seconds."""
        cpu_s, before_s = loop.cpu_s, self._cpu_s
        counts = loop.lags.counts()
        new = counts if self._lags is None else counts - self._lags
        self._cpu_s, self._lags = cpu_s, counts
        share = None
        if cpu_s is not None and before_s is not None and span_s > 0:
            share = round((cpu_s - before_s) / span_s, 4)
        nonzero = np.flatnonzero(new)
        return share, float(EDGES_S[min(nonzero[-1], len(EDGES_S) - 1)]) if len(nonzero) else 0.0


class FrontSampler(LoopSampler):
    """Takes the differences of a front's counts."""

    _requests = 0

    def of_front(self, counts: FrontCounts, span_s: float) -> FrontSecond:
        """Return the front's work since the previous call."""
        share, lag = self.second(counts, span_s)
        requests, self._requests = counts.requests - self._requests, counts.requests
        return FrontSecond(requests, counts.connections, share, lag)


class Feed:
    """The feed of one process. `wall_clock` returns seconds since the epoch, `clock` monotonic seconds."""

    def __init__(
        self,
        inference: Inference,
        history: History,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._inference = inference
        self._history = history
        self._clock = clock
        self._wall_clock = wall_clock
        self._last_s = clock()
        self._started = wall_clock()
        self._models = {name: ModelSampler(target) for name, target in inference.targets.items()}
        self._tenants: dict[str, tuple[int, int, int, float]] = {}
        self._loop = LoopSampler()
        self._loop.second(inference.observer.lag, 0.0)
        self._fronts: dict[int, FrontSampler] = {}
        self._seconds: deque[bytes] = deque(maxlen=KEPT)
        self._number = 0
        self._event = b""
        self._ticked = asyncio.Event()  # one for each tick
        self.viewers = 0
        self._closed = False

    async def run(self) -> None:
        """Tick once a second until cancelled."""
        while True:
            await asyncio.sleep(max(0.0, self._last_s + INTERVAL_S - self._clock()))
            try:
                await self._inference.observer.collect()
                self.tick()
            except Exception:
                # An error here must neither stop the server nor end the feed.
                log.exception("a second of the live page is missing")
                self._last_s = self._clock()

    def close(self) -> None:
        """End all streams, because the server begins to stop."""
        self._closed = True
        self._wake()

    def tick(self) -> None:
        """Keep the data since the previous tick, and send it to all viewers."""
        now_s = self._clock()
        span_s, self._last_s = now_s - self._last_s, now_s
        loop, lag = self._loop.second(self._inference.observer.lag, span_s)
        tick = Tick(
            time=round(self._wall_clock(), 3),
            span=round(span_s, 4),
            models={name: one.second(self._inference.draining) for name, one in self._models.items()},
            tenants=self._tenant_seconds(),
            loop=loop,
            lag=lag,
            fronts=self._front_seconds(span_s),
        )
        second = msgspec.json.encode(tick)
        self._seconds.append(second)
        self._number += 1
        if self.viewers:
            self._event = _event(b"tick", second[:-1] + b"," + msgspec.json.encode(self._newest())[1:])
        self._wake()

    def _newest(self) -> dict[str, Any]:
        """Return the data that is sent of the newest second only."""
        return {
            "totals": {name: one.totals for name, one in self._models.items()},
            "timeline": {name: timeline(self._history.last(name, _BATCHES)) for name in self._models},
        }

    def _tenant_seconds(self) -> dict[str, TenantSecond]:
        seconds, known = {}, {}
        for name, total in self._inference.tenant_totals():
            now = known[name] = (total.answered, total.rows, total.refused, total.engine_s)
            before = self._tenants.get(name, _NO_USAGE)
            if now < before:
                before = _NO_USAGE  # it was among the others for a while, and its totals began again
            answered, rows, refused, engine_s = (a - b for a, b in zip(now, before, strict=True))
            seconds[name] = TenantSecond(
                weight=total.weight,
                requests=int(answered),
                rows=int(rows),
                refused=int(refused),
                engine=round(engine_s, 6),
                queued=total.queued_rows,
            )
        self._tenants = known
        return seconds

    def _front_seconds(self, span_s: float) -> dict[int, FrontSecond]:
        return {
            number: self._fronts.setdefault(number, FrontSampler()).of_front(counts, span_s)
            for number, counts in sorted(self._inference.observer.fronts.items())
        }

    def _wake(self) -> None:
        self._ticked.set()
        self._ticked = asyncio.Event()

    async def stream(self, principal: Principal | None) -> AsyncIterator[bytes]:
        """Yield the events for one viewer."""
        self.viewers += 1
        seen = -2  # no tick
        try:
            # The stream of a credential ends when it expires.
            while not self._closed and (principal is None or principal.expires_s > self._wall_clock()):
                missed = self._number != seen + 1
                seen = self._number
                yield self._hello() if missed else self._event
                if seen == self._number:
                    await self._ticked.wait()
        finally:
            self.viewers -= 1

    def _hello(self) -> bytes:
        data = msgspec.json.encode(hello(self._inference, self._started) | self._newest())
        history = b'"history":[%b]}' % b",".join(self._seconds)
        return _event(b"hello", data[:-1] + b"," + history)


def _event(kind: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind, data)


def hello(inference: Inference, started: float) -> dict[str, Any]:
    """Return the constant data of a page. It has no secrets, and not the paths of files with secrets."""
    return {
        "version": __version__,
        "host": socket.gethostname(),
        "started": started,
        "auth": inference.auth is not None,
        "latency": EDGES_S.tolist(),
        "reasons": REASONS,
        "kinds": {slug: kind.title for slug, kind in KINDS.items()},
        "models": {
            name: {
                **_engine(target),
                **_settings(target.settings),
            }
            for name, target in inference.targets.items()
        },
        **_settings(inference.settings.server),
    }


def _engine(model: Model | ServedPipeline) -> dict[str, Any]:
    if not isinstance(model, Model):
        return {"kind": "pipeline", "platform": "", "batching": "", "sizes": [1]}
    if model.batcher is None:
        sizes = size_bins(max(1, model.settings.max_batch_size))
        return {"kind": "model", "platform": "", "batching": "", "sizes": sizes}
    engine = model.engine_worker.engine
    return {
        "kind": "model",
        "platform": engine.platform,
        "batching": engine.signature.batching_note,
        "sizes": size_bins(model.batcher.max_batch_size),
    }


def _settings(settings: msgspec.Struct) -> dict[str, Any]:
    """Return the values, and the names of those that differ from the default."""
    required = [field.name for field in msgspec.structs.fields(settings) if field.required]
    # A default can follow from another setting, so compare with an object that has the required ones only.
    plain = type(settings)(**{name: getattr(settings, name) for name in required})
    values = msgspec.to_builtins(settings)
    own = [name for name, value in msgspec.to_builtins(plain).items() if values[name] != value]
    shown = {name: value for name, value in values.items() if name not in _SECRET}
    return {"settings": shown, "own": required + own}
