"""One connection: a request on it, its answer, the next."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Protocol, cast

from cobatch.server.loadtest.answers import Answer, Malformed
from cobatch.server.loadtest.messages import Prepared


class Owner(Protocol):
    """Who is told."""

    def answered(self, connection: Connection, now: float) -> None:
        """`connection.answer` is the answer to `connection.request`; its last part came `now`."""
        ...

    def failed(self, connection: Connection, kind: str, said: str) -> None:
        """There will be no answer. The connection is closing."""
        ...

    def gone(self, connection: Connection) -> None:
        """It is closed."""
        ...


class Connection(asyncio.Protocol):
    """`request` is None while nothing is asked. `due`, `taken`, `sent`: as in `plan.COLUMNS`."""

    __slots__ = ("_owner", "_transport", "answer", "due", "request", "sent", "taken")

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._transport: asyncio.Transport
        self.answer = Answer()
        self.request: Prepared | None = None
        self.due = self.taken = self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its class

    def send(self, request: Prepared, due: float, taken: float, now: float) -> None:
        """Ask. The connection is free."""
        self.request = request
        self.due = due
        self.taken = taken
        self.sent = now
        self._transport.write(request.data)

    def data_received(self, data: bytes) -> None:
        """A part of the answer."""
        now = monotonic()  # before it is read: that takes a microsecond of ours
        try:
            whole = self.answer.feed(data)
        except Malformed as error:
            self.give_up("malformed answer", str(error))
            return
        if not whole:
            return
        if self.request is None:  # a server's word about an idle connection, before it closes it
            self.close()
            return
        self._owner.answered(self, now)

    def connection_lost(self, error: Exception | None) -> None:
        """The server closed it, or we did."""
        if self.request is not None and self.answer.ended():
            self._owner.answered(self, monotonic())
        if self.request is not None:
            when = "connection closed within an answer" if self.answer.begun else "connection closed"
            self._fail(when, str(error or ""))
        self._owner.gone(self)

    def give_up(self, kind: str, said: str = "") -> None:
        """Wait no longer."""
        self._fail(kind, said)
        self._transport.abort()

    def _fail(self, kind: str, said: str) -> None:
        if self.request is not None:
            self._owner.failed(self, kind, said)
            self.request = None

    def drop(self) -> None:
        """Close it, and forget what was asked."""
        self.request = None
        self._transport.abort()

    def close(self) -> None:
        """Close it; nothing is asked."""
        self._transport.close()

    @property
    def closing(self) -> bool:
        """Whether nothing can be asked on it any more."""
        return self._transport.is_closing()
