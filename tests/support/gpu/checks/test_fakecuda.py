"""The fake driver: correct results if no rule is broken, and a report of each broken rule.

Uses real PyCUDA, and cuda-bindings for mistakes that PyCUDA prevents.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.gpu.fakecuda.control import ILLEGAL_ADDRESS, LAUNCH_FAILED, OUT_OF_MEMORY, FakeCuda
from tests.support.gpu.fakecuda.testing import broke, in_thread
from tests.support.gpu.tier import require_fake_gpu

NON_BLOCKING = 1
POISON = 0xCB


class Gpu:
    """Import PyCUDA and cuda-bindings, with device 0's primary context current on this thread."""

    def __init__(self) -> None:
        self.cuda: Any = importlib.import_module("pycuda.driver")
        self.driver: Any = importlib.import_module("cuda.bindings.driver")
        self.cuda.init()
        self.context = self.cuda.Device(0).retain_primary_context()
        self.context.push()

    def stream(self) -> Any:
        return self.cuda.Stream(NON_BLOCKING)

    def pinned(self, value: int, size: int = 64) -> Any:
        memory = self.cuda.pagelocked_empty(size, np.uint8)
        memory.fill(value)
        return memory

    def code(self, answer: tuple[Any, ...]) -> int:
        return int(answer[0])


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    fake = require_fake_gpu()
    yield fake
    fake.reset()


@pytest.fixture
def gpu(fake: FakeCuda) -> Iterator[Gpu]:
    gpu = Gpu()
    yield gpu
    gpu.context.detach()


# No rule is broken


def test_copies_run_when_they_are_waited_for(fake: FakeCuda, gpu: Gpu) -> None:
    stream, source, target = gpu.stream(), gpu.pinned(7), gpu.pinned(0)
    memory = gpu.cuda.mem_alloc(64)
    gpu.cuda.memcpy_htod_async(memory, source, stream)
    gpu.cuda.memcpy_dtoh_async(target, memory, stream)
    assert set(target) == {POISON}  # reading too early shows no result
    stream.synchronize()
    assert set(target) == {7}
    del stream
    memory.free()
    assert fake.live_objects() == {"context": 1, "page-locked memory": 2}
    broke(fake)


def test_an_event_is_waited_for_up_to_where_it_was_recorded(gpu: Gpu) -> None:
    stream, first, second = gpu.stream(), gpu.pinned(1), gpu.pinned(2)
    memory, event = gpu.cuda.mem_alloc(64), gpu.cuda.Event(gpu.cuda.event_flags.DISABLE_TIMING)
    out_first, out_second = gpu.pinned(0), gpu.pinned(0)
    gpu.cuda.memcpy_htod_async(memory, first, stream)
    gpu.cuda.memcpy_dtoh_async(out_first, memory, stream)
    event.record(stream)
    gpu.cuda.memcpy_htod_async(memory, second, stream)
    gpu.cuda.memcpy_dtoh_async(out_second, memory, stream)
    event.synchronize()
    assert (out_first[0], out_second[0]) == (1, POISON)
    stream.synchronize()
    assert out_second[0] == 2


def test_a_stream_waits_for_an_event_of_another(gpu: Gpu) -> None:
    one, other, source, target = gpu.stream(), gpu.stream(), gpu.pinned(5), gpu.pinned(0)
    memory, event = gpu.cuda.mem_alloc(64), gpu.cuda.Event(gpu.cuda.event_flags.DISABLE_TIMING)
    gpu.cuda.memcpy_htod_async(memory, source, one)
    event.record(one)
    other.wait_for_event(event)
    gpu.cuda.memcpy_dtoh_async(target, memory, other)
    other.synchronize()
    assert target[0] == 5


def test_work_of_another_stream_has_not_run_without_a_wait(gpu: Gpu) -> None:
    one, other, source, target = gpu.stream(), gpu.stream(), gpu.pinned(5), gpu.pinned(0)
    memory = gpu.cuda.mem_alloc(64)
    gpu.cuda.memcpy_htod_async(memory, source, one)
    gpu.cuda.memcpy_dtoh_async(target, memory, other)
    other.synchronize()
    assert target[0] == POISON
    one.synchronize()


def test_polling_ends(gpu: Gpu) -> None:
    stream, source, event = gpu.stream(), gpu.pinned(5), gpu.cuda.Event()
    memory = gpu.cuda.mem_alloc(64)
    gpu.cuda.memcpy_htod_async(memory, source, stream)
    event.record(stream)
    assert [event.query() for _ in range(3)] == [False, True, True]


def test_new_memory_has_the_chosen_byte(fake: FakeCuda, gpu: Gpu) -> None:
    fake.poison(0x5A)
    target = np.zeros(16, np.uint8)
    gpu.cuda.memcpy_dtoh(target, gpu.cuda.mem_alloc(16))
    assert set(target) == {0x5A}
    assert set(gpu.cuda.pagelocked_empty(16, np.uint8)) == {0x5A}


def test_events_measure_time_unless_timing_is_disabled(gpu: Gpu) -> None:
    stream, begin, end = gpu.stream(), gpu.cuda.Event(), gpu.cuda.Event()
    begin.record(stream)
    end.record(stream)
    end.synchronize()
    assert end.time_since(begin) >= 0
    untimed = gpu.cuda.Event(gpu.cuda.event_flags.DISABLE_TIMING)
    untimed.record(stream)
    untimed.synchronize()
    with pytest.raises(gpu.cuda.LogicError):
        untimed.time_since(begin)


def test_a_device_address_is_no_host_address(gpu: Gpu) -> None:
    # A canonical address has equal top 16 bits; the processor refuses this one.
    assert int(gpu.cuda.mem_alloc(16)) >> 47 not in {0, 0x1FFFF}


def test_memory_runs_out(fake: FakeCuda, gpu: Gpu) -> None:
    fake.memory(1000)
    held = gpu.cuda.mem_alloc(600)
    assert gpu.cuda.mem_get_info() == (400, 1000)
    with pytest.raises(gpu.cuda.MemoryError, match="out of memory"):
        gpu.cuda.mem_alloc(401)
    held.free()
    gpu.cuda.mem_alloc(1000)
    broke(fake)


def test_there_are_two_devices_with_separate_memory(gpu: Gpu) -> None:
    assert gpu.cuda.Device.count() == 2
    held = gpu.cuda.mem_alloc(1 << 20)
    second = gpu.cuda.Device(1).retain_primary_context()
    second.push()
    free, total = gpu.cuda.mem_get_info()
    assert free == total
    second.pop()
    del held
    second.detach()


def test_calls_are_counted(fake: FakeCuda, gpu: Gpu) -> None:
    fake.forget_calls()
    gpu.cuda.mem_alloc(16)
    assert fake.calls() == {"cuMemAlloc": 1, "cuMemFree": 1}


def test_objects_freed_with_their_context_are_reported(fake: FakeCuda) -> None:
    gpu = Gpu()
    kept = gpu.cuda.mem_alloc(16), gpu.stream()
    gpu.context.detach()
    assert fake.orphans() == {"stream": 1, "device memory": 1}
    del kept
    broke(fake)


# Broken rules


def test_no_context_is_current(fake: FakeCuda) -> None:
    driver: Any = importlib.import_module("cuda.bindings.driver")
    driver.cuInit(0)
    assert int(driver.cuMemAlloc(16)[0]) == 201
    broke(fake, "cuMemAlloc_v2: no context is current on this thread")


def test_the_current_context_was_destroyed(fake: FakeCuda, gpu: Gpu) -> None:
    gpu.driver.cuDevicePrimaryCtxReset(0)
    assert gpu.code(gpu.driver.cuMemAlloc(16)) == 709
    broke(fake, "the current context was destroyed")


def test_pageable_memory_in_an_asynchronous_copy(fake: FakeCuda, gpu: Gpu) -> None:
    stream, memory, pageable = gpu.stream(), gpu.cuda.mem_alloc(64), np.zeros(64, np.uint8)
    with pytest.raises(gpu.cuda.LogicError):
        gpu.cuda.memcpy_htod_async(memory, pageable, stream)
    with pytest.raises(gpu.cuda.LogicError):
        gpu.cuda.memcpy_dtoh_async(pageable, memory, stream)
    assert set(pageable) == {0}
    broke(
        fake,
        "cuMemcpyHtoDAsync_v2: host memory",
        "cuMemcpyDtoHAsync_v2: host memory of an asynchronous copy is not",
    )


@pytest.mark.parametrize("outwards", [False, True])
def test_a_host_buffer_is_written_to_before_its_copy_has_run(
    fake: FakeCuda, gpu: Gpu, outwards: bool
) -> None:
    stream, memory, host = gpu.stream(), gpu.cuda.mem_alloc(64), gpu.pinned(3)
    if outwards:
        gpu.cuda.memcpy_dtoh_async(host, memory, stream)
    else:
        gpu.cuda.memcpy_htod_async(memory, host, stream)
    host[63] = 1
    with pytest.raises(gpu.cuda.Error, match="illegal memory access"):
        stream.synchronize()
    broke(fake, "the host buffer was written to before its copy had run")


def test_a_copy_to_memory_that_is_too_small_freed_or_invalid(fake: FakeCuda, gpu: Gpu) -> None:
    stream, host, memory = gpu.stream(), gpu.pinned(3, 65), gpu.cuda.mem_alloc(64)
    address = int(memory)
    with pytest.raises(gpu.cuda.LogicError):
        gpu.cuda.memcpy_htod_async(address, host, stream)
    memory.free()
    for nowhere in (address, 4096):
        with pytest.raises(gpu.cuda.LogicError):
            gpu.cuda.memcpy_htod_async(nowhere, host[:64], stream)
    broke(fake, "too small for 65 bytes", "was freed", "is no device memory")


def test_a_freed_address_is_never_reused(gpu: Gpu) -> None:
    addresses = []
    for _ in range(3):
        memory = gpu.cuda.mem_alloc(64)
        addresses.append(int(memory))
        memory.free()
    assert len(set(addresses)) == 3


def test_memory_is_freed_that_queued_work_uses(fake: FakeCuda, gpu: Gpu) -> None:
    stream, host = gpu.stream(), gpu.pinned(3)
    _, memory = gpu.driver.cuMemAlloc(64)
    gpu.cuda.memcpy_htod_async(int(memory), host, stream)
    assert gpu.code(gpu.driver.cuMemFree(memory)) == 1
    stream.synchronize()
    assert gpu.code(gpu.driver.cuMemFree(memory)) == 0
    broke(fake, "cuMemFree_v2: queued work still uses the device memory")


def test_memory_is_freed_twice(fake: FakeCuda, gpu: Gpu) -> None:
    _, memory = gpu.driver.cuMemAlloc(64)
    gpu.driver.cuMemFree(memory)
    assert gpu.code(gpu.driver.cuMemFree(memory)) == 400
    broke(fake, "the device memory is used after its end")


def test_page_locked_memory_is_used_after_it_was_freed(fake: FakeCuda, gpu: Gpu) -> None:
    stream, memory = gpu.stream(), gpu.cuda.mem_alloc(64)
    _, host = gpu.driver.cuMemAllocHost(64)
    gpu.driver.cuMemFreeHost(host)
    assert gpu.code(gpu.driver.cuMemcpyHtoDAsync(int(memory), host, 64, int(stream.handle))) == 1
    broke(fake, "the page-locked memory was freed")


def test_streams_and_events_are_used_after_their_end(fake: FakeCuda, gpu: Gpu) -> None:
    _, stream = gpu.driver.cuStreamCreate(NON_BLOCKING)
    _, event = gpu.driver.cuEventCreate(0)
    gpu.driver.cuStreamDestroy(stream)
    assert gpu.code(gpu.driver.cuStreamSynchronize(stream)) == 400
    gpu.driver.cuEventDestroy(event)
    assert gpu.code(gpu.driver.cuEventSynchronize(event)) == 400
    broke(fake, "the stream is used after its end", "the event is used after its end")


def test_an_object_of_a_destroyed_context_is_used_in_the_next(fake: FakeCuda, gpu: Gpu) -> None:
    _, stream = gpu.driver.cuStreamCreate(NON_BLOCKING)
    gpu.context.detach()
    gpu.context = gpu.cuda.Device(0).retain_primary_context()
    gpu.context.push()
    assert gpu.code(gpu.driver.cuStreamSynchronize(stream)) == 400
    broke(fake, "the stream is used after its end")


def test_an_object_is_used_on_another_thread(fake: FakeCuda, gpu: Gpu) -> None:
    stream = gpu.driver.cuStreamCreate(NON_BLOCKING)[1]
    context = gpu.driver.cuCtxGetCurrent()[1]

    def elsewhere() -> int:
        gpu.driver.cuCtxPushCurrent(context)
        code = gpu.code(gpu.driver.cuStreamSynchronize(stream))
        gpu.driver.cuCtxPopCurrent()
        return code

    assert in_thread(elsewhere) == 400
    broke(fake, "cuStreamSynchronize: the stream belongs to another thread")


def test_a_created_context_is_current_on_two_threads(fake: FakeCuda) -> None:
    cuda: Any = importlib.import_module("pycuda.driver")
    driver: Any = importlib.import_module("cuda.bindings.driver")
    cuda.init()
    context = cuda.Device(0).make_context()
    handle = driver.cuCtxGetCurrent()[1]
    assert in_thread(lambda: int(driver.cuCtxPushCurrent(handle)[0])) == 216
    context.detach()
    broke(fake, "cuCtxPushCurrent_v2: the context is current on another thread")


def test_an_object_of_another_context_is_used(fake: FakeCuda, gpu: Gpu) -> None:
    stream = gpu.driver.cuStreamCreate(NON_BLOCKING)[1]
    second = gpu.cuda.Device(1).retain_primary_context()
    second.push()
    assert gpu.code(gpu.driver.cuStreamSynchronize(stream)) == 201
    second.pop()
    second.detach()
    broke(fake, "the stream belongs to another context")


def test_a_context_ends_with_work_still_queued(fake: FakeCuda) -> None:
    gpu = Gpu()
    stream, memory, host = gpu.stream(), gpu.cuda.mem_alloc(64), gpu.pinned(1)
    gpu.cuda.memcpy_htod_async(memory, host, stream)
    gpu.context.detach()
    broke(fake, "work is still queued in the context that ends")


def test_a_call_that_the_fake_does_not_have(fake: FakeCuda, gpu: Gpu) -> None:
    with pytest.raises(gpu.cuda.Error, match="operation not supported"):
        gpu.cuda.module_from_buffer(b"\0")
    broke(fake, "the fake driver does not have this call")


# Errors, planted and sticky


def test_a_planted_error_occurs_once_at_its_call(fake: FakeCuda, gpu: Gpu) -> None:
    fake.inject("cuMemAlloc", OUT_OF_MEMORY, nth=2)
    assert [gpu.code(gpu.driver.cuMemAlloc(16)) for _ in range(3)] == [0, OUT_OF_MEMORY, 0]
    broke(fake)


def test_pycuda_repeats_a_failed_allocation(fake: FakeCuda, gpu: Gpu) -> None:
    fake.inject("cuMemAlloc", OUT_OF_MEMORY)
    gpu.cuda.mem_alloc(16)
    fake.inject("cuMemAlloc", OUT_OF_MEMORY, times=2)
    # A class of PyCUDA, no subclass of Python's MemoryError.
    with pytest.raises(gpu.cuda.MemoryError, match="cuMemAlloc failed: out of memory"):
        gpu.cuda.mem_alloc(16)
    broke(fake)


@pytest.mark.parametrize("code", [ILLEGAL_ADDRESS, LAUNCH_FAILED])
def test_after_a_sticky_error_every_call_returns_it(fake: FakeCuda, gpu: Gpu, code: int) -> None:
    memory, stream = gpu.driver.cuMemAlloc(16)[1], gpu.driver.cuStreamCreate(NON_BLOCKING)[1]
    fake.inject("cuStreamSynchronize", code)
    assert gpu.code(gpu.driver.cuStreamSynchronize(stream)) == code
    # Cleaning up is allowed, and returns the same error.
    assert gpu.code(gpu.driver.cuMemFree(memory)) == gpu.code(gpu.driver.cuStreamDestroy(stream)) == code
    broke(fake)
    assert gpu.code(gpu.driver.cuMemGetInfo()) == code
    broke(fake, f"cuMemGetInfo_v2: called after sticky error {code}")


def test_an_error_of_running_work_is_returned_by_the_next_call(fake: FakeCuda, gpu: Gpu) -> None:
    stream, memory, host, target = gpu.stream(), gpu.cuda.mem_alloc(64), gpu.pinned(1), gpu.pinned(0)
    fake.inject("exec:htod", ILLEGAL_ADDRESS)
    gpu.cuda.memcpy_htod_async(memory, host, stream)
    gpu.cuda.memcpy_dtoh_async(target, memory, stream)
    with pytest.raises(gpu.cuda.LogicError, match="illegal memory access"):
        stream.synchronize()
    assert set(target) == {POISON}  # work queued after it does not run
    broke(fake)


def test_a_new_context_and_another_device_are_usable(fake: FakeCuda, gpu: Gpu) -> None:
    fake.inject("cuMemGetInfo", ILLEGAL_ADDRESS)
    assert gpu.code(gpu.driver.cuMemGetInfo()) == ILLEGAL_ADDRESS
    second = gpu.cuda.Device(1).retain_primary_context()
    second.push()
    gpu.cuda.mem_alloc(16).free()
    second.pop()
    second.detach()
    gpu.context.detach()
    gpu.context = gpu.cuda.Device(0).retain_primary_context()
    gpu.context.push()
    gpu.cuda.mem_alloc(16).free()
    broke(fake)


def test_a_context_retained_elsewhere_stays_unusable(fake: FakeCuda, gpu: Gpu) -> None:
    other = gpu.driver.cuDevicePrimaryCtxRetain(0)[1]
    fake.inject("cuMemGetInfo", ILLEGAL_ADDRESS)
    gpu.driver.cuMemGetInfo()
    gpu.driver.cuDevicePrimaryCtxRelease(0)
    assert int(gpu.driver.cuDevicePrimaryCtxRetain(0)[1]) == int(other)

    def elsewhere() -> int:
        gpu.driver.cuCtxPushCurrent(other)
        return gpu.code(gpu.driver.cuMemGetInfo())

    # A call of another thread breaks no rule: it has not seen the error yet.
    assert in_thread(elsewhere) == ILLEGAL_ADDRESS
    gpu.driver.cuDevicePrimaryCtxRelease(0)
    broke(fake)


def test_registered_memory_is_page_locked_until_it_is_not(fake: FakeCuda, gpu: Gpu) -> None:
    stream, memory, host = gpu.stream(), gpu.cuda.mem_alloc(64), np.full(64, 3, np.uint8)
    address = host.ctypes.data
    assert gpu.code(gpu.driver.cuMemHostRegister(address, 64, 0)) == 0
    assert gpu.code(gpu.driver.cuMemHostRegister(address, 64, 0)) == 712
    gpu.cuda.memcpy_htod_async(memory, host, stream)
    assert gpu.code(gpu.driver.cuMemHostUnregister(address)) == 1
    stream.synchronize()
    assert gpu.code(gpu.driver.cuMemHostUnregister(address)) == 0
    with pytest.raises(gpu.cuda.LogicError):
        gpu.cuda.memcpy_htod_async(memory, host, stream)
    broke(fake, "queued work still uses the page-locked memory", "is not page-locked")
