"""Predictions that outlive their request: fetched later, awaited, cancelled, joined by a key."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from cobatch.batcher.request import Request
from cobatch.engines.errors import EngineRunError
from tests.support.http.predicting import GATE, began, gated, leave, rows_of, slug

KEY = {"Idempotency-Key": "one"}
ASYNC = {"Prefer": "respond-async"}
WAIT = {"Prefer": "wait=20"}


async def test_from_queued_to_running_to_completed() -> None:
    async with gated() as (app, engine):
        first = await app.later(1)
        answer = await app.predict("gate", rows_of(2, top_k=1), ASYNC)
        assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
        assert answer.json() == {"id": answer.json()["id"], "status": "queued", "model": "gate"}
        assert await began(engine) in ([1], [1, 2])
        assert (await app.client.get(first)).json()["status"] == "running"
        queued = [await app.later(n) for n in range(3, 6)]
        waiting = asyncio.create_task(app.client.get(queued[-1], headers=WAIT))
        engine.release()
        done = await waiting
        assert (done.status_code, done.headers["preference-applied"]) == (200, "wait=20")
        assert done.headers["cache-control"] == "no-store"
        assert done.json()["status"] == "completed"
        assert done.json()["outputs"]["y"]["data"] == [[10]]
        second = (await app.client.get(answer.headers["location"], headers=WAIT)).json()
        assert second["outputs"]["y"]["top_k"] == [[{"index": 0, "score": 4}]]
        assert (await app.client.get(queued[-1])).json() == done.json()


async def test_a_split_prediction_runs_once_its_first_part_does() -> None:
    async with gated() as (app, engine):
        location = await app.later(*range(8))
        await began(engine)
        assert (await app.client.get(location)).json()["status"] == "running"
        engine.release()
        assert (await app.client.get(location, headers=WAIT)).json()["usage"]["rows"] == 8


async def test_waits_are_bounded_and_malformed_ones_ignored() -> None:
    async with gated(max_wait_s=0) as (app, _):
        location = await app.later(1)
        bounded = await app.client.get(location, headers=WAIT)
        assert bounded.headers["preference-applied"] == "wait=0"
        assert bounded.json()["status"] in ("queued", "running")
        for prefer in ("wait", "wait=-1", "wait=1.5", "wait=x", "wait=" + "9" * 100, "return=minimal"):
            answer = await app.client.get(location, headers={"Prefer": prefer})
            assert answer.status_code == 200
            assert "preference-applied" not in answer.headers
        quoted = await app.client.get(location, headers={"Prefer": 'a="b", WAIT="7"; c=d, wait=1'})
        assert quoted.headers["preference-applied"] == "wait=0"


async def test_respond_async_with_a_wait_answers_within_it() -> None:
    async with gated(hold=False) as (app, _):
        answer = await app.predict("gate", rows_of(1), {"Prefer": "respond-async, wait=20"})
        assert answer.status_code == 200
        assert answer.headers["preference-applied"] == "wait=20"
        assert answer.json()["status"] == "completed"
        kept = await app.client.get(f"/v1/predictions/{answer.json()['id']}")
        assert kept.json() == answer.json()


async def test_a_failed_prediction_is_an_object_with_its_error() -> None:
    async with gated() as (app, engine):
        engine.fails = lambda rows: EngineRunError("secret")
        location = await app.later(1)
        engine.release()
        answer = await app.client.get(location, headers=WAIT)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        object_ = answer.json()
        assert object_.keys() == {"id", "status", "model", "error"}
        assert object_["status"] == "failed"
        assert (object_["error"]["type"], object_["error"]["status"]) == ("/problems/run-failed", 500)
        assert "secret" not in answer.text


async def test_an_expired_prediction() -> None:
    async with gated() as (app, engine):
        first = await app.later(1, 2, 3, 4)
        await began(engine)
        second = await app.later(1, 2, 3, 4)  # packed, in the engine's second slot
        soon: Any = {"deadline_ms": 1}
        answer = await app.predict("gate", rows_of(1, **soon))
        assert (answer.status_code, slug(answer)) == (504, "expired")
        assert answer.json()["timeout_ms"] == 1
        assert answer.json()["prediction"]["status"] == "expired"
        location = await app.later(1, **soon)
        object_ = (await app.client.get(location, headers=WAIT)).json()
        assert (object_["status"], object_["error"]["status"]) == ("expired", 504)
        engine.release()
        for running in (first, second):
            assert (await app.client.get(running, headers=WAIT)).json()["status"] == "completed"


async def test_cancelling_is_idempotent_and_wakes_waiting_requests() -> None:
    async with gated() as (app, engine):
        await app.later(1, 2, 3, 4)
        await began(engine)
        queued = await app.later(5, headers=KEY)
        joined = asyncio.create_task(app.predict("gate", rows_of(5), KEY))
        watching = asyncio.create_task(app.client.get(queued, headers=WAIT))
        await asyncio.sleep(0)
        for _ in range(2):
            answer = await app.client.delete(queued)
            assert answer.status_code == 200
            assert answer.json() == {"id": answer.json()["id"], "status": "cancelled", "model": "gate"}
        assert (await watching).json() == answer.json()
        conflict = await joined
        assert (conflict.status_code, slug(conflict)) == (409, "cancelled")
        assert conflict.json()["prediction"] == answer.json()
        engine.release()
        location = await app.later(7)
        done = await app.client.get(location, headers=WAIT)
        assert (await app.client.delete(location)).json() == done.json()
        assert [5] not in engine.ran


async def test_only_its_subject_sees_a_prediction() -> None:
    async with gated(hold=False) as (app, _):
        location = await app.later(1, headers={"Subject": "me"} | KEY)
        for subject in ({"Subject": "you"}, {}):
            for method in ("GET", "DELETE"):
                answer = await app.client.request(method, location, headers=subject)
                assert (answer.status_code, slug(answer)) == (404, "unknown-prediction")
        assert await app.later(2, headers={"Subject": "you"} | KEY) != location
        mine = await app.client.get(location, headers={"Subject": "me"} | WAIT)
        assert mine.json()["status"] == "completed"


# Idempotency


async def test_the_same_key_joins() -> None:
    async with gated() as (app, engine):
        location = await app.later(1, headers=KEY)
        assert await app.later(1, headers=KEY) == location
        waiting = [asyncio.create_task(app.predict("gate", rows_of(1), KEY)) for _ in range(3)]
        await began(engine)
        engine.release()
        answers = [(await one).json() for one in waiting]
        again = (await app.predict("gate", rows_of(1), KEY)).json()
        assert all(answer == again for answer in answers)
        assert location.endswith(again["id"])
        assert engine.ran == [[1]]


async def test_a_key_of_another_request_is_refused() -> None:
    async with gated(hold=False) as (app, engine):
        await app.predict("gate", rows_of(1), KEY)
        other = await app.predict("gate", rows_of(2), KEY)
        assert (other.status_code, slug(other)) == (422, "idempotency-mismatch")
        data = (1).to_bytes(8, "little")
        raw = await app.client.post(
            GATE, content=data, headers={"content-type": "application/octet-stream"} | KEY
        )
        assert slug(raw) == "idempotency-mismatch"
        assert engine.ran == [[1]]


async def test_a_forms_boundary_does_not_matter() -> None:
    async with gated(hold=False) as (app, engine):
        ids = set()
        for _ in range(2):
            # httpx chooses another boundary each time.
            answer = await app.client.post(GATE, files={"x": (None, "[[1]]")}, headers=KEY)
            ids.add(answer.json()["id"])
        assert len(ids) == 1
        other = await app.client.post(GATE, files={"x": (None, "[[2]]")}, headers=KEY)
        assert slug(other) == "idempotency-mismatch"
        assert engine.ran == [[1]]


@pytest.mark.parametrize("key", [b"", b"a" * 256, b"a\tb", "ä".encode()])
async def test_invalid_keys(key: bytes) -> None:
    async with gated(hold=False) as (app, _):
        headers = {b"Idempotency-Key": key, b"Content-Type": b"application/json"}
        answer = await app.client.post(GATE, json=rows_of(1), headers=headers)
        assert slug(answer) == "bad-parameter"


async def test_a_refused_request_does_not_occupy_the_key() -> None:
    async with gated() as (app, engine):
        assert slug(await app.predict("gate", {"inputs": {}}, KEY)) == "missing-tensor"
        running = await app.later(1, 1, 1, 1)
        await began(engine)
        # One of these may go to the engine's second slot, the other waits: eight more have no room.
        others = [await app.later(*[row] * 4) for row in (2, 3)]
        assert slug(await app.predict("gate", rows_of(*[4] * 8), KEY)) == "queue-full"
        engine.release()
        for location in (running, *others):
            await app.client.get(location, headers=WAIT)
        answer = await app.predict("gate", rows_of(5), KEY)
        assert answer.json()["outputs"]["y"]["data"] == [[10]]
        # A known key is answered even when nothing new is accepted.
        app.inference.draining = True
        assert (await app.predict("gate", rows_of(5), KEY)).json() == answer.json()
        refused = await app.predict("gate", rows_of(5), {"Idempotency-Key": "another"})
        assert (refused.status_code, slug(refused)) == (503, "draining")


# Disconnects, bounds, shutdown


async def test_a_disconnect_cancels() -> None:
    async with gated() as (app, engine):
        await leave(app, GATE, rows_of(1), engine, {})
        assert app.inference.models["gate"].loaded_batcher.counters.cancelled == 1


async def test_a_key_leads_back_to_the_answer_after_a_disconnect() -> None:
    async with gated() as (app, engine):
        await leave(app, GATE, rows_of(2), engine, KEY)
        engine.release()
        answer = await app.predict("gate", rows_of(2), KEY)
        assert answer.json()["outputs"]["y"]["data"] == [[4]]
        assert engine.ran == [[2]]
        assert app.inference.models["gate"].loaded_batcher.counters.cancelled == 0


async def test_a_disconnect_does_not_cancel_a_kept_prediction() -> None:
    async with gated() as (app, engine):
        await leave(app, GATE, rows_of(1), engine, {"prefer": "respond-async, wait=20"})
        engine.release()
        assert app.inference.models["gate"].loaded_batcher.counters.cancelled == 0


async def test_a_cancelled_handler_cancels_its_prediction() -> None:
    async with gated() as (app, engine):
        asking = asyncio.create_task(app.predict("gate", rows_of(1)))
        await began(engine)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert app.inference.models["gate"].loaded_batcher.counters.cancelled == 1


async def test_the_limit_of_kept_predictions() -> None:
    async with gated(kept_predictions=2) as (app, engine):
        kept = [await app.later(1), await app.later(2)]
        refused = await app.predict("gate", rows_of(3), ASYNC)
        assert (refused.status_code, slug(refused)) == (429, "too-many-predictions")
        assert refused.headers["retry-after"] == "1"
        assert slug(await app.predict("gate", rows_of(3), KEY)) == "too-many-predictions"
        plain = asyncio.create_task(app.predict("gate", rows_of(4)))
        engine.release()
        assert (await plain).status_code == 200
        for location in kept:
            assert (await app.client.get(location, headers=WAIT)).json()["status"] == "completed"
        await app.later(5)
        assert slug(await app.client.get(kept[0])) == "unknown-prediction"
        assert (await app.client.get(kept[1])).status_code == 200


async def test_a_prediction_without_key_or_respond_async_is_not_kept() -> None:
    async with gated(hold=False) as (app, _):
        answer = await app.predict("gate", rows_of(1))
        assert slug(await app.client.get(f"/v1/predictions/{answer.json()['id']}")) == "unknown-prediction"


async def test_draining_answers_or_fails_unfinished_predictions(caplog: pytest.LogCaptureFixture) -> None:
    async with gated() as (app, engine):
        batcher = app.inference.models["gate"].loaded_batcher
        accepted = asyncio.Event()
        submit = batcher.submit

        def notice(request: Request) -> None:
            submit(request)
            accepted.set()

        running = await app.later(1, 1, 1, 1)
        await began(engine)
        waiting = asyncio.create_task(app.client.get(running, headers=WAIT))
        batcher.__dict__["submit"] = notice
        asking = asyncio.create_task(app.predict("gate", rows_of(1)))
        await accepted.wait()
        with caplog.at_level(logging.CRITICAL):
            await batcher.drain(0)
        assert (await waiting).json()["error"]["type"] == "/problems/abandoned"
        abandoned = await asking
        assert (abandoned.status_code, slug(abandoned)) == (503, "abandoned")
        assert abandoned.headers["connection"] == "close"
        engine.release()


async def test_large_answers_are_compressed() -> None:
    async with gated(hold=False, compress_min_bytes=100) as (app, engine):
        engine.answer_width = 1000
        message = {"inputs": {"x": [[1, 1]]}}
        answer = await app.predict("gate", message, {"Accept-Encoding": "gzip"})
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.json()["outputs"]["y"]["shape"] == [1, 1000]
        location = (await app.predict("gate", message, ASYNC)).headers["location"]
        kept = await app.client.get(location, headers=WAIT | {"Accept-Encoding": "deflate"})
        assert kept.headers["content-encoding"] == "deflate"
        assert kept.json()["outputs"]["y"]["data"] == [[2] * 1000]


async def test_a_large_body_with_a_key_is_hashed_in_a_thread() -> None:
    async with gated(hold=False) as (app, engine):
        blanks = b" " * (2 << 20)
        body = b'{"inputs": {"x": [[1]]}}' + blanks
        headers = {"content-type": "application/json"} | KEY
        ids = {(await app.client.post(GATE, content=body, headers=headers)).json()["id"] for _ in range(2)}
        assert len(ids) == 1
        other = await app.client.post(GATE, content=body + b" ", headers=headers)
        assert slug(other) == "idempotency-mismatch"
        assert engine.ran == [[1]]
