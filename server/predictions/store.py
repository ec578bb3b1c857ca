"""One prediction, from acceptance to its answer.

The store of predictions that are kept for their clients.

A prediction is kept when its client said that it will come back for it: by `Prefer: respond-async` or an
`Idempotency-Key`. Others live as long as the request that waits for them.

The store's bounds, which hold at every moment:

* at most `kept_predictions` in all, finished or not;
* at most `kept_bytes`, counting the tensors of one that is unfinished, the answer of one that is
  finished, and some for the rest of it;
* finished ones for `kept_s` at most, the oldest ones less where the room is needed.

Unfinished ones are never dropped: where they leave no room, nothing more is accepted. All methods run on
the event loop. The batcher answers everything that it accepted, also when it stops, so nothing here needs
to be told of the end.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from cobatch.batcher.request import Request, State
from cobatch.batcher.tenant import Tenant
from cobatch.server.http.problem import Problem
from cobatch.server.inference.model import Model
from cobatch.server.observability.record import RequestRecord
from cobatch.server.predictions import encode as v1_encode
from cobatch.server.predictions.decode import Decoded
from cobatch.server.predictions.encode import Answer
from cobatch.server.settings.schema import ServerSettings

log = logging.getLogger("cobatch.server")


class Prediction:
    """One prediction. `answer` is None until it is finished; `kept_bytes` is what it counts in a store."""

    def __init__(
        self,
        subject: str,
        model: Model,
        decoded: Decoded,
        tenant: Tenant | None = None,
        record: RequestRecord | None = None,
    ) -> None:
        # Long enough that nobody finds another's by trying.
        self.id = secrets.token_urlsafe(18)
        self.subject = subject
        self.answer: Answer | None = None
        self.idempotency: tuple[str, bytes] | None = None  # key and digest
        self.kept_bytes = 0
        self.finished_s = 0.0
        self.on_answer: Callable[[Prediction], None] | None = None
        self._model = model
        self._request: PredictionRequest | None = PredictionRequest(self, model, decoded, tenant, record)
        # To be waited for with `asyncio.wait`, which cancels nothing; None once `answer` is there.
        self.answered: asyncio.Future[Answer] | None = asyncio.get_running_loop().create_future()

    @property
    def model_name(self) -> str:
        """Its model's name."""
        return self._model.name

    @property
    def status(self) -> str:
        """One of the words of `server.predictions.encode`."""
        if self.answer is not None:
            return self.answer.status
        assert self._request is not None
        parts = self._request.parts or [self._request]
        waits = all(part.state is State.QUEUED for part in parts)
        return v1_encode.QUEUED if waits else v1_encode.RUNNING

    @property
    def text(self) -> bytes:
        """The object as it is now, as JSON."""
        if self.answer is not None:
            return self.answer.text
        return v1_encode.unfinished(self.id, self.status, self._model.name)

    def submit(self) -> None:
        """Into the queue. Raises BatcherError; then nothing has happened."""
        assert self._request is not None
        self._model.loaded_batcher.submit(self._request)

    def cancel(self) -> None:
        """Nobody wants it any more. Harmless when it is finished."""
        request = self._request
        if request is not None:
            self._model.loaded_batcher.cancel(request)
            self.settle(v1_encode.cancelled(self.id, self._model.name))

    def settle(self, answer: Answer) -> None:
        """It is finished; whoever waits is woken with this answer, whatever a store makes of it."""
        if self.answered is None:
            return
        # What is kept must not keep the tensors, nor through the future an answer too large to be kept.
        answered, self.answered, self._request = self.answered, None, None
        self.answer = answer
        if self.on_answer is not None:
            self.on_answer(self)
        answered.set_result(answer)


class PredictionRequest(Request):
    """A prediction's rows in the batcher."""

    __slots__ = ("_model", "_prediction", "_record", "_wants")

    def __init__(
        self,
        prediction: Prediction,
        model: Model,
        decoded: Decoded,
        tenant: Tenant | None,
        record: RequestRecord | None,
    ) -> None:
        super().__init__(decoded.rows, decoded.row_shapes, decoded.payloads)
        self.priority = decoded.priority
        self.timeout_s = decoded.timeout_s
        self.partial = True
        self.tenant = tenant
        self._prediction = prediction
        self._model = model
        self._record = record
        if record is not None:
            record.model = model.name
            record.rows = decoded.rows
        self._wants = decoded.outputs

    def done(self) -> None:
        id_, name = self._prediction.id, self._model.name
        if self._record is not None:
            self._record.ran(self)
        try:
            if self.error is None:
                specs = self._model.decoder.signature.outputs
                answer = v1_encode.done(id_, name, specs, self._wants, self)
            else:
                answer = v1_encode.failed(id_, name, self.error)
        except Exception as error:
            log.exception("model %s: encoding prediction %s failed", name, id_)
            answer = v1_encode.failed(id_, name, error)
        status, slug = 200, ""
        if answer.problem is not None:
            status, slug = answer.problem.kind.status, answer.problem.kind.slug
        self._model.traffic.count(status, slug, time.monotonic() - self.enqueued_s)
        self._prediction.settle(answer)


# What a kept prediction counts beside its tensors or answer; an answer that says it was too large fits in.
OVERHEAD_BYTES = 2048


class Predictions:
    """The kept ones of a process."""

    def __init__(self, settings: ServerSettings) -> None:
        self._most = settings.kept_predictions
        self._most_bytes = settings.kept_bytes
        self._kept_s = settings.kept_s
        self._all: dict[str, Prediction] = {}
        self._by_key: dict[tuple[str, str], Prediction] = {}
        self._finished: dict[str, Prediction] = {}  # the oldest first
        self._bytes = 0
        self._finished_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._all)

    @property
    def size_bytes(self) -> int:
        """What all together count."""
        return self._bytes

    @property
    def unfinished(self) -> int:
        """How many are not finished."""
        return len(self._all) - len(self._finished)

    def find(self, id_: str, subject: str) -> Prediction:
        """Raises Problem, the same whether there is none, or there was one, or it is another's."""
        prediction = self._all.get(id_)
        if prediction is None or prediction.subject != subject:
            raise Problem("unknown-prediction", f"there is no prediction {id_!r}, or none any more")
        return prediction

    def has_key(self, subject: str, key: str) -> bool:
        """Whether `join` would find one, or a mismatch."""
        return (subject, key) in self._by_key

    def join(self, subject: str, key: str, digest: bytes) -> Prediction | None:
        """The prediction that was made with this key. Raises Problem if for another request."""
        prediction = self._by_key.get((subject, key))
        if prediction is None:
            return None
        assert prediction.idempotency is not None
        if prediction.idempotency[1] != digest:
            raise Problem(
                "idempotency-mismatch",
                "the Idempotency-Key came with another request before: path, Content-Type or body differ",
            )
        return prediction

    def check_room(self, tensor_bytes: int) -> None:
        """Raises Problem if a prediction with such tensors could not be kept now."""
        unfinished_bytes = self._bytes - self._finished_bytes
        size = OVERHEAD_BYTES + tensor_bytes
        if size > self._most_bytes:
            raise Problem(
                "body-too-large",
                f"the tensors have {tensor_bytes} bytes; those of a prediction that is kept may have "
                f"{self._most_bytes - OVERHEAD_BYTES}",
                body_bytes=tensor_bytes,
                limit_bytes=self._most_bytes - OVERHEAD_BYTES,
            )
        if self.unfinished >= self._most or unfinished_bytes + size > self._most_bytes:
            raise Problem(
                "too-many-predictions",
                f"{self.unfinished} kept predictions with {unfinished_bytes} bytes are not finished yet",
                limit=self._most,
                limit_bytes=self._most_bytes,
                retry_after_s=1,
            )

    def keep(self, prediction: Prediction, tensor_bytes: int, idempotency: tuple[str, bytes] | None) -> None:
        """Keep one that was just submitted; `check_room` has said that there is room for it."""
        prediction.kept_bytes = OVERHEAD_BYTES + tensor_bytes
        prediction.idempotency = idempotency
        prediction.on_answer = self._on_answer
        self._make_room(1, prediction.kept_bytes)
        self._all[prediction.id] = prediction
        self._bytes += prediction.kept_bytes
        if idempotency is not None:
            self._by_key[prediction.subject, idempotency[0]] = prediction

    def _on_answer(self, prediction: Prediction) -> None:
        answer = prediction.answer
        assert answer is not None
        self._bytes -= prediction.kept_bytes
        size = OVERHEAD_BYTES + len(answer.text)
        room = self._most_bytes - (self._bytes - self._finished_bytes)
        if size > room:
            prediction.answer = _too_large(prediction, len(answer.text), room - OVERHEAD_BYTES)
            size = OVERHEAD_BYTES
        self._make_room(0, size)
        prediction.kept_bytes = size
        self._bytes += size
        self._finished_bytes += size
        self._finished[prediction.id] = prediction
        loop = asyncio.get_running_loop()
        prediction.finished_s = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._kept_s, self._drop_old)

    def _make_room(self, more: int, more_bytes: int) -> None:
        while self._finished and (
            len(self._all) + more > self._most or self._bytes + more_bytes > self._most_bytes
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
        self._bytes -= prediction.kept_bytes
        self._finished_bytes -= prediction.kept_bytes
        if prediction.idempotency is not None:
            del self._by_key[prediction.subject, prediction.idempotency[0]]


def _too_large(prediction: Prediction, size: int, limit: int) -> Answer:
    problem = Problem(
        "result-too-large",
        f"the answer has {size} bytes, more than could be kept",
        body_bytes=size,
        limit_bytes=limit,
    )
    return v1_encode.failed(prediction.id, prediction.model_name, problem)
