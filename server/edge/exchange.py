"""One HTTP request and its response through ASGI, as the outermost middleware sees them."""

from __future__ import annotations

from collections.abc import Awaitable

import msgspec
from starlette.types import Message, Scope, Send

from cobatch.server.http.reply import note_problem
from cobatch.server.inference.model import Model
from cobatch.server.observability.record import MARKS, REQUEST_ID, RequestRecord

# The key in the ASGI scope.
EXCHANGE = "cobatch.exchange"


def record_in(scope: Scope) -> RequestRecord | None:
    """Return the record of a request through ASGI, made now if need be; None if it is not observed."""
    exchange: Exchange | None = scope.get(EXCHANGE)
    return None if exchange is None else exchange.record or exchange.make_record()


class Exchange(msgspec.Struct, eq=False):
    """A request through ASGI, and what is known of its response once there is one.

    The record is made where a subscriber needs it, and for every response but one whose id names its batch;
    only for those is `model` set, and nothing else is known of them. `headers`: the last of each name.
    """

    scope: Scope
    send_on: Send
    received_s: float
    headers: dict[bytes, bytes]
    record: RequestRecord | None = None
    model: Model | None = None
    route: str = ""
    status: int = 0
    request_id: bytes | None = None

    def make_record(self) -> RequestRecord:
        """Make the record."""
        scope = self.scope
        record = self.record = RequestRecord("", scope["method"], scope["path"], self.received_s)
        record.scheme = scope.get("scheme", "http")
        for name, value in scope["headers"]:
            if name in MARKS:
                record.mark(name, value)
        return record

    def note_infer(
        self, model: Model, slug: str, request_id: bytes | None, head: list[tuple[bytes, bytes]]
    ) -> None:
        """Note how an infer request is about to be answered. `head`: the response's headers."""
        if request_id is not None and self.record is None:
            self.model = model
            head.append((REQUEST_ID, request_id))
        else:
            self.request_id = request_id
            note_problem(self.scope, slug)

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on, the response's head with its id. Not a coroutine, which would cost more."""
        if self.model is None and message["type"] == "http.response.start":
            self.status = message["status"]
            record = self.record or self.make_record()
            if self.request_id is not None and not record.request_id:
                # The client's own id takes precedence.
                record.request_id = self.request_id.decode()
            message["headers"] = [*message.get("headers", ()), *record.reply_headers()]
        return self.send_on(message)
