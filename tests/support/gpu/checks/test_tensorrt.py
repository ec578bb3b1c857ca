"""TensorRT's stand-ins: correct results if no rule is broken, and a report of each broken rule."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from tests.support.gpu.checks.test_fakecuda import POISON, Gpu, fake, gpu
from tests.support.gpu.fakecuda.control import ILLEGAL_ADDRESS, FakeCuda
from tests.support.gpu.fakecuda.testing import broke, in_thread
from tests.support.models import models

__all__ = ["fake", "gpu"]  # the fixtures

ROWS = 4


class Trt:
    """The stand-ins, with their log and error recorder."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.trt: Any = importlib.import_module("tensorrt")
        self.planting: Any = importlib.import_module("tensorrt.planting")
        self.plan: Any = importlib.import_module("tensorrt.plan")
        self.planting.clear()
        self.logged: list[str] = []
        self.recorded: list[tuple[str, str]] = []
        self.runtime = self.trt.Runtime(self._logger())
        self.runtime.error_recorder = self._recorder()

    def _logger(self) -> Any:
        logged = self.logged

        class Logger(self.trt.ILogger):  # type: ignore[misc, name-defined]  # its base is known at run time only
            def log(self, severity: Any, msg: str) -> None:
                logged.append(f"{severity.name} {msg}")

        return Logger()

    def _recorder(self) -> Any:
        recorded = self.recorded

        class Recorder(self.trt.IErrorRecorder):  # type: ignore[misc, name-defined]  # as above
            def report_error(self, code: Any, text: str) -> bool:
                recorded.append((code.name, text))
                return False

        return Recorder()

    def engine(self, model: bytes | None = None, *profiles: Any, **options: Any) -> Any:
        plan = self.plan.make_plan(model or models.negate(), profiles, **options)
        return self.runtime.deserialize_cuda_engine(plan)


class Batch:
    """An execution context of y = -x, [1 to 8, 3], ready for a batch."""

    def __init__(self, trt: Trt, engine: Any = None) -> None:
        self.gpu = trt.gpu
        self.engine = engine or trt.engine()
        self.context = self.engine.create_execution_context()
        self.stream = self.gpu.stream()
        self.handle = int(self.stream.handle)
        size = 8 * 3 * 4
        self.memory = {name: self.gpu.cuda.mem_alloc(size) for name in ("x", "y")}
        self.hosts = {name: self.gpu.cuda.pagelocked_empty((8, 3), np.float32) for name in ("x", "y")}
        self.hosts["x"][:] = np.arange(24).reshape(8, 3)
        self.context.set_input_shape("x", (ROWS, 3))
        for name, memory in self.memory.items():
            self.context.set_tensor_address(name, int(memory))

    def queue(self) -> bool:
        self.gpu.cuda.memcpy_htod_async(self.memory["x"], self.hosts["x"], self.stream)
        done: bool = self.context.execute_async_v3(self.handle)
        self.gpu.cuda.memcpy_dtoh_async(self.hosts["y"], self.memory["y"], self.stream)
        return done

    def capture(self) -> Any:
        driver = self.gpu.driver
        stream = driver.CUstream(self.handle)
        driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        self.done = self.queue()
        _, graph = driver.cuStreamEndCapture(stream)
        return driver.cuGraphInstantiate(graph, 0)[1]

    def is_right(self) -> bool:
        """Check the requested rows, and that nothing was written after them."""
        wanted, got = -self.hosts["x"][:ROWS], self.hosts["y"]
        rest = got[ROWS:].view(np.uint8)
        return bool(np.array_equal(got[:ROWS], wanted) and set(rest.ravel()) == {POISON})


@pytest.fixture
def trt(gpu: Gpu) -> Iterator[Trt]:
    trt = Trt(gpu)
    yield trt
    trt.planting.clear()


@pytest.fixture
def batch(trt: Trt) -> Batch:
    return Batch(trt)


# No rule is broken


@pytest.mark.parametrize("mode", ["lazy", "threaded"])
def test_a_batch_is_computed_when_the_stream_reaches_it(fake: FakeCuda, batch: Batch, mode: str) -> None:
    fake.mode(mode)
    assert batch.context.infer_shapes() == []
    assert tuple(batch.context.get_tensor_shape("y")) == (ROWS, 3)
    assert batch.context.get_max_output_size("y") == ROWS * 3 * 4
    assert batch.queue()
    batch.stream.synchronize()
    assert batch.is_right()
    broke(fake)


def test_a_captured_batch_is_computed_each_time(fake: FakeCuda, gpu: Gpu, batch: Batch) -> None:
    batch.queue()
    batch.stream.synchronize()
    graph = batch.capture()
    assert batch.done
    for first in (1, 2):
        batch.hosts["x"][:] = np.arange(24).reshape(8, 3) * first
        gpu.driver.cuGraphLaunch(graph, batch.handle)
        batch.stream.synchronize()
        assert batch.is_right()
    broke(fake)


@pytest.mark.parametrize(
    ("datatype", "name", "bits"),
    [
        (TensorProto.FLOAT16, "HALF", np.uint16),
        (TensorProto.BFLOAT16, "BF16", np.uint16),
        (TensorProto.INT8, "INT8", np.uint8),
        (TensorProto.INT64, "INT64", np.uint64),
        (TensorProto.UINT8, "UINT8", np.uint8),
        (TensorProto.BOOL, "BOOL", np.uint8),
    ],
)
def test_every_type_arrives_bit_for_bit(gpu: Gpu, trt: Trt, datatype: int, name: str, bits: Any) -> None:
    engine = trt.engine(models.identity(datatype))
    assert engine.get_tensor_dtype("x").name == name
    context, stream = engine.create_execution_context(), gpu.stream()
    sent = np.array([[0, 1], [1, 0]], bits)
    got = np.zeros_like(sent)
    memory = {key: gpu.cuda.mem_alloc(sent.nbytes) for key in ("x", "y")}
    context.set_input_shape("x", sent.shape)
    for key, at in memory.items():
        context.set_tensor_address(key, int(at))
    gpu.cuda.memcpy_htod(memory["x"], sent)
    assert context.execute_async_v3(int(stream.handle))
    stream.synchronize()
    gpu.cuda.memcpy_dtoh(got, memory["y"])
    assert np.array_equal(got, sent)


def test_objects_hold_device_memory_until_they_are_freed(fake: FakeCuda, trt: Trt) -> None:
    engine = trt.engine()
    context = engine.create_execution_context()
    assert fake.live_objects()["device memory"] == 2
    del context, engine
    assert "device memory" not in fake.live_objects()
    broke(fake)


def test_objects_without_memory_fail(fake: FakeCuda, trt: Trt) -> None:
    fake.memory(10)
    assert trt.engine() is None
    fake.memory(len(models.negate()) + 10)
    engine = trt.engine()
    assert engine.create_execution_context() is None
    assert [code for code, _ in trt.recorded] == ["FAILED_ALLOCATION"] * 2
    broke(fake)


def test_a_shape_that_depends_on_the_data_is_unknown(trt: Trt) -> None:
    context = trt.engine(models.value_sets_width()).create_execution_context()
    context.set_input_shape("x", (2, 1))
    assert context.infer_shapes() == []
    assert -1 in tuple(context.get_tensor_shape("y"))


def test_a_plan_of_another_version_is_refused_in_the_log(trt: Trt) -> None:
    assert trt.engine(version="9.9.9") is None
    assert "expecting library version 10.16.1.11 got 9.9.9" in trt.logged[-1]
    assert trt.runtime.deserialize_cuda_engine(b"not a plan") is None


def test_a_planted_error_reaches_log_and_recorder(fake: FakeCuda, trt: Trt, batch: Batch) -> None:
    trt.planting.plant("execute_async_v3", "the layer went wrong")
    assert not batch.context.execute_async_v3(batch.handle)
    assert trt.recorded == [("FAILED_EXECUTION", "IExecutionContext: the layer went wrong")]
    assert batch.context.execute_async_v3(batch.handle)
    batch.stream.synchronize()
    broke(fake)


def test_an_error_of_the_driver_while_it_queues_reaches_the_recorder(
    fake: FakeCuda, trt: Trt, batch: Batch
) -> None:
    fake.inject("enqueueV3", ILLEGAL_ADDRESS)
    assert not batch.context.execute_async_v3(batch.handle)
    assert "an illegal memory access was encountered" in trt.recorded[-1][1]
    broke(fake)


def test_a_failed_kernel_makes_the_context_unusable(fake: FakeCuda, gpu: Gpu, trt: Trt) -> None:
    engine = trt.engine(models.pick())
    context, stream = engine.create_execution_context(), gpu.stream()
    memory = {key: gpu.cuda.mem_alloc(8) for key in ("x", "y")}
    gpu.cuda.memcpy_htod(memory["x"], np.array([[99]], np.int64))
    context.set_input_shape("x", (1, 1))
    for key, at in memory.items():
        context.set_tensor_address(key, int(at))
    assert context.execute_async_v3(int(stream.handle))
    with pytest.raises(gpu.cuda.LaunchError):
        stream.synchronize()
    broke(fake)


# Broken rules


def test_no_shape_is_set(fake: FakeCuda, trt: Trt) -> None:
    context = trt.engine().create_execution_context()
    assert context.infer_shapes() == ["x"]
    assert not context.execute_async_v3(int(trt.gpu.driver.cuStreamCreate(1)[1]))
    broke(fake, "execute_async_v3: the shape of x is not set")


@pytest.mark.parametrize("shape", [(0, 3), (9, 3), (4, 4), (4,)])
def test_a_shape_is_outside_the_profile(
    fake: FakeCuda, trt: Trt, batch: Batch, shape: tuple[int, ...]
) -> None:
    assert not batch.context.set_input_shape("x", shape)
    broke(fake, "set_input_shape: x")
    assert "is not within [[1, 3], [8, 3]]" in trt.recorded[-1][1]


def test_a_shape_is_that_of_another_profile(fake: FakeCuda, gpu: Gpu, trt: Trt) -> None:
    small, large = {"x": ((1, 3), (1, 3), (2, 3))}, {"x": ((3, 3), (8, 3), (8, 3))}
    context, stream = trt.engine(None, small, large).create_execution_context(), gpu.stream()
    assert not context.set_input_shape("x", (4, 3))
    assert context.set_optimization_profile_async(1, int(stream.handle))
    assert context.set_input_shape("x", (4, 3))
    stream.synchronize()
    broke(fake, "outside profile 0")


def test_a_profile_was_switched_on_a_stream_without_a_wait(fake: FakeCuda, gpu: Gpu, batch: Batch) -> None:
    other = gpu.stream()
    assert batch.context.set_optimization_profile_async(0, int(other.handle))
    batch.context.set_input_shape("x", (ROWS, 3))
    assert not batch.queue()
    other.synchronize()
    assert batch.queue()
    batch.stream.synchronize()
    broke(fake, "the profile was switched on another stream")


def test_no_address_is_set(fake: FakeCuda, batch: Batch) -> None:
    batch.context.set_tensor_address("y", 0)
    assert not batch.queue()
    batch.stream.synchronize()
    broke(fake, "execute_async_v3: the address of y is not set")


def test_an_address_was_freed(fake: FakeCuda, batch: Batch) -> None:
    batch.memory["y"].free()
    assert not batch.context.execute_async_v3(batch.handle)
    broke(fake, "execute_async_v3: the memory of y is freed")


def test_an_address_is_freed_between_enqueueing_and_running(fake: FakeCuda, gpu: Gpu, batch: Batch) -> None:
    assert batch.context.execute_async_v3(batch.handle)
    assert gpu.code(gpu.driver.cuMemFree(int(batch.memory["y"]))) == 1
    batch.stream.synchronize()
    broke(fake, "cuMemFree_v2: queued work still uses the device memory")


def test_an_address_has_too_little_room(fake: FakeCuda, batch: Batch) -> None:
    batch.context.set_tensor_address("y", int(batch.gpu.driver.cuMemAlloc(ROWS * 3 * 4 - 1)[1]))
    assert not batch.context.execute_async_v3(batch.handle)
    broke(fake, "execute_async_v3: the memory of y is too small")


def test_an_address_is_not_aligned(fake: FakeCuda, batch: Batch) -> None:
    batch.context.set_tensor_address("y", int(batch.memory["y"]) + 4)
    broke(fake, "set_tensor_address: the address of y is not aligned")


def test_the_default_stream(fake: FakeCuda, batch: Batch) -> None:
    assert not batch.context.execute_async_v3(0)
    broke(fake, "execute_async_v3: the default stream is used")


def test_captured_before_a_batch_was_enqueued_and_waited_for(fake: FakeCuda, batch: Batch) -> None:
    batch.capture()
    assert not batch.done
    broke(fake, "execute_async_v3: captured before")


def test_captured_before_the_batch_that_was_enqueued_has_run(fake: FakeCuda, batch: Batch) -> None:
    assert batch.queue()
    batch.capture()
    assert not batch.done
    batch.stream.synchronize()
    broke(fake, "execute_async_v3: captured before")


def test_captured_after_other_shapes_were_run(fake: FakeCuda, batch: Batch) -> None:
    batch.queue()
    batch.stream.synchronize()
    batch.context.set_input_shape("x", (2, 3))
    batch.capture()
    assert not batch.done
    broke(fake, "execute_async_v3: captured before")


def test_a_graph_is_launched_after_its_contexts_shapes_changed(
    fake: FakeCuda, trt: Trt, batch: Batch
) -> None:
    batch.queue()
    batch.stream.synchronize()
    graph = batch.capture()
    batch.context.set_input_shape("x", (2, 3))
    for strict in (False, True):  # a test may allow it
        trt.planting.strict_graphs(strict)
        batch.gpu.driver.cuGraphLaunch(graph, batch.handle)
        batch.stream.synchronize()
    broke(fake, "a graph is launched whose execution context was changed since it was captured")


def test_an_execution_context_is_used_on_another_thread(fake: FakeCuda, gpu: Gpu, batch: Batch) -> None:
    assert not in_thread(lambda: batch.context.set_input_shape("x", (2, 3)))
    assert not in_thread(lambda: batch.context.execute_async_v3(batch.handle))
    belongs = "IExecutionContext belongs to another thread"
    broke(fake, f"set_input_shape: {belongs}", f"execute_async_v3: {belongs}")


def test_no_context_is_current(fake: FakeCuda, gpu: Gpu, batch: Batch) -> None:
    gpu.context.pop()
    try:
        assert not batch.context.execute_async_v3(batch.handle)
        assert batch.engine.create_execution_context() is None
    finally:
        gpu.context.push()
    broke(fake, "execute_async_v3: no CUDA context is current", "create_execution_context: no CUDA context")


def test_an_object_is_freed_on_another_thread(fake: FakeCuda, trt: Trt) -> None:
    held = [trt.engine().create_execution_context()]
    in_thread(held.clear)
    gc.collect()
    broke(
        fake, "IExecutionContext is freed on another", "ICudaEngine is freed on another thread than its own"
    )


def test_an_object_is_freed_after_its_context(fake: FakeCuda) -> None:
    gpu = Gpu()
    engine = Trt(gpu).engine()
    gpu.context.detach()
    del engine
    broke(fake, "ICudaEngine is freed without its CUDA context")
    assert fake.orphans() == {"device memory": 1}


def test_after_a_sticky_error_nothing_may_be_called(fake: FakeCuda, gpu: Gpu, batch: Batch) -> None:
    fake.inject("exec:kernel", ILLEGAL_ADDRESS)
    batch.context.execute_async_v3(batch.handle)
    with pytest.raises(gpu.cuda.LogicError):
        batch.stream.synchronize()
    broke(fake)
    assert not batch.context.execute_async_v3(batch.handle)
    broke(fake, "enqueueV3: called after sticky error 700")


def test_working_memory_that_was_not_set(fake: FakeCuda, gpu: Gpu, trt: Trt) -> None:
    strategy = trt.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    batch = Batch(trt)
    context = batch.engine.create_execution_context(strategy)
    context.set_input_shape("x", (ROWS, 3))
    for name, memory in batch.memory.items():
        context.set_tensor_address(name, int(memory))
    assert not context.execute_async_v3(batch.handle)
    size = batch.engine.get_device_memory_size_for_profile_v2(0)
    own = gpu.cuda.mem_alloc(size)
    context.set_device_memory(int(own), size - 1)
    assert not context.execute_async_v3(batch.handle)
    context.set_device_memory(int(own), size)
    assert context.execute_async_v3(batch.handle)
    batch.stream.synchronize()
    broke(fake, "no device memory is set", "the device memory that was set is too small")


def test_working_memory_as_the_oldest_version_sets_it(fake: FakeCuda, gpu: Gpu, trt: Trt) -> None:
    versions: Any = importlib.import_module("tensorrt.versions")
    versions.use("10.0.1")
    try:
        batch = Batch(trt)
        context = batch.engine.create_execution_context(
            trt.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        assert not hasattr(context, "set_device_memory")
        context.set_input_shape("x", (ROWS, 3))
        for name, memory in batch.memory.items():
            context.set_tensor_address(name, int(memory))
        size = batch.engine.get_device_memory_size_for_profile(0)
        short, own = gpu.cuda.mem_alloc(size - 1), gpu.cuda.mem_alloc(size)
        for memory, done in ((short, False), (own, True)):
            context.device_memory = int(memory)
            assert context.execute_async_v3(batch.handle) == done
        batch.stream.synchronize()
    finally:
        versions.use()
    broke(fake, "the device memory that was set is too small")


@pytest.mark.parametrize("address", [np.int64(512), 1.0, None])
def test_addresses_and_handles_are_plain_numbers(batch: Batch, address: Any) -> None:
    with pytest.raises(TypeError, match="no plain int"):
        batch.context.set_tensor_address("x", address)
    with pytest.raises(TypeError, match="no plain int"):
        batch.context.execute_async_v3(address)
