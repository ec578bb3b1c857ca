"""A server's time that a test moves on: limits of minutes pass at once, and none passes by itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

from cobatch.server.edge import connection, framing, receiver


class Clock:
    """Monotonic time plus the time that was skipped."""

    def __init__(self) -> None:
        self.skipped_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.skipped_s

    @contextlib.contextmanager
    def of_connections(self) -> Iterator[None]:
        """Give this time to all connections."""
        ours = SimpleNamespace(monotonic=self)
        with contextlib.ExitStack() as patches:
            for module in (connection, framing, receiver):
                patches.enter_context(mock.patch.object(module, "time", ours))
            yield


class ClockedLoop(asyncio.SelectorEventLoop):
    """An event loop with this time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        super().__init__()

    def time(self) -> float:
        return self._clock()
