"""Graphs on the fake driver, with cuda-bindings on PyCUDA's stream, and its execution threads."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.gpu.checks.test_fakecuda import POISON, Gpu, fake, gpu
from tests.support.gpu.fakecuda.control import FakeCuda
from tests.support.gpu.fakecuda.testing import broke

__all__ = ["fake", "gpu"]  # the fixtures


class Copy:
    """A copy to the device and back, on its own stream."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.stream = gpu.stream()
        self.handle = gpu.driver.CUstream(int(self.stream.handle))
        self.source, self.target = gpu.pinned(1), gpu.pinned(0)
        self.memory = gpu.cuda.mem_alloc(64)

    def queue(self) -> None:
        self.gpu.cuda.memcpy_htod_async(self.memory, self.source, self.stream)
        self.gpu.cuda.memcpy_dtoh_async(self.target, self.memory, self.stream)

    def begin(self) -> None:
        mode = self.gpu.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        assert self.gpu.code(self.gpu.driver.cuStreamBeginCapture(self.handle, mode)) == 0

    def captured(self) -> Any:
        self.begin()
        self.queue()
        code, graph = self.gpu.driver.cuStreamEndCapture(self.handle)
        assert int(code) == 0
        code, launched = self.gpu.driver.cuGraphInstantiate(graph, 0)
        assert int(code) == 0
        self.gpu.driver.cuGraphDestroy(graph)
        return launched


@pytest.fixture
def copy(gpu: Gpu) -> Copy:
    return Copy(gpu)


def test_a_captured_graph_runs_at_each_launch(fake: FakeCuda, gpu: Gpu, copy: Copy) -> None:
    graph = copy.captured()
    copy.stream.synchronize()
    assert copy.target[0] == 0  # capturing runs nothing
    for value in (4, 5):
        copy.source.fill(value)
        assert gpu.code(gpu.driver.cuGraphLaunch(graph, copy.handle)) == 0
        assert set(copy.target) == {POISON}
        copy.stream.synchronize()
        assert set(copy.target) == {value}
    assert fake.live_objects()["executable graph"] == 1
    gpu.driver.cuGraphExecDestroy(graph)
    assert "executable graph" not in fake.live_objects()
    broke(fake)


def test_a_graph_with_freed_memory_is_launched(fake: FakeCuda, gpu: Gpu, copy: Copy) -> None:
    graph = copy.captured()
    copy.memory.free()
    assert gpu.code(gpu.driver.cuGraphLaunch(graph, copy.handle)) == 1
    broke(fake, "cuGraphLaunch: the device memory was freed")


def test_a_graphs_source_is_written_to_while_it_runs(fake: FakeCuda, gpu: Gpu, copy: Copy) -> None:
    graph = copy.captured()
    gpu.driver.cuGraphLaunch(graph, copy.handle)
    copy.source[0] = 9
    with pytest.raises(gpu.cuda.Error):
        copy.stream.synchronize()
    broke(fake, "the host buffer was written to before its copy had run")


def test_a_graph_is_launched_after_it_was_destroyed(fake: FakeCuda, gpu: Gpu, copy: Copy) -> None:
    graph = copy.captured()
    gpu.driver.cuGraphExecDestroy(graph)
    assert gpu.code(gpu.driver.cuGraphLaunch(graph, copy.handle)) == 400
    broke(fake, "the executable graph is used after its end")


@pytest.mark.parametrize(
    ("disturb", "report"),
    [
        (lambda gpu, copy: gpu.driver.cuStreamSynchronize(copy.handle), "the stream is being captured"),
        (lambda gpu, copy: gpu.driver.cuMemAlloc(16), "called while this thread captures a stream"),
        (lambda gpu, copy: gpu.driver.cuCtxSynchronize(), "called while this thread captures a stream"),
    ],
)
def test_a_capture_is_disturbed(fake: FakeCuda, gpu: Gpu, copy: Copy, disturb: Any, report: str) -> None:
    copy.begin()
    assert gpu.code(disturb(gpu, copy)) == 900
    assert gpu.code(gpu.driver.cuStreamEndCapture(copy.handle)) == 901
    copy.queue()  # the stream is still usable
    copy.stream.synchronize()
    broke(fake, report)


def test_an_event_of_a_capture_is_waited_for(fake: FakeCuda, gpu: Gpu, copy: Copy) -> None:
    event = gpu.cuda.Event()
    copy.begin()
    event.record(copy.stream)
    gpu.driver.cuStreamEndCapture(copy.handle)
    with pytest.raises(gpu.cuda.Error):
        event.synchronize()
    broke(fake, "the event was recorded in a capture")


def test_the_default_stream_is_captured(fake: FakeCuda, gpu: Gpu) -> None:
    mode = gpu.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    assert gpu.code(gpu.driver.cuStreamBeginCapture(gpu.driver.CUstream(0), mode)) == 900
    broke(fake, "the default stream cannot be captured")


# Execution threads


def test_with_execution_threads_work_runs_without_a_wait(fake: FakeCuda, gpu: Gpu, copy: Copy) -> None:
    fake.mode("threaded")
    event = gpu.cuda.Event()
    copy.queue()
    event.record(copy.stream)
    while not event.query():
        pass
    assert set(copy.target) == {1}
    broke(fake)


def test_with_execution_threads_streams_wait_for_each_other(fake: FakeCuda, gpu: Gpu, copy: Copy) -> None:
    fake.mode("threaded")
    other, event = Copy(gpu), gpu.cuda.Event(gpu.cuda.event_flags.DISABLE_TIMING)
    for value in range(1, 50):
        copy.source.fill(value)
        gpu.cuda.memcpy_htod_async(copy.memory, copy.source, copy.stream)
        event.record(copy.stream)
        other.stream.wait_for_event(event)
        gpu.cuda.memcpy_dtoh_async(other.target, copy.memory, other.stream)
        other.stream.synchronize()
        assert set(other.target) == {value}
    broke(fake)


def test_with_execution_threads_a_fault_is_returned_by_a_later_call(
    fake: FakeCuda, gpu: Gpu, copy: Copy
) -> None:
    fake.mode("threaded")
    fake.inject("exec:dtoh", 719)
    copy.queue()
    with pytest.raises(gpu.cuda.LaunchError):
        copy.stream.synchronize()
    broke(fake)


def test_with_execution_threads_a_graph_runs_as_well(fake: FakeCuda, gpu: Gpu, copy: Copy) -> None:
    graph = copy.captured()
    fake.mode("threaded")
    for value in range(50):
        copy.source.fill(value)
        gpu.driver.cuGraphLaunch(graph, copy.handle)
        copy.stream.synchronize()
        assert set(copy.target) == {value}
    broke(fake)
