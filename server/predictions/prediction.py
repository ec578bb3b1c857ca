"""One prediction, from acceptance to its answer."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.tenant import Tenant
from cobatch.server.inference.model import Model
from cobatch.server.observability.record import Record
from cobatch.server.predictions import encode as v1_encode
from cobatch.server.predictions.decode import Work
from cobatch.server.predictions.encode import Answer

log = logging.getLogger("cobatch.server")


class Prediction:
    """One prediction. `answer` is None until it is finished; `kept_bytes` is what it counts in a store."""

    def __init__(
        self,
        subject: str,
        model: Model,
        work: Work,
        tenant: Tenant | None = None,
        record: Record | None = None,
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
        self._request: PredictionRequest | None = PredictionRequest(self, model, work, tenant, record)
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
        work: Work,
        tenant: Tenant | None,
        record: Record | None,
    ) -> None:
        super().__init__(work.rows, work.row_shapes, work.payloads)
        self.priority = work.priority
        self.timeout_s = work.timeout_s
        self.partial = True
        self.tenant = tenant
        self._prediction = prediction
        self._model = model
        self._record = record
        if record is not None:
            record.model = model.name
            record.rows = work.rows
        self._wants = work.wants

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
