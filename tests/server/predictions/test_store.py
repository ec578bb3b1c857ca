"""The store of kept predictions in virtual time: its bounds, when predictions are dropped, keys."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.engines.errors import EngineRunError
from cobatch.server.http.problem import Problem
from cobatch.server.inference.model import Model
from cobatch.server.predictions.decode import Decoded
from cobatch.server.predictions.store import OVERHEAD_BYTES, Prediction, PredictionStore
from cobatch.server.settings.schema import ModelSettings, ServerSettings
from cobatch.server.v2.decode import Decoder
from tests.support.examples import examples
from tests.support.virtual.loop import FakeEngine, FakeWorker, make_batcher, run

RUN_S = 0.010
KEPT_S = 100.0
EPSILON_S = 1e-6


def make_model(engine: FakeEngine | None = None) -> Model:
    """A loaded model in virtual time: y = 2 * x, 8 rows a batch, 10 ms each."""
    engine = engine or FakeEngine()
    model = Model(ModelSettings(path="fake"))
    model.decoder = Decoder(engine.signature, 1 << 20)
    model.batcher = make_batcher(FakeWorker(engine))
    return model


def make_store(most: int = 4, most_bytes: int = 1 << 20) -> PredictionStore:
    return PredictionStore(ServerSettings(kept_predictions=most, kept_bytes=most_bytes, kept_s=KEPT_S))


def work(rows: int = 1, width: int = 1) -> Decoded:
    tensors = np.ones((rows, width), np.int64).tobytes()
    return Decoded(rows, ((width,),), [tensors], ((0, None),), 0, None)


def keep(
    store: PredictionStore,
    model: Model,
    subject: str = "me",
    key: str | None = None,
    timeout_s: float | None = None,
    **sizes: int,
) -> Prediction:
    """Submit a prediction and keep it, as the route does. Raises Problem."""
    decoded = work(**sizes)._replace(timeout_s=timeout_s)
    prediction = Prediction(subject, model, decoded)
    store.check_room(decoded.bytes)
    prediction.submit()
    store.keep(prediction, decoded.bytes, None if key is None else (key, b"digest"))
    return prediction


def gone(store: PredictionStore, prediction: Prediction) -> bool:
    try:
        return store.find(prediction.id, prediction.subject) is not prediction
    except Problem:
        return True


def test_finished_predictions_are_kept_for_their_time() -> None:
    async def main() -> None:
        store, model = make_store(), make_model()
        first = keep(store, model, key="k")
        assert first.status == "queued"
        await asyncio.sleep(RUN_S / 2)
        second = keep(store, model)
        assert (first.status, second.status) == ("running", "queued")
        await asyncio.sleep(1)
        assert (first.status, second.status) == ("completed", "completed")
        await asyncio.sleep(first.finished_s + KEPT_S - EPSILON_S - asyncio.get_running_loop().time())
        assert not gone(store, first)
        assert store.has_key("me", "k")
        await asyncio.sleep(2 * EPSILON_S)
        assert gone(store, first)
        assert not store.has_key("me", "k")
        assert not gone(store, second)
        await asyncio.sleep(RUN_S + EPSILON_S)
        assert gone(store, second)
        assert (len(store), store.size_bytes) == (0, 0)

    run(main())


def test_only_finished_predictions_make_room_the_oldest_first() -> None:
    async def main() -> None:
        store, model = make_store(most=3), make_model()
        old = [keep(store, model) for _ in range(3)]
        assert store.unfinished == 3
        with pytest.raises(Problem) as refused:
            keep(store, model)
        assert refused.value.kind.slug == "too-many-predictions"
        await asyncio.sleep(1)
        new = [keep(store, model) for _ in range(2)]
        assert [gone(store, one) for one in old + new] == [True, True, False, False, False]
        await asyncio.sleep(1)
        assert not any(gone(store, one) for one in new)

    run(main())


def test_bytes_of_unfinished_predictions_count() -> None:
    async def main() -> None:
        width = 1000
        store, model = make_store(most=100, most_bytes=2 * (OVERHEAD_BYTES + 8 * width)), make_model()
        keep(store, model, width=width)
        keep(store, model, width=width)
        with pytest.raises(Problem) as refused:
            keep(store, model)
        assert refused.value.kind.slug == "too-many-predictions"
        with pytest.raises(Problem) as never:
            keep(store, model, width=4 * width)
        assert never.value.kind.slug == "body-too-large"

    run(main())


def test_a_too_large_answer_reaches_the_waiting_request_but_is_not_kept() -> None:
    async def main() -> None:
        # One element is 8 bytes of tensor, but here 20 and more as text.
        engine = FakeEngine()
        store = make_store(most_bytes=OVERHEAD_BYTES + 8 * 1000)
        model = make_model(engine)
        tensors = np.full((1, 1000), 2**61, np.int64).tobytes()
        prediction = Prediction("me", model, Decoded(1, ((1000,),), [tensors], ((0, None),), 0, None))
        prediction.submit()
        store.keep(prediction, len(tensors), None)
        assert prediction.answered is not None
        answer = await prediction.answered
        assert answer.status == "completed"
        assert prediction.status == "failed"
        assert b"/problems/result-too-large" in b"".join(prediction.pieces)
        assert store.size_bytes == OVERHEAD_BYTES
        assert len(b"".join(prediction.pieces)) < OVERHEAD_BYTES

    run(main())


def test_another_subjects_and_unknown_predictions_are_not_found() -> None:
    async def main() -> None:
        store, model = make_store(), make_model()
        mine = keep(store, model, subject="me", key="k")
        yours = keep(store, model, subject="you", key="k")
        assert mine.id != yours.id
        assert len(mine.id) >= 24
        assert store.find(mine.id, "me") is mine
        assert store.join("you", "k", b"digest") is yours
        assert store.join("you", "other", b"digest") is None
        messages = set()
        for id_, subject in ((mine.id, "you"), (yours.id, "me"), ("no such", "me")):
            with pytest.raises(Problem) as problem:
                store.find(id_, subject)
            messages.add(problem.value.detail.replace(repr(id_), "ID"))
        assert len(messages) == 1
        with pytest.raises(Problem) as mismatch:
            store.join("me", "k", b"other")
        assert mismatch.value.kind.slug == "idempotency-mismatch"

    run(main())


def test_cancelling_is_final_and_frees_the_queue() -> None:
    async def main() -> None:
        store, model = make_store(), make_model()
        running = keep(store, model, rows=3)
        await asyncio.sleep(RUN_S / 2)
        queued = keep(store, model, rows=3)
        for prediction in (running, queued, queued):
            prediction.cancel()
            assert prediction.status == "cancelled"
        assert model.loaded_batcher.queue.rows == 0
        assert store.unfinished == 0
        await asyncio.sleep(1)
        assert {running.status, queued.status} == {"cancelled"}
        assert model.loaded_batcher.counters.cancelled == 2

    run(main())


def test_expired_rows_are_missing_from_an_answer() -> None:
    async def main() -> None:
        store, model = make_store(), make_model()
        keep(store, model, rows=8)
        await asyncio.sleep(RUN_S / 10)
        # Its first part is packed behind the running batch, the others wait until they expire.
        late = keep(store, model, rows=20, timeout_s=RUN_S / 2)
        lost = keep(store, model, rows=20, timeout_s=RUN_S / 2)
        await asyncio.sleep(RUN_S / 2 - EPSILON_S)
        assert (late.status, lost.status) == ("running", "queued")
        await asyncio.sleep(2 * EPSILON_S)
        assert (late.status, lost.status) == ("running", "expired")
        await asyncio.sleep(1)
        object_ = msgspec.json.decode(b"".join(late.pieces))
        assert object_["status"] == "incomplete"
        details = object_["incomplete_details"]
        assert (details["reason"], details["rows"]) == ("expired", [[8, 19]])
        assert object_["outputs"]["y"]["data"] == [[2]] * 8 + [None] * 12
        assert msgspec.json.decode(b"".join(lost.pieces))["error"]["timeout_ms"] == pytest.approx(5)

    run(main())


operations = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), st.integers(1, 20), st.integers(1, 300)),
        st.tuples(st.just("cancel"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("pass"), st.sampled_from([1, 5, 20, 5_000, 60_000, 100_000]), st.just(0)),
    ),
    max_size=60,
)


@examples(60)
@given(
    operations,
    st.integers(1, 6),
    st.integers(OVERHEAD_BYTES + 1000, 60_000),
    st.sets(st.integers(0, 10), max_size=3),
)
def test_the_bounds_always_hold(
    operations: list[tuple[str, int, int]], most: int, most_bytes: int, bad: set[int]
) -> None:
    async def main() -> None:
        engine = FakeEngine()
        batches = 0

        def fails(rows: Any) -> EngineRunError | None:
            nonlocal batches
            batches += 1
            return EngineRunError("bad") if batches % 11 in bad else None

        engine.fails = fails
        store, model = make_store(most, most_bytes), make_model(engine)
        made: list[Prediction] = []

        def check() -> None:
            assert len(store) <= most
            assert store.size_bytes <= most_bytes
            unfinished = [one for one in made if one.answer is None]
            assert store.unfinished == len(unfinished)
            assert not any(gone(store, one) for one in unfinished)
            found = [one for one in made if not gone(store, one)]
            assert len(found) == len(store)
            assert sum(one.kept_bytes for one in found) == store.size_bytes
            assert all(store.has_key("me", f"key-{made.index(one)}") for one in found)

        for kind, number, width in operations:
            if kind == "keep":
                with contextlib.suppress(Problem):
                    made.append(keep(store, model, key=f"key-{len(made)}", rows=number, width=width))
            elif kind == "cancel" and made:
                made[number % len(made)].cancel()
            elif kind == "pass":
                await asyncio.sleep(number / 1000)
            check()
        await asyncio.sleep(10)
        check()
        assert store.unfinished == 0
        await asyncio.sleep(KEPT_S + EPSILON_S)
        assert (len(store), store.size_bytes) == (0, 0)
        assert all(gone(store, one) for one in made)

    run(main())
