"""Home's end of the link to a front: its requests into the batchers, their rows back.

Answers are gathered by batch, and each front gets only its own rows.
"""

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import msgspec

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.bundle import Bundle
from cobatch.batcher.request import Payload, Request, State
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import RowShapes
from cobatch.engines.errors import LinkError
from cobatch.engines.link.channel import HomeChannel
from cobatch.engines.link.messages import (
    BUNDLE_IDS,
    INLINE_BYTES,
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
from cobatch.server.auth.tenants import Tenants
from cobatch.server.http.problem import from_error
from cobatch.server.http.request_id import PROCESS
from cobatch.server.inference.model import Model
from cobatch.server.links.answers import AnswerGroup, AnswerWriter, SharedRows, info_of
from cobatch.server.links.endpoint import Endpoint
from cobatch.server.links.rows import (
    LARGE_BYTES,
    MANY_STRINGS,
    Buffer,
    InputReader,
    output_bytes,
    output_pieces,
)
from cobatch.server.links.waiting import Waiting, WaitingRoom
from cobatch.server.v2.encode import encode_later, is_long
from cobatch.server.v2.pieces import in_pieces

log = logging.getLogger("cobatch.fronts")

_SHARED = "link"
Rows = tuple[RowShapes, Sequence[Payload]]


class LinkedRequest(Waiting):
    """A request of a front, or a step of a pipeline. `id`: on the link."""

    __slots__ = ("id", "link", "model", "number")

    def __init__(self, link: "Downlink", model: int, submit: Submit, rows: Rows) -> None:
        Request.__init__(self, submit.rows, *rows)
        self.id = submit.id
        self.link = link
        self.model = model
        self.number = submit.source or -submit.id
        self.tenant = link.tenant(submit.tenant)
        self.priority, self.timeout_s = submit.priority, submit.timeout_s

    @property
    def source(self) -> Hashable:
        """The tenant, or the caller's connection on its link."""
        return self.tenant or (self.link.number, self.number)

    @property
    def entrants(self) -> int:
        return self.callers if self.link.room is None else 0

    def admit(self) -> None:
        self.link.enter(self, waits=False)

    def refuse(self, error: Exception) -> None:
        self.state = State.DONE
        self.link.open.pop(self.id, None)
        self.link.fail(self, error)

    def done(self) -> None:
        try:
            self.link.answer(self)
        except Exception as error:  # noqa: BLE001 - `fail` logs unexpected ones
            self.link.fail(self, error)


class LinkedBundle(LinkedRequest, Bundle):
    """A bundle of a front, whose members have the next ids."""

    __slots__ = ()

    def __init__(self, link: "Downlink", model: int, submit: Submit, rows: Rows) -> None:
        LinkedRequest.__init__(self, link, model, submit, rows)
        self.callers = submit.callers

    def separate(self) -> list[Request]:
        views = [memoryview(payload) for payload in self.payloads if not isinstance(payload, list)]
        sizes = [len(view) // self.rows for view in views]
        members: list[Request] = []
        del self.link.open[self.id]
        for number in range(self.rows):
            submit = Submit(self.id + 1 + number, self.model, 1, (), b"")
            payloads = [
                view[number * size : (number + 1) * size] for view, size in zip(views, sizes, strict=True)
            ]
            member = LinkedRequest(self.link, self.model, submit, (self.row_shapes, payloads))
            member.tenant = self.tenant
            self.link.open[member.id] = member
            members.append(member)
        return members


class Downlink(Endpoint[ToFront, FromFront]):
    """The link to one life of a front, or of a pipeline's process, which has a `room`: its requests are steps
    of calls that were admitted.

    `number`: the process's. `open`: its requests in the batchers, by id.
    """

    def __init__(
        self,
        number: int,
        channel: HomeChannel,
        slab_in: SlabReader,
        slab_out: SlabWriter,
        models: Sequence[Model],
        tenants: Tenants | None,
        loop: asyncio.AbstractEventLoop,
        *,
        held: dict[Batcher, None],
        room: WaitingRoom | None = None,
        on_received: Callable[["Downlink"], None],
        on_ended: Callable[["Downlink", str, bool], None],
    ) -> None:
        super().__init__(channel, loop)
        self.number = number
        self.room = room
        self.open: dict[int, LinkedRequest] = {}
        self.on_report: Callable[[msgspec.Raw], None] = lambda content: None
        self._slab_in = slab_in
        self._slab_out = slab_out
        self._answers = AnswerWriter(slab_out, self.post, self.end)
        self._models = models
        self._held = held
        self._last = 0  # id of a request
        self._readers: list[InputReader | None] = [None] * len(models)
        self._accounts = tenants
        self._tenants: dict[int, Tenant] = {}
        self._on_received = on_received
        self._on_ended = on_ended
        self._groups: list[AnswerGroup] = []  # of this iteration
        self._outbox: list[ToFront] = []
        self.send(Welcome(PROCESS, len(models)))
        for index, model in enumerate(models):
            if model.batcher is not None or model.load_error is not None:
                self.loaded(index)

    def loaded(self, index: int) -> None:
        """Tell the front that a model is loaded, or that it could not be."""
        model = self._models[index]
        if model.batcher is None:
            self.send(Loaded(index, error=str(model.load_error)))
            return
        signature = model.engine_worker.engine.signature
        self._readers[index] = InputReader(signature)
        encoded = msgspec.msgpack.encode(signature)
        self.send(Loaded(index, encoded, model.batcher.max_batch_size))

    def collect(self, number: int) -> None:
        """Ask the front for a report with this number."""
        self.send(Collect(number))

    # From the front

    def handle(self, message: FromFront) -> None:
        if type(message) is Submit:
            self._submit(message)
            return
        match message:
            case Release():
                for offset in message.offsets:
                    self._slab_out.free(offset)
                self._answers.post_waiting()
            case Cancel():
                for id_ in message.ids:
                    self._cancel(id_)
            case TenantMessage():
                self._introduce(message)
            case Report():
                self.on_report(message.content)

    def on_received(self) -> None:
        self._on_received(self)

    @property
    def expected(self) -> bool:
        """The front has announced requests that have not come."""
        return self._slab_in.announced > self._last

    def give_up(self) -> None:
        """Expect nothing of what the front has announced until now."""
        self._last = self._slab_in.announced

    def _submit(self, submit: Submit) -> None:
        reader = self._readers[submit.model] if submit.model < len(self._readers) else None
        if reader is None:
            raise LinkError(f"a request for model {submit.model}, which is not loaded")
        if submit.id % BUNDLE_IDS or submit.id in self.open:
            raise LinkError(f"a request with the id {submit.id}")
        self._last = max(self._last, submit.id)  # long ones come later
        payload = self._slab_in.read(submit.payload, sum(submit.sizes))
        if reader.is_long(submit):
            request = self.open[submit.id] = LinkedRequest(self, submit.model, submit, ((), ()))
            reading = in_pieces(reader.read, submit, payload)
            reading.add_done_callback(partial(self._on_read, request))
            return
        rows = reader.read(submit, payload)
        if submit.callers == 1:
            request = LinkedRequest(self, submit.model, submit, rows)
        else:
            if submit.callers != submit.rows or submit.callers >= BUNDLE_IDS or not reader.plain:
                raise LinkError(f"a bundle of {submit.callers} callers with {submit.rows} rows")
            request = LinkedBundle(self, submit.model, submit, rows)
        self.open[submit.id] = request
        self.enter(request)

    def _on_read(self, request: LinkedRequest, reading: asyncio.Future[Rows]) -> None:
        """Submit a request whose strings are read."""
        error = reading.exception()
        if request.state is State.CANCELLED:
            return  # by its front, or with the link
        if isinstance(error, LinkError):
            self.end(str(error), broken=True)
        elif isinstance(error, Exception):
            del self.open[request.id]
            self.fail(request, error)
        else:
            request.row_shapes, request.payloads = reading.result()
            self.enter(request)
            self.on_received()

    def enter(self, request: LinkedRequest, *, waits: bool = True) -> None:
        """Submit a request to its batcher, unless it `waits` for room."""
        batcher = self._models[request.model].loaded_batcher
        if waits and self.room is not None and self.room.takes(batcher, request):
            return
        if batcher.hold():
            self._held[batcher] = None
        try:
            if isinstance(request, LinkedBundle):
                request.enter(partial(self._submit_member, batcher))
            else:
                batcher.submit(request)
        except Exception as error:  # noqa: BLE001 - `fail` logs unexpected ones
            request.refuse(error)

    def _submit_member(self, batcher: Batcher, request: Request) -> None:
        """Submit a bundle, or a member of one for which there was no room, which waits if it may."""
        assert isinstance(request, LinkedRequest)
        if isinstance(request, Bundle) or self.room is None or not self.room.takes(batcher, request):
            batcher.submit(request)

    def _cancel(self, id_: int) -> None:
        ids = [id_] if id_ in self.open else range(id_ + 1, id_ + BUNDLE_IDS)  # a bundle that was split
        dropped = [one for one in ids if one in self.open]
        for one in dropped:
            self._drop(self.open.pop(one))
        if dropped:
            self.post(Dropped(tuple(dropped)))

    def _drop(self, request: LinkedRequest) -> None:
        batcher = self._models[request.model].loaded_batcher
        if self.room is not None:
            self.room.forget(batcher, request)
        batcher.cancel(request)

    def _introduce(self, message: TenantMessage) -> None:
        if self._accounts is None or not self._accounts.has_rule(message.rule):
            raise LinkError(f"tenant {message.name!r} with rule {message.rule}")
        self._tenants[message.number] = self._accounts.by_rule(message.name, message.rule)

    def tenant(self, number: int) -> Tenant | None:
        """Return the tenant with this number. Raises LinkError."""
        if not number:
            return None
        tenant = self._tenants.get(number)
        if tenant is None:
            raise LinkError(f"tenant {number} is not known")
        return tenant

    # To the front

    def post(self, message: ToFront) -> None:
        """Send a message with the answers of this iteration, in order."""
        self._outbox.append(message)
        self.flush_soon()

    def answer(self, request: LinkedRequest) -> None:
        """Take a request's answer from its batch, whose outputs are valid now."""
        if self.open.pop(request.id, None) is None:
            return  # the link has ended
        if request.error is not None:
            self.fail(request, request.error)
            return
        batch = request.batch
        assert batch is not None
        shared = batch.memo.get(_SHARED)
        if shared is None:
            shared = batch.memo[_SHARED] = SharedRows(batch)
        first, rows = request.first_row, request.rows
        strings, size = shared.strings * rows, shared.row_size * rows
        many = size > LARGE_BYTES or strings > MANY_STRINGS
        if many or (strings and is_long(request, range(shared.outputs))):
            post = partial(self._on_written, request, shared)
            encode_later(request, range(shared.outputs), _written, post)
            return
        if size > INLINE_BYTES:
            group = AnswerGroup(shared, request.model)
            group.add(
                request.id, first, [output_bytes(output[first : first + rows]) for output in batch.outputs]
            )
            self._answers.post(group)  # the only copy is into the slab
            return
        group = batch.memo.get(self)  # type: ignore[assignment]  # or None
        if group is None:
            group = batch.memo[self] = AnswerGroup(shared, request.model)
            self._groups.append(group)
        group.add(request.id, first, shared.rows(batch, first, rows))
        if batch.requests and batch.requests[-1] is request:
            self.flush()  # before what home does at the end of a batch
        else:
            self.flush_soon()

    def _on_written(
        self, request: LinkedRequest, shared: SharedRows, written: list[Sequence[Buffer]] | Exception
    ) -> None:
        """Send a long answer, of which `written` is a copy."""
        if isinstance(written, Exception):
            self.fail(request, written)
            return
        group = AnswerGroup(shared, request.model)
        group.hold(request.id, request.first_row, written)
        self._answers.post(group)

    def fail(self, request: LinkedRequest, error: Exception) -> None:
        """Send a request's problem; unexpected errors are logged."""
        problem = from_error(error)
        slug = problem.kind.slug
        if slug == "internal":
            log.error("a request of front %d failed", self.number, exc_info=error)
        info = None if request.batch is None else info_of(request.batch)
        self.post(Failed(request.id, slug, problem.detail, problem.members, problem.close, info))

    def gather(self) -> None:
        groups, self._groups = self._groups, []
        for group in groups:
            self._answers.post(group)
        outbox, self._outbox = self._outbox, []
        for message in outbox:
            self._channel.send(message)

    # The end

    def on_end(self, why: str, *, broken: bool) -> None:
        open_, self.open = self.open, {}
        self._groups.clear()
        self._outbox.clear()
        self._answers.close()
        for request in open_.values():
            self._drop(request)
        self._on_ended(self, why, broken)


def _written(request: Request) -> list[Sequence[Buffer]] | Exception:
    """Return the outputs of a request that ran, as they are sent."""
    try:
        if request.error is not None or request.batch is None:
            return request.error or LookupError("the request has no batch")
        return [output_pieces(output) for output in request.batch.outputs]
    except Exception as error:  # noqa: BLE001 - a text that is not Unicode, for example
        return error
