"""A batched function starts with its first call, and ends with loop, object or interpreter."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import uvloop

from cobatch import BatcherError, batched
from tests.support.library.gated import WAIT_S, Gated, blocked


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"cobatch-{name}"]


def ended(*of: threading.Thread) -> None:
    """Wait for the end of threads."""
    for thread in of:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def run_twice(run: Callable[..., Any]) -> None:
    function = Gated()
    double = batched(name="twice")(function)

    async def main() -> tuple[list[int], threading.Thread]:
        results = await asyncio.gather(*[double(n) for n in range(3)])
        (thread,) = threads("twice")
        return results, thread

    for _ in range(2):
        results, thread = run(main())
        assert results == [0, 2, 4]
        ended(thread)
    assert function.batches == [[0, 1, 2]] * 2
    assert double.statistics().accepted == 6


def test_it_starts_with_the_first_call_on_each_loop_and_ends_with_that() -> None:
    run_twice(asyncio.run)


def test_on_uvloop() -> None:
    run_twice(uvloop.run)


def test_loops_in_several_threads_have_batches_of_their_own() -> None:
    function = Gated()
    double = batched(name="threads", max_batch_size=4)(function)
    together = threading.Barrier(4)

    async def main(first: int) -> list[int]:
        together.wait(WAIT_S)
        results = []
        for n in range(first, first + 40, 4):
            results += await asyncio.gather(*[double(n + k) for k in range(4)])
        return results

    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda first: asyncio.run(main(first)), range(0, 400, 100)))
    assert runs == [[n * 2 for n in range(first, first + 40)] for first in range(0, 400, 100)]
    assert all(len({item // 100 for item in batch}) == 1 for batch in function.batches)
    assert double.statistics().accepted == 160
    ended(*threads("threads"))


def test_a_loop_that_is_only_closed_takes_its_thread_along_as_garbage() -> None:
    double = batched(name="closed")(Gated())
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(double(1)) == 2
    (thread,) = threads("closed")
    ref = weakref.ref(loop)
    loop.close()
    del loop
    until_s = time.monotonic() + WAIT_S
    while ref() is not None and time.monotonic() < until_s:
        gc.collect()
        thread.join(0.01)  # it may be about to leave the batch
    ended(thread)
    assert double.statistics().accepted == 1
    assert asyncio.run(double(2)) == 4


def test_a_run_goes_on_after_the_end_of_its_loop_and_its_thread_ends_then() -> None:
    function = Gated(is_open=False)
    double = batched(name="late")(function)

    async def main() -> None:
        await blocked(function, double, 0)

    asyncio.run(main())
    (thread,) = threads("late")
    function.gate.set()
    ended(thread)


def test_calls_that_are_left_when_the_loop_shuts_down_fail() -> None:
    function = Gated(is_open=False)
    double = batched(name="left")(function)
    loop = asyncio.new_event_loop()
    first = loop.run_until_complete(blocked(function, double, 0))
    loop.run_until_complete(loop.shutdown_asyncgens())
    with pytest.raises(BatcherError, match="'left' stopped before the request was done"):
        loop.run_until_complete(first)
    function.gate.set()
    loop.close()


def test_the_interpreter_ends_while_a_batch_runs() -> None:
    program = """if True:
        import asyncio, threading
        from cobatch import batched

        began = threading.Event()

        @batched()
        def hang(items):
            began.set()
            threading.Event().wait()

        async def main():
            call = asyncio.ensure_future(hang(1))
            await asyncio.to_thread(began.wait)

        asyncio.run(main())
        print("end")
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


class Model:
    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.batches: list[list[int]] = []
        self.ran: list[threading.Thread] = []

    __hash__ = None  # type: ignore[assignment]  # as of a dataclass

    def __eq__(self, other: object) -> bool:
        return True

    @batched(max_batch_size=4, name="times")
    def times(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.ran.append(threading.current_thread())
        return [item * self.factor for item in items]

    @batched()
    async def plus(self, items: list[int]) -> list[int]:
        return [item + self.factor for item in items]


async def test_each_object_has_batches_of_its_own() -> None:
    before = Model.times.statistics().accepted
    two, three = Model(2), Model(3)
    calls = [*[two.times(n) for n in range(3)], *[three.times(n) for n in range(3)]]
    assert await asyncio.gather(*calls) == [0, 2, 4, 0, 3, 6]
    assert two.batches == three.batches == [[0, 1, 2]]
    assert await two.plus(1) == 3
    assert (two.times.statistics().accepted, Model.times.statistics().accepted) == (3, before + 6)
    assert repr(two.times) == "<batched times>"


async def test_an_object_goes_with_its_last_caller_and_takes_its_thread_along() -> None:
    before = Model.times.statistics().accepted
    model = Model(2)
    ref = weakref.ref(model)
    ran = model.ran
    call = asyncio.ensure_future(model.times(1))
    del model
    assert await call == 2
    del call
    (thread,) = ran
    assert ref() is None
    await asyncio.to_thread(ended, thread)
    assert Model.times.statistics().accepted == before + 1


async def test_a_function_that_is_dropped_takes_its_thread_along() -> None:
    double = batched(name="dropped")(Gated())
    assert await double(1) == 2
    (thread,) = threads("dropped")
    del double
    await asyncio.to_thread(ended, thread)


async def test_a_coroutine_function_that_another_thread_drops() -> None:
    """Its batch, whose caller left, is cancelled by the event loop's own thread."""
    began, end = asyncio.Event(), asyncio.Event()

    async def wait(items: list[int]) -> list[int]:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            end.set()
        return items

    asyncio.get_running_loop().set_debug(True)  # other threads are refused
    functions = [batched()(wait)]
    call = asyncio.ensure_future(functions[0](1))
    await began.wait()
    call.cancel()
    await asyncio.wait([call])
    del call
    ref = weakref.ref(functions[0])
    await asyncio.to_thread(functions.clear)
    assert ref() is None
    async with asyncio.timeout(WAIT_S):
        await end.wait()


async def test_an_object_without_weak_references_is_refused() -> None:
    class Slotted:
        __slots__ = ()

        @batched()
        def same(self, items: list[int]) -> list[int]:
            return items

    with pytest.raises(TypeError, match="weak reference"):
        await Slotted().same(1)
