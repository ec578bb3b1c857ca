"""The live page's feed: what `server.dashboard.seconds` finds out each second, as server-sent events to
whoever looks.

`hello` comes first: what is served, how it is set, and the seconds so far. Then `tick` once a second, encoded
once for all who look. Who reads so slowly that he missed one gets another `hello`. A stream ends when the
server is about to stop, and when the credential that it was opened with has expired.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import numpy as np

from cobatch import __version__
from cobatch.batcher.durations import EDGES_S
from cobatch.server.api.requests import REASONS
from cobatch.server.auth.principal import Principal
from cobatch.server.dashboard.seconds import ModelRecent, Second, size_bins, timeline
from cobatch.server.http.problem_kinds import KINDS
from cobatch.server.inference.service import Inference
from cobatch.server.observability.history import History

log = logging.getLogger("cobatch.live")

INTERVAL_S = 1.0
# Seconds that are kept.
KEPT = 300
# Batches of a model that are shown one by one.
BATCHES = 40
_NOTHING = (0, 0, 0, 0.0)
# Settings that may hold secrets, or say where some are.
_SECRET = frozenset(("tls_cert", "tls_key", "trace_endpoint"))


class TenantSecond(msgspec.Struct, omit_defaults=True):
    """What one tenant, or the rest of them together, had in one second. `engine` is in seconds."""

    weight: float | None = None
    requests: int = 0
    rows: int = 0
    engine: float = 0.0
    refused: int = 0
    queued: int = 0


class Tick(msgspec.Struct, omit_defaults=True):
    """One second. `time` is its end, in seconds since the epoch, `span` how long it really was.

    `loop` is the event loop's share of a core, None where that is not known, `lag` how late it was at worst.
    """

    time: float
    span: float
    models: dict[str, Second]
    tenants: dict[str, TenantSecond] = {}
    loop: float | None = None
    lag: float = 0.0


class Live:
    """Of one process. `wall_clock` gives seconds since the epoch, `clock` monotonic ones."""

    def __init__(
        self,
        core: Inference,
        explained: History,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._core = core
        self._explained = explained
        self._clock = clock
        self._wall_clock = wall_clock
        self._last_s = clock()
        self._started = wall_clock()
        self._models = {name: ModelRecent(model) for name, model in core.models.items()}
        self._tenants: dict[str, tuple[int, int, int, float]] = {}
        self._loop_cpu_s: float | None = None
        self._lags = core.observer.lag.lags.counts()
        self._seconds: deque[bytes] = deque(maxlen=KEPT)
        self._number = 0
        self._event = b""
        self._ticked: asyncio.Future[None] | None = None
        self._viewers = 0
        self._closed = False

    @property
    def viewers(self) -> int:
        """How many look."""
        return self._viewers

    async def run(self) -> None:
        """Tick once a second until cancelled."""
        while True:
            await asyncio.sleep(max(0.0, self._last_s + INTERVAL_S - self._clock()))
            try:
                self.tick()
            except Exception:
                # The page must not take the server down, nor stay away for good.
                log.exception("a second of the live page is missing")
                self._last_s = self._clock()

    def close(self) -> None:
        """End all streams: the server is about to stop."""
        self._closed = True
        self._wake()

    def tick(self) -> None:
        """Keep what happened since the last one, and tell all who look."""
        now_s = self._clock()
        span_s, self._last_s = now_s - self._last_s, now_s
        models = {name: recent.second(self._core.draining) for name, recent in self._models.items()}
        tick = Tick(
            time=round(self._wall_clock(), 3),
            span=round(span_s, 4),
            models=models,
            tenants=self._tenant_seconds(),
            loop=self._loop_share(span_s),
            lag=self._worst_lag_s(),
        )
        second = msgspec.json.encode(tick)
        self._seconds.append(second)
        self._number += 1
        if self._viewers:
            self._event = _event(b"tick", second[:-1] + b"," + msgspec.json.encode(self._now())[1:])
        self._wake()

    def _now(self) -> dict[str, Any]:
        """What is only said of the newest second."""
        return {
            "totals": {name: recent.total for name, recent in self._models.items()},
            "timeline": {name: timeline(self._explained.last(name, BATCHES)) for name in self._models},
        }

    def _tenant_seconds(self) -> dict[str, TenantSecond]:
        seconds, known = {}, {}
        for name, of_tenant in self._core.tenant_totals():
            now = (of_tenant.answered, of_tenant.rows, of_tenant.refused, of_tenant.engine_s)
            before = self._tenants.get(name, _NOTHING)
            if now < before:
                before = _NOTHING  # it had lost its name for a while, and began anew
            answered, rows, refused, engine_s = (a - b for a, b in zip(now, before, strict=True))
            seconds[name] = TenantSecond(
                weight=of_tenant.weight,
                requests=int(answered),
                rows=int(rows),
                refused=int(refused),
                engine=round(engine_s, 6),
                queued=of_tenant.queued_rows,
            )
            known[name] = now
        self._tenants = known
        return seconds

    def _loop_share(self, span_s: float) -> float | None:
        cpu_s = self._core.observer.lag.cpu_s
        before, self._loop_cpu_s = self._loop_cpu_s, cpu_s
        if cpu_s is None or before is None or span_s <= 0:
            return None
        return round((cpu_s - before) / span_s, 4)

    def _worst_lag_s(self) -> float:
        counts = self._core.observer.lag.lags.counts()
        before, self._lags = self._lags, counts
        found = np.flatnonzero(counts - before)
        return float(EDGES_S[min(found[-1], len(EDGES_S) - 1)]) if len(found) else 0.0

    def _wake(self) -> None:
        if self._ticked is not None and not self._ticked.done():
            self._ticked.set_result(None)
        self._ticked = None

    # Looking

    async def stream(self, principal: Principal | None) -> AsyncIterator[bytes]:
        """The events for one who looks."""
        self._viewers += 1
        seen = -1
        try:
            while not self._closed and not self._expired(principal):
                behind = seen < 0 or self._number != seen + 1
                seen = self._number
                yield self._hello() if behind else self._event
                if seen == self._number:
                    if self._ticked is None:
                        self._ticked = asyncio.get_running_loop().create_future()
                    await asyncio.shield(self._ticked)
        finally:
            self._viewers -= 1

    def _expired(self, principal: Principal | None) -> bool:
        return principal is not None and principal.expires_s <= self._wall_clock()

    def _hello(self) -> bytes:
        told = msgspec.json.encode(hello(self._core, self._started) | self._now())
        history = b'"history":[%b]}' % b",".join(self._seconds)
        return _event(b"hello", told[:-1] + b"," + history)


def _event(kind: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind, data)


def hello(core: Inference, started: float) -> dict[str, Any]:
    """What a page has to know of the server once. No secrets: of files that hold some, not even the names."""
    models = {}
    for name, model in core.models.items():
        values, own = _settings(model.settings)
        loaded = model.batcher is not None
        models[name] = {
            "platform": model.engine_worker.engine.platform if loaded else "",
            "sizes": size_bins(model.settings.max_batch_size),
            "settings": values,
            "own": own,
        }
    values, own = _settings(core.settings.server)
    return {
        "version": __version__,
        "host": socket.gethostname(),
        "started": started,
        "auth": core.auth is not None,
        "latency": EDGES_S.tolist(),
        "reasons": REASONS,
        "kinds": {slug: kind.title for slug, kind in KINDS.items()},
        "models": models,
        "settings": values,
        "own": own,
    }


def _settings(settings: msgspec.Struct) -> tuple[dict[str, Any], list[str]]:
    """The values, and the names of those that are not the default."""
    given = [field.name for field in msgspec.structs.fields(settings) if field.required]
    # A default may follow from another setting, so the defaults are those of an object that has no others.
    plain = type(settings)(**{name: getattr(settings, name) for name in given})
    values = msgspec.to_builtins(settings)
    own = [name for name, value in msgspec.to_builtins(plain).items() if values[name] != value]
    return {name: value for name, value in values.items() if name not in _SECRET}, given + own
