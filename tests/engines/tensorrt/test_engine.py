"""The TensorRT engine over the fake GPU: real PyCUDA, stand-ins for TensorRT's classes.

At the end of each test the `cuda` fixture checks that no rule was broken and no object is left.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from cobatch.engines.base import Array
from cobatch.engines.errors import EngineLoadError, EngineRunError
from cobatch.engines.tensorrt.engine import TensorRTEngine
from tests.support.gpu.engine import WithWorker, cuda, engine_of, floats, opened, plan_of, run, start
from tests.support.gpu.fakecuda.control import FakeCuda
from tests.support.models import models

__all__ = ["cuda"]  # the fixture


@pytest.fixture(params=["lazy", "threaded"])
def mode(request: pytest.FixtureRequest, cuda: FakeCuda) -> Iterator[str]:
    """Run queued work when it is waited for ("lazy"), or at once on its own thread ("threaded")."""
    cuda.mode(request.param)
    yield request.param
    cuda.mode("lazy")


@pytest.fixture(params=[True, False], ids=["graphs", "calls"])
def graphs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_every_number_of_rows_gets_its_own_outputs(cuda: FakeCuda, mode: str, graphs: bool) -> None:
    with opened(engine_of(models.negate(), graphs=graphs)) as engine:
        for rows in (1, 8, 3, 5, 2, 1, 7):
            for slot in (0, 1):
                x = np.random.default_rng(rows + slot).random((rows, 3), np.float32)
                (y,) = run(engine, x, slot=slot)
                assert np.array_equal(y, -x)


TYPES = {
    "FP32": (TensorProto.FLOAT, np.float32),
    "FP16": (TensorProto.FLOAT16, np.float16),
    "BF16": (TensorProto.BFLOAT16, np.uint16),
    "INT8": (TensorProto.INT8, np.int8),
    "INT32": (TensorProto.INT32, np.int32),
    "INT64": (TensorProto.INT64, np.int64),
    "UINT8": (TensorProto.UINT8, np.uint8),
    "BOOL": (TensorProto.BOOL, np.bool_),
}


@pytest.mark.parametrize("datatype", TYPES)
def test_types(cuda: FakeCuda, datatype: str, graphs: bool) -> None:
    onnx_type, dtype = TYPES[datatype]
    with opened(engine_of(models.identity(onnx_type, 5), graphs=graphs)) as engine:
        specs = engine.signature.inputs + engine.signature.outputs
        assert [(spec.datatype, spec.shape) for spec in specs] == [(datatype, (5,))] * 2
        x: Array = np.frombuffer(np.random.default_rng(1).bytes(15 * dtype().itemsize), dtype).reshape(3, 5)
        if datatype == "BOOL":
            x = np.array([[True, False, True, True, False]] * 3)
        assert run(engine, x)[0].tobytes() == x.tobytes()


def test_several_inputs_and_outputs(cuda: FakeCuda, mode: str, graphs: bool) -> None:
    with opened(engine_of(models.two_inputs(), graphs=graphs)) as engine:
        x, k = floats([1, 2], [3, 4], [5, 6]), np.array([[10], [20], [30]], np.int64)
        outputs = dict(zip([spec.name for spec in engine.signature.outputs], run(engine, x, k), strict=True))
        assert outputs["total"].tolist() == [[11, 12], [23, 24], [35, 36]]
        assert outputs["count"].tolist() == [[20], [40], [60]]


def test_a_slot_is_packed_while_the_other_runs(cuda: FakeCuda, mode: str, graphs: bool) -> None:
    with opened(engine_of(models.negate(), graphs=graphs)) as engine:
        batches = [np.full((4, 3), number, np.float32) for number in range(6)]
        start(engine, 0, batches[0])
        for number, batch in enumerate(batches[1:], 1):
            start(engine, number % 2, batch)
            assert np.array_equal(engine.wait((number - 1) % 2)[0], -batches[number - 1])
        assert np.array_equal(engine.wait(1)[0], -batches[-1])


def test_inputs_are_page_locked_and_reused(cuda: FakeCuda) -> None:
    with opened(engine_of(models.negate())) as engine:
        (first,) = engine.inputs(0, 1, ((3,),))
        (again,) = engine.inputs(0, 8, ((3,),))
        assert again is first
        assert first.shape == (8, 3)
        assert first.flags.c_contiguous
        assert not np.shares_memory(first, engine.inputs(1, 1, ((3,),))[0])
        del first, again


# The cost of a batch


RUNS = {
    "calls": {"cuMemcpyHtoDAsync": 1, "enqueueV3": 1, "cuMemcpyDtoHAsync": 1},
    "graphs": {"cuGraphLaunch": 1},
}


def test_calls_of_the_driver_per_batch(cuda: FakeCuda, graphs: bool) -> None:
    with opened(engine_of(models.negate(), graphs=graphs)) as engine:
        x = floats([1, 2, 3], [4, 5, 6])
        cuda.forget_calls()
        for batch in range(10):
            run(engine, x, slot=batch % 2)
        expected = {**RUNS["graphs" if graphs else "calls"], "cuEventRecord": 1, "cuEventSynchronize": 1}
        assert calls_of(cuda) == Counter({name: 10 * count for name, count in expected.items()})


def calls_of(cuda: FakeCuda) -> Counter[str]:
    """Remove the calls that TensorRT's stand-in makes."""
    calls = cuda.calls()
    del calls["cuStreamIsCapturing"]
    return calls


def test_alternating_buckets_need_no_additional_call(cuda: FakeCuda, graphs: bool) -> None:
    with opened(engine_of(models.negate(), graphs=graphs)) as engine:
        counts = []
        for rows in (1, 8, 2, 8, 3):
            cuda.forget_calls()
            run(engine, np.ones((rows, 3), np.float32))
            counts.append(calls_of(cuda).total())
        assert set(counts) == {3 if graphs else 5}


class Calls:
    """Counts calls in our engines' code by name; a profiler for `sys.setprofile`.

    It does not see PyCUDA's functions, which are objects of Boost.Python: the fake driver counts those.
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.on = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.on and event in {"call", "c_call"} and "/cobatch/engines/" in frame.f_code.co_filename:
            self.seen[frame.f_code.co_qualname if event == "call" else argument.__name__] += 1


def test_python_calls_per_batch_of_the_engine(cuda: FakeCuda, graphs: bool) -> None:
    with opened(engine_of(models.negate(), graphs=graphs)) as engine:
        x = floats([1, 2, 3])
        run(engine, x)
        engine.inputs(0, 1, ((3,),))[0][:1] = x
        calls = Calls()
        calls.on = True
        sys.setprofile(calls)
        engine.enqueue(0, 1, ((3,),))
        engine.wait(0)
        sys.setprofile(None)
        launch = {"Graph.launch": 1} if graphs else {"Slot._enqueue": 1}
        # Looking up the batch's layout is the only call of C.
        assert calls.seen == {
            "TensorRTEngine.enqueue": 1,
            "Slot.enqueue": 1,
            "get": 1,
            **launch,
            "TensorRTEngine.wait": 1,
            "Slot.wait": 1,
        }


def test_python_calls_per_batch_of_the_workers_thread(cuda: FakeCuda, graphs: bool) -> None:
    calls = Calls()
    threading.setprofile(calls)
    try:
        with_worker = WithWorker(engine_of(models.negate(), graphs=graphs))
    finally:
        threading.setprofile(None)
    for batch in range(4):
        with_worker.run(batch % 2)
    calls.on = True
    for batch in range(20):
        with_worker.run(batch % 2)
    calls.on = False
    with_worker.end()
    assert calls.seen.total() <= 20 * 36, calls.seen


def test_batches_run_under_the_worker(cuda: FakeCuda, mode: str, graphs: bool) -> None:
    with_worker = WithWorker(engine_of(models.negate(), graphs=graphs))
    assert set(with_worker.worker.warmup_us) == {1, 2, 4, 8}
    for number in range(10):
        assert with_worker.run(number % 2, number, rows=number % 8 + 1).tolist() == [[-number] * 3] * (
            number % 8 + 1
        )
    with_worker.end()


# Buckets, profiles, shapes


@pytest.mark.parametrize(
    ("buckets", "rows", "expected"),
    [
        (None, 3, 4),
        (None, 8, 8),
        ((2, 6), 1, 2),
        ((2, 6), 3, 6),
        ((2, 6), 7, 8),
        ((64, 3), 4, 8),
    ],
)
def test_batches_are_rounded_up_to_a_bucket(
    cuda: FakeCuda, buckets: tuple[int, ...] | None, rows: int, expected: int
) -> None:
    with opened(engine_of(models.negate(), buckets=buckets, graphs=False)) as engine:
        x = np.ones((rows, 3), np.float32)
        assert run(engine, x)[0].shape == (rows, 3)
        assert bucket_of(engine, rows, ((3,),)) == expected


def bucket_of(engine: TensorRTEngine, rows: int, row_shapes: tuple[tuple[int, ...], ...]) -> int:
    """Return the bucket that a batch of this many rows ran with."""
    layout, _ = engine._slots[0]._entries[rows, row_shapes]
    return len(layout.outputs[0])


def test_a_plan_for_smaller_batches_lowers_the_limit(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(engine_of(models.negate(), max_batch_size=64, built_for=6)) as engine:
        assert engine.max_batch_size == 6
        assert "the plan accepts at most 6 rows, max_batch_size is 64" in caplog.text
        assert run(engine, np.ones((6, 3), np.float32))[0].shape == (6, 3)


def test_a_plan_for_larger_batches_is_used_up_to_the_limit(cuda: FakeCuda) -> None:
    with opened(engine_of(models.negate(), max_batch_size=4, built_for=64)) as engine:
        assert engine.max_batch_size == 4
        assert engine.inputs(0, 1, ((3,),))[0].shape == (4, 3)


def test_a_fixed_batch_runs_at_its_size(cuda: FakeCuda, graphs: bool) -> None:
    with opened(engine_of(models.negate(batch=5), graphs=graphs)) as engine:
        assert engine.signature.fixed_batch == engine.max_batch_size == 5
        x = floats([1, 2, 3], [4, 5, 6])
        assert np.array_equal(run(engine, x)[0], -x)
        assert bucket_of(engine, 2, ((3,),)) == 5


def test_several_profiles(cuda: FakeCuda, graphs: bool) -> None:
    profiles = ("x:1x3/1x3/2x3", "x:6x3/8x3/12x3")
    with opened(engine_of(models.negate(), *profiles, max_batch_size=16, graphs=graphs)) as engine:
        assert engine.max_batch_size == 12
        for rows in (1, 2, 3, 7, 12):
            x = np.random.default_rng(rows).random((rows, 3), np.float32)
            assert np.array_equal(run(engine, x)[0], -x)
        # Between the profiles the next bucket that a profile accepts is used.
        assert [bucket_of(engine, rows, ((3,),)) for rows in (1, 2, 3, 7, 12)] == [1, 2, 8, 8, 12]


def test_of_profiles_that_fit_the_nearest_is_used(cuda: FakeCuda) -> None:
    """By the shapes that their kernels were chosen for, as in Triton."""
    profiles = ("x:1x1/8x64/8x64", "x:1x1/1x4/8x64", "x:1x1/8x4/8x64")
    with opened(engine_of(models.negate(width="width"), *profiles)) as engine:
        chosen = {
            (rows, width): engine._slots[0]._plan.buckets.choose(rows, ((width,),))[1]
            for rows, width in ((8, 60), (8, 33), (1, 5), (8, 3), (5, 4), (8, 30))
        }
        assert chosen == {(8, 60): 0, (8, 33): 2, (1, 5): 1, (8, 3): 2, (5, 4): 2, (8, 30): 2}
        for rows, width in chosen:
            x = np.random.default_rng(width).random((rows, width), np.float32)
            assert np.array_equal(run(engine, x)[0], -x)


def test_rows_of_varying_shape(cuda: FakeCuda, mode: str) -> None:
    with opened(engine_of(models.negate(width="width"), "x:1x2/4x16/8x32")) as engine:
        assert engine.signature.inputs[0].shape == (-1,)
        for rows, width in ((3, 5), (8, 32), (1, 2), (3, 6), (3, 5), (7, 32)):
            x = np.random.default_rng(width).random((rows, width), np.float32)
            assert np.array_equal(run(engine, x, slot=rows % 2)[0], -x)


def test_a_row_that_fits_no_profile_is_refused_by_name(cuda: FakeCuda) -> None:
    with opened(engine_of(models.negate(width="width"), "x:1x2/4x16/8x32")) as engine:
        for width in (1, 33):
            with pytest.raises(EngineRunError, match=rf"input 'x' of shape \[1, {width}\] fits no profile"):
                engine.inputs(0, 1, ((width,),))
        assert run(engine, np.ones((1, 32), np.float32))[0].shape == (1, 32)


def test_profiles_for_short_and_long_rows(cuda: FakeCuda) -> None:
    profiles = ("x:1x1/8x8/8x8", "x:1x9/2x64/2x64")
    with opened(engine_of(models.negate(width="width"), *profiles)) as engine:
        for rows, width in ((8, 8), (2, 64), (1, 20), (3, 2)):
            x = np.random.default_rng(width).random((rows, width), np.float32)
            assert np.array_equal(run(engine, x)[0], -x)
        with pytest.raises(EngineRunError, match="input 'x' of shape"):
            start(engine, 0, np.ones((3, 64), np.float32))


def test_alternating_shapes_on_one_context(cuda: FakeCuda, mode: str) -> None:
    """With variable rows a context's shapes are set again when the last batch had other shapes."""
    with opened(engine_of(models.negate(width="width"), "x:1x1/4x8/8x16")) as engine:
        for turn in range(12):
            width = (3, 16, 5)[turn % 3]
            rows = np.arange(2 * width, dtype=np.float32).reshape(2, width) + turn
            (answer,) = run(engine, rows, slot=turn % 2)
            assert np.array_equal(answer, -rows)


def test_an_engine_is_closed_while_a_batch_runs(cuda: FakeCuda, mode: str, graphs: bool) -> None:
    """Its memory is not freed while it runs. No caller waits for its outputs."""
    with opened(engine_of(models.negate(width=4), graphs=graphs)) as engine:
        start(engine, 0, floats([1, 2, 3, 4]))
        start(engine, 1, floats([5, 6, 7, 8]))


def test_the_number_of_cached_shapes_is_limited(cuda: FakeCuda) -> None:
    with opened(engine_of(models.negate(width="width"), "x:1x1/8x8/8x600")) as engine:
        for width in range(1, 600):
            x = np.full((1, width), width, np.float32)
            assert np.array_equal(run(engine, x)[0], -x)
        assert len(engine._slots[0]._entries) <= 256
        assert len(engine._slots[0]._arrays) <= 256


def test_bytes_that_are_no_plan_are_refused_with_tensorrts_reason(cuda: FakeCuda) -> None:
    engine = TensorRTEngine("broken.plan", 8, plan_source=lambda: b"nonsense")
    why = r"cannot load the plan of broken\.plan \(the plan has 8 bytes"
    with pytest.raises(EngineLoadError, match=why), opened(engine):
        pass


def test_a_missing_gpu_is_an_error(cuda: FakeCuda) -> None:
    engine = TensorRTEngine("model.plan", 8, device=7, plan_source=lambda: plan_of(models.negate()))
    with pytest.raises(EngineLoadError, match="there is no GPU 7: CUDA sees 2"), opened(engine):
        pass


@pytest.mark.parametrize("device", [0, 1])
def test_it_runs_on_the_selected_gpu(cuda: FakeCuda, device: int) -> None:
    with opened(engine_of(models.negate(), device=device)) as engine:
        assert engine._device.cuda.Context.get_device() == engine._device.cuda.Device(device)
        assert run(engine, floats([1, 2, 3]))[0].tolist() == [[-1, -2, -3]]


def test_two_engines_on_one_gpu(cuda: FakeCuda) -> None:
    with opened(engine_of(models.negate())) as one, opened(engine_of(models.negate())) as other:
        start(one, 0, floats([1, 2, 3]))
        start(other, 0, floats([4, 5, 6]))
        assert other.wait(0)[0].tolist() == [[-4, -5, -6]]
        assert one.wait(0)[0].tolist() == [[-1, -2, -3]]


def test_without_cuda_bindings_batches_are_enqueued_call_by_call(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with opened(engine_of(models.negate())) as engine:
        cuda.forget_calls()
        assert run(engine, floats([1, 2, 3]))[0].tolist() == [[-1, -2, -3]]
        assert cuda.calls()["enqueueV3"] == 1


def test_without_pycuda_the_error_names_the_package(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    engine = TensorRTEngine("model.plan", 8, plan_source=lambda: b"")
    with pytest.raises(
        EngineLoadError, match=r"PyCUDA cannot be used here.*pip install 'cobatch\[tensorrt\]'"
    ):
        engine.open()
    engine.close()


def test_outputs_in_use_outlive_the_engine(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    with_worker = WithWorker(engine_of(models.negate()))
    assert with_worker.run(0).tolist() == [[-1, -1, -1]]
    assert with_worker.outcome is not None
    assert with_worker.outcome.outputs is not None
    (output,) = with_worker.outcome.outputs
    with_worker.end()
    # Destroying a context frees its memory, so this one is kept.
    assert "outputs are still in use; the GPU's context is kept" in caplog.text
    assert cuda.live_objects()["context"] == 1
    assert output.tolist() == [[-1, -1, -1]]
    del output
    assert cuda.violations() == []
    cuda.reset()
