"""Who is told of requests and batches: the access log, the traces, and what `cobatch explain` asks."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING

from cobatch.server.inference.service import Inference
from cobatch.server.observability.access_log import LEVELS, AccessLog
from cobatch.server.observability.history import Recent
from cobatch.server.settings.values import SettingsError

if TYPE_CHECKING:
    from cobatch.server.observability.tracing import Tracing


class Watchers:
    """Of one process. Raises SettingsError where one is asked for whose libraries are not there."""

    def __init__(self, core: Inference) -> None:
        settings, observer = core.settings.server, core.observer
        self.recent = Recent(max(1, len(core.models)))
        observer.add(recorded=self.recent.on_request, batches=self.recent.on_batch)
        self._log: AccessLog | None = None
        if settings.access_log != "off":
            self._log = AccessLog(settings.access_log, LEVELS[settings.access_log_level])
            if settings.access_log_level == "info":
                observer.add(requests=self._log.request_done)
            else:
                # What was refused, failed or left has a record anyhow.
                observer.add(recorded=self._log.request_done)
        self.tracing: Tracing | None = None
        if settings.tracing:
            self.tracing = _tracing(settings.trace_sample, settings.trace_endpoint)
            observer.sample(self.tracing)
            observer.add(recorded=self.tracing.request_done)

    def start(self) -> None:
        """Begin, on the running loop."""
        loop = asyncio.get_running_loop()
        if self._log is not None:
            self._log.start(loop)
        if self.tracing is not None:
            self.tracing.start(loop)

    async def stop(self) -> None:
        """Write and send what is left."""
        if self._log is not None:
            await asyncio.to_thread(self._log.stop)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.stop)


def _tracing(ratio: float, endpoint: str | None) -> Tracing:
    # A heavy import, and an extra: for those who trace.
    if importlib.util.find_spec("opentelemetry") is None:
        raise SettingsError("server.tracing: needs OpenTelemetry's libraries: pip install 'cobatch[otel]'")
    from cobatch.server.observability.tracing import Tracing  # noqa: PLC0415 - see above

    return Tracing(ratio, endpoint)
