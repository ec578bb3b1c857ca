"""Steps of pipelines: rows go into home's queues, and arrays come back."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import gc
import os
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from cobatch import StepError, model
from cobatch.engines.errors import EngineLoadError, EngineRunError
from cobatch.engines.link import slab
from cobatch.server.links import waiting
from cobatch.server.links.hub import Hub
from cobatch.server.links.steps import CALLER, Caller, models_of
from cobatch.server.settings.auth import AuthSettings, TenantRule
from cobatch.server.settings.schema import ModelSettings, PadSettings
from tests.server.inference.test_padding import text_model
from tests.support.auth.protected import settings_in
from tests.support.descriptors import nothing_stays_open
from tests.support.fronts.stepping import stepping
from tests.support.http.serving import GatedEngine
from tests.support.models import models
from tests.support.python_models import faulty

gate = model("gate")


def rows(*values: int) -> dict[str, Any]:
    return {"x": np.array([[value] for value in values], np.int64)}


async def kind_of(step: Any) -> str:
    with pytest.raises(StepError) as caught:
        await step
    return caught.value.kind


async def test_rows_go_there_and_outputs_come_back() -> None:
    async with stepping() as both:
        caller = both.caller()
        outputs = await gate(**rows(1, 2, 3))
        assert list(outputs) == ["y"]
        assert outputs["y"].tolist() == [[2], [4], [6]]
        (times,) = caller.steps
        assert (times.model, times.rows, times.kind) == ("gate", 3, "")
        moments = (times.called_s, times.dispatched_s, times.started_s, times.finished_s)
        assert sorted(moments) == list(moments)
        assert moments[-1] <= time.monotonic()


async def test_outputs_are_the_callers_own() -> None:
    async with stepping() as both:
        both.caller()
        first = await gate(**rows(1))
        before = first["y"].copy()
        first["y"] += 1  # may be written to
        again = [await gate(**rows(n)) for n in range(40)]
        assert first["y"].tolist() == (before + 1).tolist()
        assert [one["y"].item() for one in again] == [2 * n for n in range(40)]


async def test_steps_and_other_requests_share_a_batch() -> None:
    engine = GatedEngine(8)
    async with stepping(engine=engine) as both:
        both.caller()
        engine.hold()
        first = asyncio.create_task(gate(**rows(0)))
        await asyncio.to_thread(engine.began.get)
        body = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [7]}]}
        other = asyncio.create_task(both.home.http.post("/v2/models/gate/infer", json=body))
        others = [asyncio.create_task(gate(**rows(n))) for n in (1, 2, 3)]
        await both.until(lambda: both.batcher().queue.rows == 4)
        engine.release()
        assert [(await one)["y"].item() for one in (first, *others)] == [0, 2, 4, 6]
        assert (await other).json()["outputs"][0]["data"] == [14]
        assert sorted(map(sorted, engine.ran)) == [[0], [1, 2, 3, 7]]


async def test_wrong_names_and_datatypes_are_the_handlers_own_fault() -> None:
    async with stepping() as both:
        both.caller()
        with pytest.raises(TypeError, match="no input 'z'"):
            await gate(z=np.zeros((1, 1), np.int64))
        with pytest.raises(TypeError, match="'x' is missing"):
            await gate()
        with pytest.raises(TypeError, match=r"must be of int64 \(INT64\), got float32"):
            await gate(x=np.zeros((1, 1), np.float32))
        with pytest.raises(LookupError, match="there is no model 'gote'; the server has 'gate'"):
            await model("gote")(x=1)
        assert both.end.unknown({"gate", "gote"}) == "there is no model 'gote'; the server has 'gate'"
        assert both.end.unknown({"gate"}) is None
        assert not both.batcher().counters.accepted


def test_models_of_other_handlers_in_a_file_are_not_asked_for() -> None:
    class One:
        own = model("own")

    class Other:
        others = model("others")

    class Derived(One):
        alone = model("alone")

    shared = model("shared")
    assert models_of(One()) & {"own", "others", "alone", "shared"} == {"own", "shared"}
    assert models_of(Derived()) & {"own", "others", "alone", "shared"} == {"own", "alone", "shared"}
    assert Other.others.name in models_of(Other())
    assert shared.name in models_of(lambda text: text)


def test_a_model_that_a_call_asks_for_is_not_kept() -> None:
    model("for one call")
    gc.collect()
    assert "for one call" not in models_of(object())


async def test_wrong_shapes_are_problems() -> None:
    async with stepping() as both:
        both.caller()
        assert await kind_of(gate(x=np.zeros((1, 1, 1), np.int64))) == "wrong-shape"
        assert await kind_of(gate(x=np.zeros((0, 1), np.int64))) == "wrong-shape"
        assert await kind_of(gate(x=np.zeros((0,), np.int64))) == "wrong-shape"
        assert both.idle


async def test_a_step_of_more_rows_than_the_queue_holds_is_refused() -> None:
    async with stepping(max_queue_rows=3) as both:
        both.caller()
        assert await kind_of(gate(**rows(1, 2, 3, 4))) == "too-many-rows"
        assert both.idle


async def test_steps_wait_for_room_in_a_full_queue() -> None:
    engine = GatedEngine(2)
    async with stepping(engine=engine, max_queue_rows=2) as both:
        both.caller()
        engine.hold()
        steps = [asyncio.create_task(gate(**rows(n))) for n in range(12)]
        await both.until(lambda: both.hub._room.waiting >= 6)
        engine.release()
        assert [(await step)["y"].item() for step in steps] == [2 * n for n in range(12)]
        assert sorted(chain(*engine.ran)) == list(range(12))
        assert both.batcher().counters.refused == 0
        assert both.idle


async def test_steps_that_are_bundled_wait_for_room_one_by_one() -> None:
    engine = GatedEngine(8)
    specs = engine.signature.inputs + engine.signature.outputs
    x, y = [dataclasses.replace(spec, shape=(1,)) for spec in specs]
    engine.signature = dataclasses.replace(engine.signature, inputs=(x,), outputs=(y,))
    async with stepping(engine=engine, max_queue_rows=2) as both:
        both.caller()
        answers = await asyncio.gather(*[gate(**rows(n)) for n in range(8)])
        assert [answer["y"].item() for answer in answers] == [2 * n for n in range(8)]
        assert both.idle


async def test_a_large_step_that_waits_is_not_overtaken() -> None:
    engine = GatedEngine(4)
    async with stepping(engine=engine, max_queue_rows=4) as both:
        both.caller()
        engine.hold()
        first = [asyncio.create_task(gate(**rows(0)))]
        await asyncio.to_thread(engine.began.get)
        first += [asyncio.create_task(gate(**rows(n))) for n in (1, 1, 1, 1, 1, 1, 1)]
        await both.until(lambda: both.hub._room.waiting)
        large = asyncio.create_task(gate(**rows(2, 2, 2, 2)))
        await both.until(lambda: both.hub._room.waiting >= 2)
        small = asyncio.create_task(gate(**rows(3)))
        await both.until(lambda: len(both.link.open) >= 9)
        engine.release()
        await asyncio.gather(*first, large, small)
        ran = list(chain(*engine.ran))
        assert ran.index(2) < ran.index(3)


async def test_the_deadline_ends_a_step_that_waits_for_room() -> None:
    engine = GatedEngine(2)
    async with stepping(engine=engine, max_queue_rows=1) as both:
        both.caller()
        engine.hold()
        held = [asyncio.create_task(gate(**rows(n))) for n in range(5)]
        await both.until(lambda: both.hub._room.waiting)
        caller = Caller(both.end, deadline_s=time.monotonic() + 0.02)
        CALLER.set(caller)
        assert await kind_of(gate(**rows(9))) == "expired"
        assert caller.steps[0].kind == "expired"
        assert await kind_of(gate(**rows(9))) == "expired"  # at once
        engine.release()
        await asyncio.gather(*held)
        assert [9] not in engine.ran
        assert both.idle


async def test_more_than_the_room_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOST_WAITING", 2)
    engine = GatedEngine(1)
    async with stepping(engine=engine, max_queue_rows=1) as both:
        both.caller()
        engine.hold()
        steps = [asyncio.create_task(gate(**rows(n))) for n in range(10)]
        await both.until(lambda: any(step.done() for step in steps))
        engine.release()
        ended = await asyncio.gather(*steps, return_exceptions=True)
        assert {one.kind for one in ended if isinstance(one, StepError)} == {"queue-full"}
        assert both.idle


async def test_steps_wait_for_shared_memory() -> None:
    engine = GatedEngine(64)
    async with stepping(engine=engine, slab_bytes=1 << 16) as both:
        both.caller()
        engine.hold()
        width = 30_000 // 8
        steps = [asyncio.create_task(gate(x=np.full((1, width), n, np.int64))) for n in range(9)]
        await both.until(lambda: len(both.end._uplink._waiting) == 7)
        steps[4].cancel()
        engine.release()
        answers = await asyncio.gather(*steps, return_exceptions=True)
        assert isinstance(answers[4], asyncio.CancelledError)
        assert [one["y"][0, 0] for one in answers if isinstance(one, dict)] == [0, 2, 4, 6, 10, 12, 14, 16]
        await both.until(lambda: both.idle)
        assert await kind_of(gate(x=np.zeros((1, 9000), np.int64))) == "body-too-large"


@pytest.mark.parametrize("waits", [False, True])
async def test_a_cancelled_step_leaves_the_queue(waits: bool) -> None:
    engine = GatedEngine(1)
    async with stepping(engine=engine, max_queue_rows=1 if waits else 1000) as both:
        both.caller()
        engine.hold()
        first = asyncio.create_task(gate(**rows(0)))
        await asyncio.to_thread(engine.began.get)
        others = [asyncio.create_task(gate(**rows(n))) for n in range(1, 7)]
        await both.until(lambda: len(both.link.open) == 7)
        for other in others:
            other.cancel()
        await both.until(lambda: len(both.link.open) <= 2)  # one is packed ahead
        engine.release()
        await first
        await both.until(lambda: both.idle)
        assert len(engine.ran) <= 2


async def test_the_end_of_a_call_ends_its_steps() -> None:
    engine = GatedEngine(1)
    async with stepping(engine=engine) as both:
        caller = both.caller()
        engine.hold()
        steps = [asyncio.create_task(gate(**rows(n))) for n in range(5)]
        blocking = asyncio.create_task(asyncio.to_thread(gate.run, **rows(7)))
        await both.until(lambda: len(both.link.open) == 6)
        caller.end()
        ended = await asyncio.gather(*steps, blocking, return_exceptions=True)
        assert {type(one).__name__ for one in ended} == {"CancelledError"}
        assert [step.kind for step in caller.steps] == ["cancelled"] * 6
        with pytest.raises(RuntimeError, match="its request has ended"):
            await gate(**rows(8))
        engine.release()
        await both.until(lambda: both.idle)


async def test_a_handler_in_a_thread_waits_for_its_steps() -> None:
    async with stepping() as both:
        caller = both.caller()
        outputs = await asyncio.to_thread(gate.run, **rows(4))
        assert outputs["y"].tolist() == [[8]]
        assert len(caller.steps) == 1
        with pytest.raises(TypeError):
            await asyncio.to_thread(gate.run)
        with pytest.raises(RuntimeError, match="await the model instead"):
            gate.run(**rows(4))


async def test_a_model_needs_a_call() -> None:
    with pytest.raises(RuntimeError, match="only be used while a pipeline handles a request"):
        await gate(**rows(1))
    assert repr(gate) == "model('gate')"


async def test_the_failing_row_alone_fails() -> None:
    engine = GatedEngine(8)

    def fails(x: Any) -> EngineRunError | None:
        return EngineRunError("poison") if (x == 13).any() else None

    engine.fails = fails
    async with stepping(engine=engine) as both:
        both.caller()
        ended = await asyncio.gather(*[gate(**rows(n)) for n in (1, 13, 2, 3)], return_exceptions=True)
        assert [one["y"].item() for one in ended if isinstance(one, dict)] == [2, 4, 6]
        assert isinstance(ended[1], StepError)
        assert (ended[1].kind, ended[1].status, ended[1].model) == ("input-rejected", 422, "gate")
        assert "reference" in ended[1].members
        await both.until(lambda: both.idle)


def limits(folder: Path, **rule: Any) -> AuthSettings:
    auth: AuthSettings = settings_in(folder, tenants=(TenantRule(tenant="a", **rule),))[0]
    return auth


async def test_the_limits_of_a_tenant_count_the_call_and_not_its_steps(tmp_path: Path) -> None:
    engine = GatedEngine(4)
    async with stepping(engine=engine, auth=limits(tmp_path, max_concurrent=1, requests_per_s=0.001)) as both:
        assert both.home.inference.auth is not None
        tenant = both.home.inference.auth.tenants.by_rule("a", 0)
        tenant.enter(1, time.monotonic())
        both.caller(tenant=("a", 0))
        engine.hold()
        steps = [asyncio.create_task(gate(**rows(n))) for n in range(3)]
        await asyncio.to_thread(engine.began.get)
        assert tenant.open_requests == 1
        engine.release()
        await asyncio.gather(*steps)
        assert tenant.open_requests == 1
        assert (tenant.usage.answered, tenant.usage.rows) == (0, 3)
        assert tenant.usage.engine_s > 0


async def test_a_step_waits_for_its_tenants_queued_rows(tmp_path: Path) -> None:
    engine = GatedEngine(1)
    async with stepping(engine=engine, auth=limits(tmp_path, max_queue_rows=2)) as both:
        engine.hold()
        both.caller(tenant=("a", 0))
        steps = [asyncio.create_task(gate(**rows(n))) for n in range(8)]
        await both.until(lambda: both.hub._room.waiting >= 2)
        both.caller(tenant=("b", 1))
        other = asyncio.create_task(gate(**rows(9)))  # need not wait for the first tenant's room
        await both.until(lambda: both.batcher().queue.rows >= 3)
        engine.release()
        assert [(await step)["y"].item() for step in [*steps, other]] == [0, 2, 4, 6, 8, 10, 12, 14, 18]


async def test_the_end_of_the_process_empties_queue_and_room() -> None:
    engine = GatedEngine(1)
    async with stepping(engine=engine, max_queue_rows=2) as both:
        both.caller()
        engine.hold()
        steps = [asyncio.create_task(gate(**rows(n))) for n in range(8)]
        await both.until(lambda: len(both.link.open) == 8)
        both.end._uplink._channel._sock.shutdown(2)  # as the kernel does for a process that is killed
        await both.until(lambda: both.ended)
        assert not both.link.open
        assert not both.hub._room.waiting
        assert not both.batcher().queue.rows
        ended = await asyncio.gather(*steps, return_exceptions=True)
        assert {one.kind for one in ended if isinstance(one, StepError)} == {"starting"}
        engine.release()
        await both.until(lambda: not both.batcher().running_batches)


async def test_a_step_waits_for_its_model_to_be_loaded() -> None:
    engine = GatedEngine()
    engine.may_open.clear()
    async with stepping(engine=engine, ready=False) as both:
        caller = both.caller()
        step = asyncio.create_task(gate(**rows(4)))
        blocking = asyncio.create_task(asyncio.to_thread(gate.run, **rows(5)))
        await both.until(lambda: len(caller.open) == 2)
        other = both.caller()
        left = asyncio.create_task(gate(**rows(6)))
        await both.until(lambda: other.open)
        other.end()
        with pytest.raises(asyncio.CancelledError):
            await left
        engine.may_open.set()
        assert (await step)["y"].item() == 8
        assert (await blocking)["y"].item() == 10


async def test_a_model_that_cannot_be_loaded_is_refused() -> None:
    engine = GatedEngine()
    engine.may_open.clear()
    async with stepping(engine=engine, ready=False) as both:
        both.caller()
        step = asyncio.create_task(gate(**rows(4)))
        both.end._models["gate"].load_error = EngineLoadError("no memory")
        both.end._settle()
        assert await kind_of(step) == "load-failed"


async def test_without_home_steps_are_refused() -> None:
    engine = GatedEngine()
    engine.may_open.clear()
    async with stepping(engine=engine, ready=False) as both:
        both.caller()
        step = asyncio.create_task(gate(**rows(4)))
        await both.until(lambda: CALLER.get().open)  # type: ignore[union-attr]  # it is set
        both.link.end("home ends")
        assert await kind_of(step) == "starting"
        assert await kind_of(gate(**rows(1))) == "starting"


async def test_nothing_is_left_after_many_calls() -> None:
    async with stepping(slab_bytes=1 << 22) as both:
        for width in (1, 9000) * 60:
            caller = both.caller()
            outputs = await asyncio.gather(*[gate(x=np.full((2, width), n, np.int64)) for n in range(3)])
            assert [one["y"][0, 0] for one in outputs] == [0, 2, 4]
            caller.end()
        del outputs, caller
        CALLER.set(None)
        await both.until(lambda: both.idle)
        gc.collect()
        left = [one for one in gc.get_objects() if isinstance(one, Caller)]
        assert len(left) <= 1  # in the context of a timer of home, which is another process otherwise


# Models of every kind


async def test_strings(tmp_path: Path) -> None:
    path = models.write(tmp_path, models.equal_strings())
    async with stepping(ModelSettings(path=path, name="equal")) as both:
        both.caller()
        equal = model("equal")
        outputs = await equal(x=np.array([["a", "a"], ["a", "ä"], [b"\xc3\xa4", "ä"]], object))
        assert outputs["y"].tolist() == [[True], [False], [True]]
        assert (await equal(x=[["b", "b"]]))["y"].tolist() == [[True]]
        with pytest.raises(TypeError, match="must be of strings or bytes"):
            await equal(x=np.zeros((1, 2)))
    path = models.write(tmp_path, models.identity(TensorProto.STRING))
    async with stepping(ModelSettings(path=path, name="texts")) as both:
        both.caller()
        assert (await model("texts")(x=[["é", "b"]]))["y"].tolist() == [["é".encode(), b"b"]]


async def test_masks_and_padding(tmp_path: Path) -> None:
    pad = PadSettings(input="ids", mask="mask", buckets=(4, 8), outputs={"tokens": 0})
    settings = ModelSettings(path=models.write(tmp_path, text_model()), name="text", pad=(pad,))
    async with stepping(settings) as both:
        both.caller()
        text = model("text")
        outputs = await asyncio.gather(*[text(ids=np.arange(n)[None]) for n in (1, 3, 6)])
        assert [one["tokens"].shape for one in outputs] == [(1, 1, 3), (1, 3, 3), (1, 6, 3)]
        with_mask = await text(ids=np.arange(3)[None], mask=np.ones((1, 3), np.int64))
        np.testing.assert_allclose(with_mask["mean"], outputs[1]["mean"], rtol=1e-6)


async def test_a_model_in_python_that_ends_its_process() -> None:
    settings = ModelSettings(
        python="faulty.py:Faulty", python_path=str(Path(faulty.__file__).parent), name="faulty"
    )
    async with stepping(settings) as both:
        both.caller()
        step = model("faulty")
        ended = await asyncio.gather(
            *[step(x=np.array([[n]])) for n in (1, faulty.EXITS, 2, faulty.REFUSED)], return_exceptions=True
        )
        kinds = [one.kind if isinstance(one, StepError) else "" for one in ended]
        assert kinds == ["", "run-failed", "", "refused-by-model"]
        assert [one["y"].item() for one in ended if isinstance(one, dict)] == [2, 4]
        assert (await step(x=np.array([[5]])))["y"].item() == 10


async def test_batching_off(tmp_path: Path) -> None:
    path = models.write(tmp_path, models.negate())
    async with stepping(ModelSettings(path=path, name="negate", max_batch_size=0)) as both:
        both.caller()
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        outputs = await model("negate")(x=x)
        assert [one.tolist() for one in outputs.values()] == [(-x).tolist()]


async def test_long_rows(tmp_path: Path) -> None:
    path = models.write(tmp_path, models.identity(TensorProto.FLOAT, "width"))
    async with stepping(ModelSettings(path=path, name="long"), slab_bytes=1 << 24) as both:
        both.caller()
        x = np.random.default_rng(1).normal(size=(2, 500_000)).astype(np.float32)
        outputs = await asyncio.gather(*[model("long")(x=x * n) for n in (1, 2)])
        for n, one in zip((1, 2), outputs, strict=True):
            (y,) = one.values()
            np.testing.assert_array_equal(y, x * n)
        await both.until(lambda: both.idle)


async def test_too_many_open_files_leave_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stepping() as both:
        for count in range(4):
            with nothing_stays_open(), monkeypatch.context() as patched:
                left = iter([os.memfd_create("some") for _ in range(count)])

                def create(name: str, size: int, left: Iterator[int] = left) -> int:
                    try:
                        return next(left)
                    except StopIteration:
                        raise OSError(errno.EMFILE, "too many open files") from None

                patched.setattr(slab, "create", create)
                patched.setattr(slab, "for_reading", lambda fd: create("", 0))
                with pytest.raises(OSError, match="too many open files"):
                    both.hub.open_steps(lambda *arguments: None)
        assert both.hub.links == {both.link}


async def test_a_page_that_cannot_be_made_is_made_for_the_next_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that no heartbeat reaches would look like that of a home that hangs."""
    async with stepping() as both:
        hub = Hub(both.home.inference)

        def dup(descriptor: int) -> int:
            raise OSError(errno.EMFILE, "too many open files")

        with nothing_stays_open(), monkeypatch.context() as patched:
            patched.setattr(os, "dup", dup)
            with pytest.raises(OSError, match="too many open files"):
                hub.open_steps(lambda *arguments: None)
        for descriptor in hub.open_steps(lambda *arguments: None):
            os.close(descriptor)
        assert [page.heartbeat_s > 0 for page in hub.pages] == [True]
        hub.close()
