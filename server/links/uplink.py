"""A front's end of its link: requests to home, answers to their callers.

An answer's block, in home's slab, is given back when it is encoded.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import msgspec

from cobatch.batcher.errors import QueueFullError
from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.tuning import LONE_BATCHES, SETTLE_ITERATIONS
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import Array, Signature
from cobatch.engines.errors import EngineLoadError
from cobatch.engines.link.channel import FrontChannel
from cobatch.engines.link.messages import (
    BUNDLE_IDS,
    INLINE_BYTES,
    Answers,
    Cancel,
    Collect,
    Dropped,
    Failed,
    FromFront,
    Loaded,
    Release,
    Report,
    Submit,
    ToFront,
    Welcome,
)
from cobatch.engines.link.messages import Tenant as TenantMessage
from cobatch.engines.link.slab import SlabReader, SlabWriter
from cobatch.server.http import request_id
from cobatch.server.http.problem import Problem
from cobatch.server.links.endpoint import Endpoint
from cobatch.server.links.flights import Flights, Sent
from cobatch.server.links.page import Page
from cobatch.server.links.remote import RemoteBatch, RemoteBatcher, RemoteModel
from cobatch.server.links.rows import LARGE_BYTES, read_outputs
from cobatch.server.links.rows import is_long as reads_later
from cobatch.server.v2.pieces import in_pieces, release

log = logging.getLogger("cobatch.fronts")

MOST_TENANTS = 1 << 14
SOURCE_BITS = (1 << 31) - 1
_LOOK_S = 0.25
_LEAST_S = 1e-3  # of a deadline, for home to refuse
# Looks without a new heartbeat of home. They are no time, which also passes while the machine is paused.
STALLED_LOOKS = 4


class Uplink(Endpoint[FromFront, ToFront]):
    """The link to one life of home. `on_ended` is called at its end, when all callers have been told.

    `waits`: requests for which there is no shared memory wait for it; else they are refused.
    """

    def __init__(
        self,
        channel: FrontChannel,
        slab_in: SlabReader,
        slab_out: SlabWriter,
        page: Page,
        models: Sequence[RemoteModel],
        loop: asyncio.AbstractEventLoop,
        *,
        on_loaded: Callable[[], None],
        on_ended: Callable[[str, bool], None],
        waits: bool = False,
    ) -> None:
        super().__init__(channel, loop)
        self.on_collect: Callable[[int], None] = lambda number: None
        self._slab_in = slab_in
        self._slab_out = slab_out
        self._page = page
        self._models = models
        self._on_loaded = on_loaded
        self._on_ended = on_ended
        self._flights = Flights(slab_out)
        self._waits = waits
        self._waiting: deque[tuple[RemoteBatcher, Request, float]] = deque()  # for a block, since then
        self._next = 0
        self._gathered: list[RemoteBatcher] = []
        self._settling = False
        self._lone = 0  # requests in a row that were alone in their iteration
        self._released: list[int] = []
        self._tenants: dict[Tenant, int] = {}  # their numbers, the oldest first
        self._lead = ""
        self._heartbeat_s = page.heartbeat_s
        self._silent_looks = 0 if self._heartbeat_s else STALLED_LOOKS
        self.stalled = not self._heartbeat_s  # until home welcomes this front
        self._look = loop.call_later(_LOOK_S, self._watch)
        if waits:
            self._look.cancel()  # they would gain nothing by being refused

    # To home

    def gather_from(self, batcher: RemoteBatcher) -> None:
        """Ask a batcher for its requests once those that are about to come are there; see `_settle`."""
        self._gathered.append(batcher)
        if self._settling:
            return
        self._settling = True
        lone = self._lone >= LONE_BATCHES
        if lone:
            self.flush()
        else:
            self._slab_out.announce(self._next + 1)  # home's engine may wait for it
        self._loop.call_soon(self._settle, 0, SETTLE_ITERATIONS, lone)

    def _settle(self, seen: int, iterations: int, after_lone: bool) -> None:
        """Send once an iteration of the loop has brought no new request, as home decides then.

        A datagram wakes home and costs as much as several requests. A request that is probably alone, as the
        last ones were, leaves at once; those right behind it (`after_lone`) do not.
        """
        waiting = sum([batcher.waiting for batcher in self._gathered])
        if waiting > max(seen, 1) and iterations:
            self._loop.call_soon(self._settle, waiting, iterations - 1, after_lone)
            return
        self._settling = False
        count = waiting + after_lone
        self._lone = 0 if count > 1 else self._lone + count
        if waiting:
            self.flush()

    def gather(self) -> None:
        gathered, self._gathered = self._gathered, []
        for batcher in gathered:
            batcher.flush(self)
        self._slab_out.announce(self._next)
        if self._released:
            self._channel.send(Release(tuple(self._released)))
            self._released.clear()

    def submit(self, batcher: RemoteBatcher, requests: list[Request]) -> None:
        """Send a request, or several single rows as a bundle."""
        first = requests[0]
        columns: Sequence[Sequence[Any]]
        if len(requests) == 1:
            columns = [one if isinstance(one, list) else (one,) for one in first.payloads]
        else:
            columns = list(zip(*[request.payloads for request in requests], strict=True))
        buffers = [buffer for column in columns for buffer in column]
        sizes = tuple([sum(map(len, column)) for column in columns])
        size = sum(sizes)
        slab, is_long = self._slab_out, size > LARGE_BYTES
        if self._waiting and size > INLINE_BYTES:
            payload = None  # those that wait are next: a large one would else be overtaken for ever
        else:
            payload = slab.reserve(size) if is_long else slab.place(buffers, size)
        if payload is None:
            if self._waits and size <= slab.size:
                self._waiting.append((batcher, first, time.monotonic()))
            else:
                self._refuse(batcher, requests, size)
            return
        self._next = id_ = self._next + BUNDLE_IDS
        block = payload if type(payload) is int else -1
        sent = self._flights.add(id_, batcher, requests, block)
        for request in requests:
            request.entry = sent
            request.payloads = ()
        tenant = first.tenant
        fixed = first.row_shapes == batcher.row_shapes
        message = Submit(
            id_,
            batcher.index,
            first.rows if len(requests) == 1 else len(requests),
            sizes,
            payload,
            len(requests),
            None if fixed else first.row_shapes,
            0 if tenant is None else self._number_of(tenant),
            hash(first.source) & SOURCE_BITS if tenant is None and len(requests) == 1 else 0,
            first.priority,
            first.timeout_s,
        )
        if is_long:
            sent.filling = True
            filling = in_pieces(slab.fill, block, buffers, release)
            filling.add_done_callback(partial(self._on_filled, sent, message))
        else:
            self._channel.send(message)

    def on_received(self) -> None:
        if self._waiting:
            self._send_waiting()

    def _send_waiting(self) -> None:
        """Send requests for which there is a block now."""
        waiting, self._waiting = self._waiting, deque()
        while waiting and not self._waiting:
            batcher, request, since_s = waiting.popleft()
            if request.state is State.QUEUED:
                if request.timeout_s is not None:
                    request.timeout_s = max(_LEAST_S, request.timeout_s + since_s - time.monotonic())
                self.submit(batcher, [request])
        self._waiting.extend(waiting)
        self.flush_soon()

    def _on_filled(self, sent: Sent, message: Submit, filling: asyncio.Future[None]) -> None:
        """Send a long request that is in its block now, unless its caller has left."""
        error = filling.exception()
        sent.filling = False
        if self.ended:
            return
        if error is not None:
            self.end(f"a request could not be copied: {error!r}", broken=True)
        elif any(request.state is State.QUEUED for request in sent.requests):
            self.send(message)
        else:
            self._flights.end(self._flights.take(sent.id))
            self.on_received()

    def _refuse(self, batcher: RemoteBatcher, requests: list[Request], size: int) -> None:
        """Refuse requests for which there is no shared memory: it is home's queue that has it."""
        most = self._slab_out.size
        for request in requests:
            error: Exception
            if size > most:
                detail = f"the tensors have {size} bytes, the limit is {most}"
                error = Problem("body-too-large", detail, body_bytes=size, limit_bytes=most)
            else:
                error = QueueFullError(*batcher.fullness())
            batcher.fail(request, error)

    def _number_of(self, tenant: Tenant) -> int:
        number = self._tenants.get(tenant)
        if number is None:
            number = len(self._tenants) + 1
            if number > MOST_TENANTS:
                oldest = next(iter(self._tenants))
                number = self._tenants.pop(oldest)
            self._tenants[tenant] = number
            self._channel.send(TenantMessage(number, tenant.name, tenant.rule))
        return number

    def cancel(self, request: Request) -> None:
        """Tell home that a caller left; of a bundle, once all have."""
        sent = request.entry
        assert isinstance(sent, Sent)
        if not sent.filling and all(one is request or one.state is State.CANCELLED for one in sent.requests):
            self.send(Cancel((sent.id,)))

    def requests_of(self, batcher: RemoteBatcher) -> list[Request]:
        """Return the requests of a batcher that are in flight."""
        return self._flights.of(batcher)

    def report(self, content: msgspec.Raw) -> None:
        """Send a report."""
        self.send(Report(content))

    # From home

    def handle(self, message: ToFront) -> None:
        match message:
            case Answers():
                self._answer(message)
            case Failed():
                self._fail(message)
            case Dropped():
                for id_ in message.ids:
                    self._flights.end(self._flights.take(id_))
            case Loaded():
                self._load(message)
            case Collect():
                self.on_collect(message.number)
            case Welcome():
                self.stalled = False
                self._lead = f"{message.process}-%x."
                request_id.join(message.process)

    def _load(self, loaded: Loaded) -> None:
        model = self._models[loaded.model]
        if loaded.error:
            model.load_error = EngineLoadError(loaded.error)
        else:
            signature = msgspec.msgpack.decode(loaded.signature, type=Signature)
            model.loaded(self, self._page.queues[loaded.model], signature)
        self._on_loaded()

    def _answer(self, answers: Answers) -> None:
        taken = [self._flights.take(id_) for id_ in answers.ids]
        rows = sum([request.rows for sent in taken for request in sent.requests])
        payload = self._slab_in.read(answers.payload, sum(answers.sizes))
        dtypes = self._models[answers.model].output_dtypes
        if reads_later(dtypes, answers):
            reading = in_pieces(read_outputs, dtypes, answers, rows, payload)
            reading.add_done_callback(partial(self._on_read, answers, taken))
        else:
            self._deliver(answers, taken, read_outputs(dtypes, answers, rows, payload), lasting=False)

    def _on_read(self, answers: Answers, taken: list[Sent], reading: asyncio.Future[list[Array]]) -> None:
        """Deliver an answer whose strings are read."""
        error = reading.exception()
        if error is None:
            self._deliver(answers, taken, reading.result(), lasting=True)
            return
        self._fail_all(taken)
        self.end(f"an answer could not be read: {error!r}", broken=True)

    def _deliver(self, answers: Answers, taken: list[Sent], outputs: list[Array], *, lasting: bool) -> None:
        info = answers.batch
        lead = (self._lead % info.number).encode() if info.number else b""
        model = self._models[answers.model]
        batch = model.new_batch(info, lead, outputs)
        batch.lasting = lasting
        first = 0
        for sent, at in zip(taken, answers.places, strict=True):
            place = at
            for request in sent.requests:
                if request.state is State.QUEUED:
                    request.state = State.DONE
                    request.batch = batch
                    request.first_row = first
                    request.entry = place
                    sent.batcher.ended()
                    request.done()
                first += request.rows
                place += request.rows
            self._flights.end(sent)
        batch.outputs, batch.memo = (), {}  # no longer valid
        model.delivered()
        if type(answers.payload) is int:
            self._released.append(answers.payload)
            self.flush_soon()

    def _fail(self, failed: Failed) -> None:
        sent = self._flights.take(failed.id)
        batch = None if failed.batch is None else RemoteBatch.of(failed.batch)
        for request in sent.requests:
            if request.state is State.QUEUED:
                if failed.slug == "input-rejected" and request.tenant is None:
                    sent.batcher.keep_alone(request.source)
                request.batch = batch
                problem = Problem(failed.slug, failed.detail, close=failed.close, **failed.members)
                sent.batcher.fail(request, problem)
        self._flights.end(sent)

    # The end

    def _watch(self) -> None:
        """Refuse requests while home's event loop does not run."""
        before_s, self._heartbeat_s = self._heartbeat_s, self._page.heartbeat_s
        self._silent_looks = 0 if self._heartbeat_s != before_s else self._silent_looks + 1
        stalled = self._silent_looks >= STALLED_LOOKS
        if stalled != self.stalled:
            self.stalled = stalled
            for model in self._models:
                if model.batcher is not None:
                    model.batcher.pause() if stalled else model.batcher.resume()
        self._look = self._loop.call_later(_LOOK_S, self._watch)

    def on_end(self, why: str, *, broken: bool) -> None:
        self._look.cancel()
        lost = self._flights.take_all()
        for model in self._models:
            if model.batcher is not None:
                model.batcher.close()
        self._fail_all(lost)
        waiting, self._waiting = self._waiting, deque()
        for batcher, request, _ in waiting:
            if request.state is State.QUEUED:
                batcher.fail(request, batcher.gone())
        self._on_ended(why, broken)

    def _fail_all(self, lost: Iterable[Sent]) -> None:
        """Fail requests that home does not answer any more."""
        for sent in lost:
            for request in sent.requests:
                if request.state is State.QUEUED:
                    sent.batcher.fail(request, sent.batcher.gone())
