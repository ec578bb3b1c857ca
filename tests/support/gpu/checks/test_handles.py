"""The fake driver's reports of invalid, freed and foreign handles and contexts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.gpu.checks.test_fakecuda import NON_BLOCKING, Gpu, fake, gpu
from tests.support.gpu.fakecuda.control import FakeCuda
from tests.support.gpu.fakecuda.testing import broke, in_thread
from tests.support.gpu.tier import environment

__all__ = ["fake", "gpu"]  # the fixtures

Call = Callable[[Any], tuple[Any, ...]]


@pytest.mark.parametrize(
    ("call", "code", "report"),
    [
        (lambda d: d.cuStreamSynchronize(d.CUstream(4096)), 400, "0x1000 is no stream"),
        (lambda d: d.cuEventSynchronize(d.CUevent(4096)), 400, "0x1000 is no event"),
        (lambda d: d.cuGraphLaunch(d.CUgraphExec(4096), d.CUstream(0)), 400, "is no executable graph"),
        (lambda d: d.cuCtxPushCurrent(d.CUcontext(4096)), 201, "0x1000 is no context"),
        (lambda d: d.cuMemFree(4096), 1, "0x1000 is no allocation"),
        (lambda d: d.cuMemFree(int(d.cuMemAlloc(16)[1]) + 8), 1, "is no allocation"),
        (lambda d: d.cuMemFreeHost(4096), 1, "is no page-locked allocation"),
        (lambda d: d.cuMemHostUnregister(d.cuMemAllocHost(16)[1]), 1, "is no page-locked allocation"),
        (lambda d: d.cuDevicePrimaryCtxRelease(1), 201, "the primary context was not retained"),
        (lambda d: d.cuCtxDestroy(d.cuCtxGetCurrent()[1]), 201, "a primary context is released"),
        (
            lambda d: d.cuDeviceGetAttribute(d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_WARP_SIZE, 0),
            801,
            "does not know attribute",
        ),
        (
            lambda d: d.cuPointerGetAttribute(
                d.CUpointer_attribute.CU_POINTER_ATTRIBUTE_BUFFER_ID, int(d.cuMemAlloc(16)[1])
            ),
            801,
            "does not know attribute",
        ),
    ],
)
def test_invalid_handles_are_reported(fake: FakeCuda, gpu: Gpu, call: Call, code: int, report: str) -> None:
    assert gpu.code(call(gpu.driver)) == code
    broke(fake, report)


def _stream(gpu: Gpu) -> Any:
    return gpu.driver.cuStreamCreate(NON_BLOCKING)[1]


def _begin(gpu: Gpu, stream: Any) -> int:
    mode = gpu.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    return gpu.code(gpu.driver.cuStreamBeginCapture(stream, mode))


def test_a_capture_begins_twice_or_ends_twice(fake: FakeCuda, gpu: Gpu) -> None:
    stream = _stream(gpu)
    assert [_begin(gpu, stream), _begin(gpu, stream)] == [0, 401]
    assert [gpu.code(gpu.driver.cuStreamEndCapture(stream)) for _ in range(2)] == [0, 401]
    broke(fake, "the stream is being captured already", "the stream is not being captured")


def test_graph_nodes_are_counted_and_unknown_flags_are_reported(fake: FakeCuda, gpu: Gpu) -> None:
    stream, memory = _stream(gpu), gpu.driver.cuMemAlloc(16)[1]
    _begin(gpu, stream)
    gpu.driver.cuMemsetD8Async(memory, 1, 16, stream)
    graph = gpu.driver.cuStreamEndCapture(stream)[1]
    assert gpu.driver.cuGraphGetNodes(graph)[2] == 1
    assert gpu.code(gpu.driver.cuGraphGetNodes(graph, 1)) == 801
    assert gpu.code(gpu.driver.cuGraphInstantiate(graph, 1)) == 801
    broke(fake, "only counts nodes", "does not know flags 1")


def test_memory_of_another_context_is_used(fake: FakeCuda, gpu: Gpu) -> None:
    memory = gpu.driver.cuMemAlloc(16)[1]
    second = gpu.cuda.Device(1).retain_primary_context()
    second.push()
    assert gpu.code(gpu.driver.cuMemsetD8Async(memory, 1, 16, _stream(gpu))) == 1
    second.pop()
    second.detach()
    broke(fake, "cuMemsetD8Async: the device memory belongs to another context")


def test_a_context_is_used_after_its_end(fake: FakeCuda, gpu: Gpu) -> None:
    context = gpu.driver.cuCtxCreate(None, 0, 0)[1]
    assert gpu.code(gpu.driver.cuCtxDestroy(context)) == 0
    assert gpu.code(gpu.driver.cuCtxPushCurrent(context)) == 201
    broke(fake, "the context is used after its end")


def test_a_created_context_is_destroyed_while_another_thread_uses_it(fake: FakeCuda, gpu: Gpu) -> None:
    context = gpu.driver.cuCtxCreate(None, 0, 0)[1]
    assert in_thread(lambda: gpu.code(gpu.driver.cuCtxDestroy(context))) == 216
    assert gpu.code(gpu.driver.cuCtxDestroy(context)) == 0
    broke(fake, "cuCtxDestroy_v2: the context is current on another thread")


def test_the_stack_of_contexts_underflows_or_overflows(fake: FakeCuda, gpu: Gpu) -> None:
    assert in_thread(lambda: gpu.code(gpu.driver.cuCtxPopCurrent())) == 201
    context = gpu.driver.cuCtxGetCurrent()[1]

    def pile() -> list[int]:
        return [gpu.code(gpu.driver.cuCtxPushCurrent(context)) for _ in range(33)]

    assert in_thread(pile) == [0] * 32 + [201]
    broke(fake, "cuCtxPopCurrent_v2: no context is current", "32 contexts are on the stack")


def test_calls_before_cuinit_fail() -> None:
    program = (
        "from cuda.bindings import driver\n"
        "count = lambda: int(driver.cuDeviceGetCount()[0])\n"
        "print(count(), int(driver.cuInit(0)[0]), count())"
    )
    command = [sys.executable, "-c", program]
    report = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert report.stdout.split() == ["3", "0", "0"]


def test_devices_beyond_the_second_are_refused_without_a_broken_rule(fake: FakeCuda, gpu: Gpu) -> None:
    cuda: Any = importlib.import_module("pycuda.driver")
    for number in (-1, 2):
        with pytest.raises(cuda.LogicError, match="invalid device ordinal"):
            cuda.Device(number)
    broke(fake)
