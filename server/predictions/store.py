"""One prediction from acceptance to its answer, and the store of predictions that are kept for their clients.

A prediction is kept when its client announced to come back for it: by `Prefer: respond-async` or an
`Idempotency-Key`. Others live as long as the request that waits for them.

The store's bounds, which hold at every moment:

* at most `kept_predictions` in all, finished or not;
* at most `kept_bytes`: an unfinished prediction counts its tensors, a finished one its answer, and each
  `OVERHEAD_BYTES` more;
* finished ones for at most `kept_s`, the oldest ones less where room is needed.

Unfinished ones are never dropped: where they leave no room, nothing more is accepted. All methods run on the
event loop. The batcher answers every accepted request, also when it stops, so the store needs no end.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Hashable, Sequence

import msgspec

from cobatch.batcher.errors import BatcherError
from cobatch.batcher.request import Request, State
from cobatch.batcher.tenant import Tenant
from cobatch.server.http.problem import Problem
from cobatch.server.inference.model import Model
from cobatch.server.observability.record import RequestRecord
from cobatch.server.predictions import encode
from cobatch.server.predictions.decode import Decoded
from cobatch.server.predictions.encode import Answer
from cobatch.server.settings.schema import ServerSettings
from cobatch.server.v2.encode import encode_later, is_long

log = logging.getLogger("cobatch.server")

# Of a kept prediction, beside its tensors or its answer. The answer that one was too large takes less.
OVERHEAD_BYTES = 2048


class Prediction:
    """One prediction. `answer` is None until it is finished; `kept_bytes` is its size in a store."""

    def __init__(
        self,
        subject: str,
        model: Model,
        decoded: Decoded,
        tenant: Tenant | None = None,
        record: RequestRecord | None = None,
        client: Hashable = None,
    ) -> None:
        # Too long to be guessed.
        self.id = secrets.token_urlsafe(18)
        self.subject = subject
        self.model = model
        self.answer: Answer | None = None
        self.idempotency: tuple[str, bytes] | None = None  # key and digest
        self.kept_bytes = 0
        self.finished_s = 0.0
        self.on_answer: Callable[[Prediction], None] | None = None
        self._request: PredictionRequest | None = PredictionRequest(self, decoded, tenant, record, client)
        # Wait for it with `asyncio.wait`, which does not cancel it; None once `answer` is set.
        self.answered: asyncio.Future[Answer] | None = asyncio.get_running_loop().create_future()

    @property
    def kept(self) -> bool:
        """True once a store keeps the prediction, also after it was dropped."""
        return self.on_answer is not None

    @property
    def status(self) -> str:
        """One of the words of `server.predictions.encode`."""
        if self.answer is not None:
            return self.answer.status
        assert self._request is not None
        parts = self._request.parts or [self._request]
        queued = all(part.state is State.QUEUED for part in parts)
        return encode.QUEUED if queued else encode.RUNNING

    @property
    def pieces(self) -> Sequence[bytes]:
        """The object in its present state, as JSON in pieces."""
        if self.answer is not None:
            return self.answer.pieces
        return (msgspec.json.encode({"id": self.id, "status": self.status, "model": self.model.name}),)

    def submit(self) -> None:
        """Queue the request. Raises BatcherError; then the prediction is of no more use."""
        assert self._request is not None
        try:
            self.model.loaded_batcher.submit(self._request)
        except BatcherError:
            self._request = None  # they refer to each other
            raise

    def cancel(self) -> None:
        """Cancel the request. Harmless when it is finished."""
        if self._request is not None:
            self.model.loaded_batcher.cancel(self._request)
            self.finish(encode.cancelled(self.id, self.model.name))

    def finish(self, answer: Answer) -> None:
        """Wake the waiting requests with this answer; a store may keep a shorter one."""
        if self.answered is None:
            return
        # A kept prediction must not keep the tensors, nor, through the future, an answer that is too large.
        answered, self.answered, self._request = self.answered, None, None
        self.answer = answer
        if self.on_answer is not None:
            self.on_answer(self)
        answered.set_result(answer)


class PredictionRequest(Request):
    """A prediction's rows in the batcher."""

    __slots__ = ("_client", "_outputs", "_prediction", "_record")

    def __init__(
        self,
        prediction: Prediction,
        decoded: Decoded,
        tenant: Tenant | None,
        record: RequestRecord | None,
        client: Hashable,
    ) -> None:
        super().__init__(decoded.rows, decoded.row_shapes, decoded.payloads)
        self.priority = decoded.priority
        self.timeout_s = decoded.timeout_s
        self.partial = True
        self.tenant = tenant
        self._outputs = decoded.outputs
        self._prediction = prediction
        self._record = record
        self._client = client
        if record is not None:
            record.model = prediction.model.name
            record.rows = decoded.rows

    @property
    def source(self) -> Hashable:
        return self.tenant or self._client

    def done(self) -> None:
        if self._record is not None:
            self._record.ran(self)
        outputs = [index for index, _ in self._outputs]
        if self.error is None and is_long(self, outputs):
            encode_later(self, outputs, self._encode, self._finish)
        else:
            self._finish(self._encode(self))

    def _encode(self, request: Request) -> Answer:
        id_, model = self._prediction.id, self._prediction.model
        try:
            if request.error is None:
                return encode.done(id_, model.name, model.decoder.signature.outputs, self._outputs, request)
            return encode.failed(id_, model.name, request.error)
        except Problem as problem:
            return encode.failed(id_, model.name, problem)
        except Exception as error:
            log.exception("model %s: encoding prediction %s failed", model.name, id_)
            return encode.failed(id_, model.name, error)

    def _finish(self, answer: Answer) -> None:
        kind = None if answer.problem is None else answer.problem.kind
        status, slug = (200, "") if kind is None else (kind.status, kind.slug)
        model = self._prediction.model
        model.traffic.count(status, slug, time.monotonic() - self.enqueued_s)
        self._prediction.finish(answer)


class PredictionStore:
    """The kept predictions of a process."""

    def __init__(self, settings: ServerSettings) -> None:
        self._max_count = settings.kept_predictions
        self._max_bytes = settings.kept_bytes
        self._kept_s = settings.kept_s
        self._all: dict[str, Prediction] = {}
        self._by_key: dict[tuple[str, str], Prediction] = {}
        self._finished: dict[str, Prediction] = {}  # the oldest first
        self.size_bytes = 0
        self._finished_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._all)

    @property
    def unfinished(self) -> int:
        return len(self._all) - len(self._finished)

    def find(self, id_: str, subject: str) -> Prediction:
        """A subject's prediction. Raises the same Problem for an unknown, a dropped and another's id."""
        prediction = self._all.get(id_)
        if prediction is None or prediction.subject != subject:
            raise Problem("unknown-prediction", f"there is no prediction {id_!r}, or none any more")
        return prediction

    def has_key(self, subject: str, key: str) -> bool:
        """Return whether `join` would find a prediction, or a mismatch."""
        return (subject, key) in self._by_key

    def join(self, subject: str, key: str, digest: bytes) -> Prediction | None:
        """The prediction that was made with this key. Raises Problem if that was for another request."""
        prediction = self._by_key.get((subject, key))
        if prediction is None:
            return None
        assert prediction.idempotency is not None
        if prediction.idempotency[1] != digest:
            detail = "the Idempotency-Key came with another request before: path, Content-Type or body differ"
            raise Problem("idempotency-mismatch", detail)
        return prediction

    def check_room(self, tensor_bytes: int) -> None:
        """Raise Problem if a prediction with such tensors could not be kept now."""
        unfinished_bytes = self.size_bytes - self._finished_bytes
        limit = self._max_bytes - OVERHEAD_BYTES
        if tensor_bytes > limit:
            detail = f"the tensors have {tensor_bytes} bytes; those of a kept prediction may have {limit}"
            raise Problem("body-too-large", detail, body_bytes=tensor_bytes, limit_bytes=limit)
        if self.unfinished >= self._max_count or unfinished_bytes + tensor_bytes > limit:
            raise Problem(
                "too-many-predictions",
                f"{self.unfinished} kept predictions with {unfinished_bytes} bytes are not finished yet",
                limit=self._max_count,
                limit_bytes=self._max_bytes,
                retry_after_s=1,
            )

    def keep(self, prediction: Prediction, tensor_bytes: int, idempotency: tuple[str, bytes] | None) -> None:
        """Keep a prediction that was just submitted; `check_room` has found room for it."""
        prediction.kept_bytes = OVERHEAD_BYTES + tensor_bytes
        prediction.idempotency = idempotency
        prediction.on_answer = self._on_answer
        self._make_room(1, prediction.kept_bytes)
        self._all[prediction.id] = prediction
        self.size_bytes += prediction.kept_bytes
        if idempotency is not None:
            self._by_key[prediction.subject, idempotency[0]] = prediction

    def _on_answer(self, prediction: Prediction) -> None:
        answer = prediction.answer
        assert answer is not None
        self.size_bytes -= prediction.kept_bytes
        size = OVERHEAD_BYTES + answer.length
        room = self._max_bytes - (self.size_bytes - self._finished_bytes)
        if size > room:
            detail = f"the answer has {answer.length} bytes, more than could be kept"
            limit = room - OVERHEAD_BYTES
            problem = Problem("result-too-large", detail, body_bytes=answer.length, limit_bytes=limit)
            prediction.answer = encode.failed(prediction.id, prediction.model.name, problem)
            size = OVERHEAD_BYTES
        self._make_room(0, size)
        prediction.kept_bytes = size
        self.size_bytes += size
        self._finished_bytes += size
        self._finished[prediction.id] = prediction
        loop = asyncio.get_running_loop()
        prediction.finished_s = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._kept_s, self._drop_old)

    def _make_room(self, count: int, size: int) -> None:
        while self._finished and (
            len(self._all) + count > self._max_count or self.size_bytes + size > self._max_bytes
        ):
            self._drop(next(iter(self._finished.values())))

    def _drop_old(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._finished:
            oldest = next(iter(self._finished.values()))
            if oldest.finished_s + self._kept_s > loop.time():
                self._timer = loop.call_at(oldest.finished_s + self._kept_s, self._drop_old)
                return
            self._drop(oldest)

    def _drop(self, prediction: Prediction) -> None:
        del self._all[prediction.id]
        del self._finished[prediction.id]
        self.size_bytes -= prediction.kept_bytes
        self._finished_bytes -= prediction.kept_bytes
        if prediction.idempotency is not None:
            del self._by_key[prediction.subject, prediction.idempotency[0]]
