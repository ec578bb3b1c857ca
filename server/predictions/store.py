"""The store of predictions that are kept for their clients.

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

from cobatch.server.http.problem import Problem
from cobatch.server.predictions import encode as v1_encode
from cobatch.server.predictions.encode import Answer
from cobatch.server.predictions.prediction import Prediction
from cobatch.server.settings.schema import ServerSettings

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
