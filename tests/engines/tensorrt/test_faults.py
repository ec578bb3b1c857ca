"""Faults of a GPU: at load with a reason, at run for one batch, and sticky errors of CUDA."""

from __future__ import annotations

import contextlib
import importlib
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cobatch.engines.base import Batching
from cobatch.engines.errors import EngineDeadError, EngineError, EngineLoadError, EngineRunError
from cobatch.engines.tensorrt.engine import TensorRTEngine
from cobatch.engines.worker import Worker
from tests.support.gpu.engine import WAIT_S, cuda, engine_of, floats, opened, run, start, start_worker
from tests.support.gpu.fakecuda.control import ILLEGAL_ADDRESS, LAUNCH_FAILED, OUT_OF_MEMORY, FakeCuda
from tests.support.models import models

__all__ = ["cuda"]  # the fixture

X = floats([1, 2, 3], [4, 5, 6])


@pytest.fixture(params=[True, False], ids=["graphs", "calls"])
def graphs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def plant(method: str, text: str, code: str = "FAILED_EXECUTION") -> None:
    """Make the next call of this method of TensorRT fail with this text."""
    importlib.import_module("tensorrt.planting").plant(method, text, code)


def engine_with(model: bytes, max_batch_size: int = 8, **options: Any) -> TensorRTEngine:
    """Return an engine of a plan with unusual properties."""
    plan = importlib.import_module("tensorrt.plan").make_plan(model, max_batch_size=max_batch_size, **options)
    return TensorRTEngine("odd.plan", max_batch_size, plan_source=lambda: plan, batching=Batching("on"))


def refused(engine: TensorRTEngine) -> str:
    """Return the error of loading it."""
    with pytest.raises(EngineLoadError) as caught, opened(engine):
        pass
    return str(caught.value)


# At load: by name


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"dtype": "FP8"}, "has type FP8, which the protocol does not have"),
        ({"dtype": "INT4"}, "has type INT4, which the protocol does not have"),
        ({"format": "CHW4"}, "has format CHW4; only row-major linear can be served"),
        ({"is_shape": True}, "is a shape tensor, whose values are sizes of other tensors"),
        ({"location": "HOST"}, "lies in host memory"),
    ],
)
@pytest.mark.parametrize("tensor", ["x", "y"])
def test_tensors_that_cannot_be_served_are_named(
    cuda: FakeCuda, tensor: str, odd: dict[str, Any], reason: str
) -> None:
    what = "input" if tensor == "x" else "output"
    assert f"{what} {tensor!r} {reason}" in refused(engine_with(models.negate(), tensors={tensor: odd}))


def test_an_output_whose_shape_depends_on_the_data_is_named(cuda: FakeCuda) -> None:
    why = refused(engine_with(models.value_sets_width()))
    assert "output 'y' has a shape that depends on the data, [" in why


def test_inputs_whose_first_axes_differ_are_named(cuda: FakeCuda) -> None:
    assert "the inputs' first axes differ" in refused(engine_with(models.two_inputs(first=4, second=8)))


@pytest.mark.parametrize("model", [models.total_only(), models.two_rows_each()])
def test_outputs_that_do_not_follow_the_batch_axis_are_named(cuda: FakeCuda, model: bytes) -> None:
    assert "output 'y'" in refused(engine_with(model))


def test_a_runtime_that_cannot_initialise_cuda_is_not_used(cuda: FakeCuda) -> None:
    """It is handed out all the same, and its first use would end the process."""
    plant("Runtime", "CUDA initialization failure with error: 35", "INVALID_STATE")
    why = refused(engine_with(models.negate()))
    assert why.startswith("tensorrt ")
    assert "cannot run here: Error Code" in why
    assert "CUDA initialization failure with error: 35" in why


def test_the_error_of_a_plan_that_does_not_load_quotes_tensorrt(cuda: FakeCuda) -> None:
    plant(
        "deserialize_cuda_engine",
        "The engine plan file is not compatible with this version",
        "INVALID_CONFIG",
    )
    why = refused(engine_with(models.negate()))
    assert "The engine plan file is not compatible with this version" in why


# At load: out of memory


def test_out_of_memory_names_the_need_and_a_batch_size_that_fits(cuda: FakeCuda) -> None:
    wide = models.negate(width=1000)
    cuda.memory(2_500_000)
    why = refused(engine_of(wide, max_batch_size=512))
    match = re.search(r"max_batch_size = (\d+) would fit", why)
    assert match is not None, why
    needs = r"Besides its weights the model needs [\d.]+ MiB for batches of 512 rows"
    assert re.search(rf"GPU 0 is out of memory: .* for .*{needs}", why)
    assert re.search(r"[\d.]+ MiB were free", why)
    # The suggested size fits, and a third more does not.
    rows = int(match[1])
    with opened(engine_of(wide, max_batch_size=rows)) as engine:
        assert run(engine, np.ones((rows, 1000), np.float32))[0].shape == (rows, 1000)
    cuda.reset()
    cuda.memory(2_500_000)
    refused(engine_of(wide, max_batch_size=rows * 4 // 3))


@pytest.mark.parametrize("nth", range(2, 8))
def test_any_allocation_may_fail(cuda: FakeCuda, nth: int) -> None:
    # Twice in a row, since PyCUDA collects garbage and tries again. The first allocation is the weights.
    for _ in range(2):
        cuda.inject("cuMemAlloc", OUT_OF_MEMORY, nth)
    assert "GPU 0 is out of memory" in refused(engine_of(models.negate()))


def test_a_profile_that_tensorrt_refuses_is_named(cuda: FakeCuda) -> None:
    plant("set_optimization_profile_async", "no tactic for it", "INVALID_ARGUMENT")
    why = refused(engine_with(models.negate()))
    assert "TensorRT does not accept profile 0" in why
    assert "no tactic for it" in why


def test_shapes_that_tensorrt_cannot_infer_fail_that_batch(cuda: FakeCuda) -> None:
    with opened(engine_of(models.negate(width="width"), "x:1x1/4x8/8x16")) as engine:
        assert np.array_equal(run(engine, X)[0], -X)
        plant("infer_shapes", "the product is too large", "INVALID_ARGUMENT")
        wide = np.ones((2, 9), np.float32)
        with pytest.raises(EngineRunError, match=r"infer shapes: infer_shapes error code: -1.*too large"):
            start(engine, 0, wide)
        assert np.array_equal(run(engine, wide)[0], -wide)


def test_an_execution_context_without_memory_fails_the_load(cuda: FakeCuda) -> None:
    plant("create_execution_context", "Cuda Runtime (out of memory)", "FAILED_ALLOCATION")
    assert "is out of memory: TensorRT cannot create an execution context; " in refused(
        engine_of(models.negate())
    )
    plant("create_execution_context", "no such profile", "INVALID_ARGUMENT")
    assert (
        refused(engine_of(models.negate()))
        == "TensorRT cannot create an execution context; INVALID_ARGUMENT: no such profile"
    )


# Any call may fail


def calls_of_a_life(cuda: FakeCuda, graphs: bool) -> list[tuple[str, int]]:
    """Return each call between open and close, with its count."""
    cuda.forget_calls()
    live(engine_of(models.negate(), graphs=graphs))
    return sorted(cuda.calls().items())


def live(engine: TensorRTEngine) -> None:
    """Open, run some batches, close."""
    with opened(engine):
        for slot in (0, 1):
            start(engine, slot, X)
        for slot in (0, 1):
            assert np.array_equal(engine.wait(slot)[0], -X)


def apart(engine: TensorRTEngine) -> None:
    """Do the same on a new thread, as each engine of a server has one."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(live, engine).result(WAIT_S)


# Only objects whose freeing failed may be left.
CLEAN_UP = {
    "cuDevicePrimaryCtxRelease", "cuCtxDetach", "cuCtxPopCurrent", "cuMemFree", "cuMemFreeHost",
    "cuStreamDestroy", "cuEventDestroy", "cuGraphDestroy", "cuGraphExecDestroy",
}  # fmt: skip
POINTS = [("exec:htod", 1), ("exec:kernel", 1), ("exec:dtoh", 1), ("exec:record", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("code", [OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILED])
def test_an_error_at_any_call_is_an_engine_error_and_leaks_nothing(
    cuda: FakeCuda, code: int, graphs: bool
) -> None:
    seen = 0
    for name, count in [*calls_of_a_life(cuda, graphs), *POINTS]:
        if name in {"cuGetErrorString", "cuDriverGetVersion", "cuStreamIsCapturing", "cuCtxGetDevice"}:
            continue  # engine_with by PyCUDA or the stand-in itself
        if name == "cuStreamEndCapture" and code == OUT_OF_MEMORY:
            continue  # the fake would continue to capture, unlike a driver
        for nth in {1, count}:
            fresh(cuda)
            cuda.inject(name, code, nth)
            engine = engine_of(models.negate(), graphs=graphs)
            error_type = None
            with contextlib.suppress(EngineError):
                error_type = EngineError
                live(engine)
                error_type = None
            seen += error_type is not None
            assert cuda.violations() == [], (name, nth)
            assert name in CLEAN_UP or cuda.live_objects() == {}, (name, nth)
            # The next engine works after any error.
            apart(engine_of(models.negate(), graphs=graphs))
            assert cuda.violations() == [], (name, nth)
    assert seen >= 25
    fresh(cuda)


def fresh(cuda: FakeCuda) -> None:
    importlib.import_module("cobatch.engines.tensorrt.cuda")._corrupt.clear()
    cuda.reset()


# At run


def test_tensorrts_report_is_in_the_error_and_the_next_batch_runs(cuda: FakeCuda) -> None:
    with opened(engine_of(models.negate(), graphs=False)) as engine:
        plant("execute_async_v3", "assertion numel > 0 failed in kernel foo")
        with pytest.raises(EngineRunError) as caught:
            start(engine, 0, X)
        why = str(caught.value)
        assert why.startswith("TensorRT could not start the batch; FAILED_EXECUTION: ")
        assert why.count("assertion numel > 0 failed in kernel foo") == 1
        assert np.array_equal(run(engine, X)[0], -X)


def test_rows_of_a_failed_batch_are_not_used_as_padding(cuda: FakeCuda) -> None:
    with opened(engine_of(models.negate(), graphs=False)) as engine:
        plant("execute_async_v3", "bad row")
        with pytest.raises(EngineRunError):
            start(engine, 0, np.full((8, 3), 13, np.float32))
        assert not (engine.inputs(0, 1, ((3,),))[0] == 13).any()


def test_a_failure_does_not_affect_the_other_slot(cuda: FakeCuda) -> None:
    with opened(engine_of(models.negate(), graphs=False)) as engine:
        start(engine, 0, X)
        plant("execute_async_v3", "bad row")
        with pytest.raises(EngineRunError):
            start(engine, 1, X + 1)
        assert np.array_equal(engine.wait(0)[0], -X)
        assert np.array_equal(run(engine, X + 2, slot=1)[0], -X - 2)


@pytest.mark.parametrize("code", [ILLEGAL_ADDRESS, LAUNCH_FAILED])
def test_a_sticky_error_ends_the_engine(cuda: FakeCuda, code: int, graphs: bool) -> None:
    with opened(engine_of(models.negate(), graphs=graphs)) as engine:
        cuda.inject("exec:kernel", code)
        start(engine, 0, X)
        words = {ILLEGAL_ADDRESS: "an illegal memory access", LAUNCH_FAILED: "unspecified launch failure"}[
            code
        ]
        with pytest.raises(EngineDeadError, match=rf"^GPU 0: .*{words}"):
            engine.wait(0)
        # From now on the driver is not called.
        cuda.forget_calls()
        with pytest.raises(EngineDeadError, match=words):
            start(engine, 1, X)
        with pytest.raises(EngineDeadError, match=words):
            engine.wait(1)
        assert not cuda.calls()


def test_a_sticky_error_that_tensorrt_finds_first(cuda: FakeCuda) -> None:
    with opened(engine_of(models.negate(), graphs=False)) as engine:
        cuda.inject("enqueueV3", ILLEGAL_ADDRESS)
        with pytest.raises(EngineDeadError, match="illegal memory access"):
            start(engine, 0, X)


def test_what_tensorrt_s_own_threads_log_is_no_engine_s(cuda: FakeCuda) -> None:
    """Another engine may have caused it."""
    trt = importlib.import_module("tensorrt")
    with opened(engine_of(models.negate(), graphs=False)) as engine:
        assert engine._log is not None
        log, text = engine._log.logger.log, "an illegal memory access was encountered"
        with ThreadPoolExecutor(1) as pool:
            pool.submit(log, trt.ILogger.Severity.ERROR, text).result()
        plant("execute_async_v3", "a batch that fails")
        with pytest.raises(EngineRunError) as failed:
            start(engine, 0, X)
        assert text not in str(failed.value)
        assert np.array_equal(run(engine, X)[0], -X)


def test_a_batch_whose_data_makes_the_kernel_fault(cuda: FakeCuda, graphs: bool) -> None:
    with opened(engine_of(models.pick(), graphs=graphs)) as engine:
        assert run(engine, np.array([[2], [0]]))[0].tolist() == [[30], [10]]
        start(engine, 0, np.array([[1], [99]]))
        with pytest.raises(EngineDeadError):
            engine.wait(0)


def test_the_other_gpu_is_not_affected(cuda: FakeCuda, graphs: bool) -> None:
    one, other = (
        engine_of(models.negate(), device=0, graphs=graphs),
        engine_of(models.negate(), device=1, graphs=graphs),
    )
    assert isinstance(die(cuda, one), EngineDeadError)
    worker = Worker(other, "other")
    assert start_worker(worker) is None
    worker.stop()
    assert worker.join(WAIT_S)


def die(cuda: FakeCuda, engine: TensorRTEngine) -> EngineError | None:
    """Return the errors of a batch on a GPU that faults."""
    with opened(engine):
        cuda.inject("exec:kernel", ILLEGAL_ADDRESS)
        try:
            run(engine, X)
        except EngineError as error:
            return type(error)(str(error))
    return None


def test_after_a_fault_a_new_engine_opens_in_a_new_context(cuda: FakeCuda, graphs: bool) -> None:
    # Another holder, such as a library, keeps the primary context and with it the error.
    holder = importlib.import_module("pycuda.driver")
    holder.init()
    primary = holder.Device(0).retain_primary_context()
    assert isinstance(die(cuda, engine_of(models.negate(), graphs=graphs)), EngineDeadError)
    with opened(engine_of(models.negate(), graphs=graphs)) as engine:
        assert np.array_equal(run(engine, X)[0], -X)
    primary.detach()


def test_a_model_that_fails_on_zeros_is_served(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(models.negate())
    plant("execute_async_v3", "zeros are not allowed")
    with opened(engine):
        assert "a run with zeros failed: TensorRT could not start the batch" in caplog.text
        assert "zeros are not allowed" in caplog.text
        cuda.forget_calls()
        assert np.array_equal(run(engine, X)[0], -X)


@pytest.mark.parametrize("call", ["cuGraphInstantiateWithFlags", "cuGraphUpload"])
def test_a_graph_that_cannot_be_made_is_freed(
    cuda: FakeCuda, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.inject(call, OUT_OF_MEMORY, 2)
    with opened(engine_of(models.negate())) as engine:
        assert f"no CUDA graph: {call.removesuffix('WithFlags')} failed" in caplog.text
        assert not {kind for kind in cuda.live_objects() if "graph" in kind}
        assert np.array_equal(run(engine, X)[0], -X)


def test_graphs_are_uploaded_before_the_first_batch(cuda: FakeCuda) -> None:
    cuda.forget_calls()
    with opened(engine_of(models.negate())):
        calls = cuda.calls()
        assert calls["cuGraphUpload"] == calls["cuGraphInstantiateWithFlags"] > 0


def test_work_that_cannot_be_captured_is_enqueued(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    cuda.inject("cuStreamBeginCapture", 801)
    with opened(engine_of(models.negate())) as engine:
        assert "no CUDA graph: cuStreamBeginCapture failed: " in caplog.text
        cuda.forget_calls()
        assert np.array_equal(run(engine, X, slot=1)[0], -X)
        assert np.array_equal(run(engine, X, slot=0)[0], -X)
        assert cuda.calls()["cuGraphLaunch"] == 0
