"""POST /batch: many V2 infer requests in one call, each with a response of its own.

All items are submitted before anything is awaited, so they are in the queue together and share batches.
Most items of a call are one row each for the same model and ask for nothing special: their rows go to the
batcher as bundles (`batcher.bundle`). A refused item does not fail the call.
"""

import asyncio
import time
from collections.abc import Hashable, Sequence
from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from cobatch.batcher.bundle import Bundle
from cobatch.batcher.request import Request as BatcherRequest
from cobatch.batcher.tenant import Tenant
from cobatch.server.api.routing import find_model
from cobatch.server.auth.principal import Principal, principal_in
from cobatch.server.batch.items import AnyItem, decode_items, encode_batch, infer_target, message_of
from cobatch.server.batch.spans import Progress, report_items
from cobatch.server.edge.exchange import EXCHANGE, client_in, record_in
from cobatch.server.http.asgi import read_body, send_reply
from cobatch.server.http.compression import compressed
from cobatch.server.http.problem import Problem, from_error
from cobatch.server.http.reply import JSON, Reply
from cobatch.server.http.request_id import new_id
from cobatch.server.inference.served import ServedModel
from cobatch.server.inference.service import Inference, InferRequest, refused, reply_to
from cobatch.server.observability.history import History
from cobatch.server.observability.observer import Tracer
from cobatch.server.observability.record import RequestRecord
from cobatch.server.observability.traffic import LEFT, LEFT_SLUG
from cobatch.server.settings.auth import INFER
from cobatch.server.v2.decode import Decoded
from cobatch.server.v2.encode import encode_later, is_long
from cobatch.server.v2.long_json import LongValue
from cobatch.server.v2.pieces import in_pieces, release

BATCH = "/batch"
# Only after this time is a call worth a task that notices the client disconnect.
WATCH_AFTER_S = 0.05
# Longer calls are decoded in a thread, which lets the event loop go on after this many items.
_SHORT_BYTES = 1 << 16
_ITEMS_AT_ONCE = 16
# An item's place in the call, and its content.
Member = tuple[int, Decoded]


class BatchRoute:
    """POST /batch as ASGI; the router, which costs as much as some items, is for other methods only."""

    def __init__(self, inference: Inference, history: History, tracer: Tracer | None) -> None:
        self._inference = inference
        self._history = history
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].endswith("\n"):
            # Starlette's pattern accepts a line feed.
            raise HTTPException(404)
        try:
            reply = await self._reply(scope, receive)
        except ClientDisconnect:
            return
        except Problem as problem:
            reply = problem.reply(instance=scope["path"])
        await send_reply(reply, scope, send)

    async def _reply(self, scope: Scope, receive: Receive) -> Reply:
        """The response. Raises Problem, ClientDisconnect."""
        settings = self._inference.settings.server
        headers = dict(scope["headers"])
        principal = principal_in(scope)
        problem = self._inference.admit_call(principal)
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # it refers to this frame
        body = await read_body(headers, receive, self._inference.max_json_bytes, scope[EXCHANGE])
        record = record_in(scope) or RequestRecord("", "POST", BATCH, time.monotonic())
        if principal is not None:
            record.tenant = principal.tenant.name
        if len(body) > _SHORT_BYTES:
            decoded = await in_pieces(decode_items, body, settings.max_batch_items)
        else:
            decoded = decode_items(body, settings.max_batch_items)
        call = Call(self._inference, *decoded, principal, client_in(scope))
        long = len(body) > _SHORT_BYTES
        del body, decoded  # they are gone when they are decoded
        try:
            if long:
                await in_pieces(call.decode)
            else:
                call.decode()
            replies = await call.replies(receive)
            record.request_id = record.request_id or new_id()
            await report_items(self._history, self._tracer, record, call.progress, replies)
        finally:
            call.release()
        parts = encode_batch(call.progress.items, replies, record.request_id.encode())
        reply = Reply(200, JSON, parts, close=any(reply.close for reply in replies))
        return await compressed(reply, headers.get(b"accept-encoding", b""), settings.compress_min_bytes)


class Call:
    """One call's items on their way."""

    def __init__(
        self,
        inference: Inference,
        items: Sequence[AnyItem],
        values: Sequence[LongValue],
        principal: Principal | None,
        client: Hashable,
    ) -> None:
        self.progress = Progress(items)
        self.client = client
        self._values = values
        self._decoded: list[tuple[int, ServedModel, Decoded | Exception]] = []
        self._inference = inference
        self._principal = principal
        self._tenant = None if principal is None else principal.tenant
        self._open = len(items)
        self._submitted: list[tuple[ServedModel, BatcherRequest]] = []
        self._watcher: asyncio.Task[None] | None = None
        # Resolved with True when all is answered, with False if the client disconnected.
        self._done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._find_models()

    async def replies(self, receive: Receive) -> list[Reply]:
        """All items' replies in order. Raises ClientDisconnect."""
        self._submit_all()
        if self._open:
            # Most calls end before a client could leave, and a task costs as much as an item or two.
            timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._start_watching, receive)
            try:
                if not await self._done:
                    raise ClientDisconnect
            finally:
                timer.cancel()
                watcher, self._watcher = self._watcher, None  # its frames refer to this object
                if watcher is not None:
                    watcher.cancel()
                if self._open:
                    for model, request in self._submitted:
                        model.loaded_batcher.cancel(request)
        replies = [reply for reply in self.progress.replies if reply is not None]
        self._count(replies, time.monotonic() - self.progress.began_s)
        return replies

    def release(self) -> None:
        """Drop the requests, which refer to this call, without waiting for the garbage collector."""
        self.progress.alone.clear()
        self.progress.bundles.clear()
        self._submitted.clear()
        self._decoded.clear()

    def _find_models(self) -> None:
        progress, paths = self.progress, self._inference.infer_paths
        admitted: set[ServedModel] = set()
        for place, item in enumerate(progress.items):
            try:
                plain = item.method == "POST" and not item.headers
                model = (paths.get(item.url) if plain else None) or self._find(item)
                progress.models[place] = model
                if model not in admitted:
                    self._inference.check(model, self._principal)
                    admitted.add(model)
            except Exception as error:  # noqa: BLE001 - unexpected ones are logged there
                self._refuse(place, error)

    def decode(self) -> None:
        """Decode the items that are not refused yet."""
        progress = self.progress
        for place, (item, model) in enumerate(zip(progress.items, progress.models, strict=True)):
            if progress.replies[place] is not None:
                continue
            assert model is not None
            try:
                parsed = message_of(item), None, self._values
                self._decoded.append((place, model, model.decoder.read(parsed)))
            except Exception as error:  # noqa: BLE001 - unexpected ones are logged there
                self._decoded.append((place, model, error))
            if self._values or place % _ITEMS_AT_ONCE == _ITEMS_AT_ONCE - 1:
                release()

    def _submit_all(self) -> None:
        alike: dict[ServedModel, list[Member]] = {}
        for place, model, decoded in self._decoded:
            if isinstance(decoded, Exception):
                self._refuse(place, decoded)
            elif model.decoder.is_plain_row(decoded):
                alike.setdefault(model, []).append((place, decoded))
            else:
                self._submit_alone(model, place, decoded)
        for model, members in alike.items():
            # In sizes that the policy calls full: larger batches gain nothing.
            size = model.loaded_batcher.queue.full_rows
            for first in range(0, len(members), size):
                self._submit_together(model, members[first : first + size])

    def _find(self, item: AnyItem) -> ServedModel:
        """The model that an item is for. Raises Problem."""
        name, version = infer_target(item)
        if self._principal is not None and not self._principal.may_infer(name):
            raise self._inference.forbidden(INFER, name)
        return find_model(self._inference, self._principal, name, version)

    def _submit_alone(self, model: ServedModel, place: int, decoded: Decoded) -> None:
        if any(binary for _, binary in decoded.outputs):
            detail = "a batch's answers are JSON and carry no binary tensors"
            self._refuse(place, Problem("not-batchable", detail, field="body"))
            return
        try:
            model.loaded_batcher.submit(self.request(model, place, decoded))
        except Exception as error:  # noqa: BLE001 - unexpected ones are logged there
            self._refuse(place, error)

    def _submit_together(self, model: ServedModel, members: list[Member]) -> None:
        if len(members) == 1:
            self._submit_alone(model, *members[0])
            return
        bundle = InferBundle(self, model, members, self._tenant)
        self.progress.bundles.append(bundle)
        self._submitted.append((model, bundle))
        bundle.enter(model.loaded_batcher.submit)

    def request(self, model: ServedModel, place: int, decoded: Decoded) -> InferRequest:
        """An item as a request of its own."""
        request = InferRequest(model, decoded, partial(self.answer, place), self._tenant)
        self.progress.alone[place] = request
        self._submitted.append((model, request))
        return request

    def answer(self, place: int, reply: Reply) -> None:
        self.progress.replies[place] = reply
        self._open -= 1
        if not self._open and not self._done.done():
            self._done.set_result(True)

    def _refuse(self, place: int, error: Exception) -> None:
        model = self.progress.models[place]
        if model is None:
            path = self.progress.items[place].url.partition("?")[0]
            self.answer(place, from_error(error).reply(instance=path))
        else:
            self.answer(place, refused(model, error, self._tenant))

    def _count(self, replies: list[Reply], duration_s: float) -> None:
        """Count each item for its model. It took as long as the call: no client has it sooner."""
        models = set(self.progress.models)
        if len(models) == 1 and None not in models and not any(reply.slug for reply in replies):
            (model,) = models
            model.traffic.count_alike(len(replies), duration_s)  # type: ignore[union-attr]  # not None
            return
        for model, reply in zip(self.progress.models, replies, strict=True):
            if model is not None:
                model.traffic.count(reply.status, reply.slug, duration_s)

    def _start_watching(self, receive: Receive) -> None:
        self._watcher = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        # After the body, the only message is that the client has disconnected.
        await receive()
        if not self._done.done():
            for model in self.progress.models:
                if model is not None:
                    model.traffic.count(LEFT, LEFT_SLUG, 0.0)
            self._done.set_result(False)


class InferBundle(Bundle):
    """Items of one call that are one plain row each for the same model."""

    __slots__ = ("_call", "_members", "_model")

    def __init__(self, call: Call, model: ServedModel, members: list[Member], tenant: Tenant | None) -> None:
        super().__init__(model.decoder.row_shapes, [decoded.payloads for _, decoded in members])
        self.tenant = tenant
        self._call = call
        self._model = model
        self._members = members

    @property
    def source(self) -> Hashable:
        return self.tenant or self._call.client

    def separate(self) -> list[BatcherRequest]:
        return [self._call.request(self._model, place, decoded) for place, decoded in self._members]

    def done(self) -> None:
        outputs = range(len(self._model.decoder.signature.outputs))
        if self.error is None and is_long(self, outputs):
            encode_later(self, outputs, self._encode, self._answer)
        else:
            self._answer(self._encode(self))

    def _encode(self, request: BatcherRequest) -> list[Reply]:
        """The replies to all members, which are to the encoder one request of one row after another."""
        one = BatcherRequest(1, self.row_shapes, ())
        one.batch, one.error, one.enqueued_s = request.batch, request.error, request.enqueued_s
        one.first_row = request.first_row
        replies = []
        for _, decoded in self._members:
            replies.append(reply_to(one, self._model, decoded.outputs, decoded.id))
            one.first_row += 1
            if one.batch is not self.batch:
                release()  # in the thread
        return replies

    def _answer(self, replies: list[Reply]) -> None:
        for (place, _), reply in zip(self._members, replies, strict=True):
            if reply.request_id is None:
                self._call.progress.alone[place] = self
            self._call.answer(place, reply)
