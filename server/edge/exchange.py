"""One request and its response, the same at both edges: record, id, compression, counting, disconnects."""

import asyncio
from abc import abstractmethod
from collections.abc import Hashable

import msgspec
from starlette.types import Scope

from cobatch.server.http.compression import compress
from cobatch.server.http.reply import Reply
from cobatch.server.inference.served import ServedModel
from cobatch.server.inference.service import Inference, InferRequest
from cobatch.server.observability.record import RequestRecord
from cobatch.server.observability.traffic import LEFT, LEFT_SLUG

# Keys in the ASGI scope. Only our own connections set the second, to the last header of each name.
EXCHANGE = "cobatch.exchange"
HEADERS_BY_NAME = "cobatch.headers"


def record_in(scope: Scope) -> RequestRecord | None:
    """Return the record of a request through ASGI, made now if need be; None if it is not observed."""
    exchange: Exchange | None = scope.get(EXCHANGE)
    return None if exchange is None else exchange.record or exchange.make_record()


def client_in(scope: Scope) -> Hashable:
    """Return the address and port of the connection's other end, None if they are unknown."""
    client = scope.get("client")
    return client and tuple(client)


class Exchange(msgspec.Struct, eq=False):
    """A request and its response. `coding`: the content coding that the client takes, if any.

    A good infer request without subscribers has no record: its response's id names its batch.
    """

    inference: Inference
    received_s: float
    record: RequestRecord | None = None
    request: InferRequest | None = None
    coding: bytes | None = None

    @abstractmethod
    def make_record(self) -> RequestRecord:
        """Make the record from the request's headers."""

    @property
    @abstractmethod
    def client(self) -> Hashable:
        """The address and port of the connection's other end, None if they are unknown."""

    @abstractmethod
    def deliver(self, reply: Reply) -> None:
        """Give the client the reply to an infer request."""

    def begin(self, marked: bool) -> None:
        """Make the record if a subscriber needs one or the client has `marked` the request with an id."""
        observer = self.inference.observer
        drawn = observer.draw()
        if drawn or marked or observer.each:
            observer.begin(self.make_record(), drawn)

    def on_reply(self, reply: Reply) -> None:
        """Deliver the reply, compressed if the client takes that. Called once, unless `leave` was."""
        if reply.request_id is None and self.record is None:
            self.make_record()
        if self.record is not None and self.request is not None:
            self.record.ran(self.request)
        self.request = None  # it refers to this object
        coding = self.coding
        if coding is None or reply.length < self.inference.settings.server.compress_min_bytes:
            self.deliver(reply)
            return
        # In a thread, since it would block the loop.
        packing = asyncio.get_running_loop().run_in_executor(None, compress, reply, coding)
        packing.add_done_callback(lambda done: self.deliver(reply if done.exception() else done.result()))

    def add_id(self, reply: Reply) -> None:
        """Give the reply the id of its record; without a record, it has an id that names its batch.

        The client's own id goes before ours.
        """
        if self.record is None and reply.request_id is not None:
            return
        record = self.record or self.make_record()
        if not record.request_id and reply.request_id is not None:
            record.request_id = reply.request_id.decode()
        reply.request_id = None
        reply.headers += record.reply_headers()

    def finish(self, model: ServedModel, status: int, slug: str, answered_s: float) -> None:
        """Count an infer request that is answered, and pass its record on."""
        record = self.record
        if record is None:
            # `Observer.watch` counts these in once per batch.
            model.infer_traffic.durations.values.append(answered_s - self.received_s)
            return
        record.status, record.slug, record.answered_s = status, slug, answered_s
        model.infer_traffic.count(status, slug, answered_s - self.received_s)
        self.inference.observer.request_done(record)

    def cancel(self) -> None:
        """Drop the request from the batcher: its client is gone."""
        request, self.request = self.request, None
        if request is not None:
            request.cancel()
            if self.record is not None:
                self.record.rows = request.rows

    def leave(self, model: ServedModel, now_s: float) -> None:
        """Count an infer request whose client disconnected before the response."""
        if self.record is None:
            self.make_record()
        self.cancel()
        self.finish(model, LEFT, LEFT_SLUG, now_s)
