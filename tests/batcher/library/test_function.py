"""Batched functions: shared batches, own results and errors, limits and order."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import traceback
import weakref
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cobatch import (
    DeadlineExceeded,
    ExecutionTimeoutError,
    QueueFull,
    ResultCountError,
    Tenant,
    TenantLimitError,
    batched,
)
from cobatch.engines.function import FunctionEngine
from tests.support.library.gated import WAIT_S, Gated, blocked, queued, until
from tests.support.virtual.loop import run

# For functions without types; `typed` has those with them.
ANY: Any = batched


async def test_concurrent_callers_share_a_batch_and_get_their_own_results() -> None:
    function = Gated()
    double = batched(max_batch_size=8)(function)
    assert await asyncio.gather(*[double(n) for n in range(20)]) == [n * 2 for n in range(20)]
    assert sorted(itertools.chain(*function.batches)) == list(range(20))
    assert [len(batch) for batch in function.batches] == [8, 8, 4]


async def test_calls_gather_while_a_batch_runs() -> None:
    function = Gated(is_open=False)
    double = batched(max_batch_size=8)(function)
    first = await blocked(function, double, 0)
    others = [asyncio.ensure_future(double(n)) for n in range(1, 6)]
    await queued(double.statistics, 5)
    function.gate.set()
    assert [await first, *[await one for one in others]] == [0, 2, 4, 6, 8, 10]
    assert function.batches == [[0], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("bad", [(3,), (0, 7), (2, 3, 4)])
async def test_an_item_that_fails_fails_alone_with_its_own_exception(bad: tuple[int, ...]) -> None:
    raised: dict[int, ValueError] = {}

    def fails(item: int) -> None:
        if item in bad:
            raised[item] = ValueError(f"{item} is bad")
            raise raised[item]

    function = Gated()
    function.fails = fails
    double = batched(max_batch_size=8)(function)
    results = await asyncio.gather(*[double(n) for n in range(8)], return_exceptions=True)
    for n, result in enumerate(results):
        assert result == n * 2 if n not in bad else result is raised[n]
    text = "".join(traceback.format_exception(raised[bad[0]]))
    assert "raise raised[item]" in text  # of the function
    assert "await future" in text  # of the caller
    statistics = double.statistics()
    assert (statistics.accepted, statistics.failed) == (8, len(bad))


@pytest.mark.parametrize(
    ("ends", "coroutine"),
    [
        (SystemExit(3), False),
        (KeyboardInterrupt(), False),
        (StopIteration(), False),
        (asyncio.CancelledError(), False),
        (StopAsyncIteration(), True),
        (asyncio.CancelledError(), True),
    ],
)
async def test_an_exception_that_would_end_the_caller_is_wrapped(
    ends: BaseException, coroutine: bool
) -> None:
    def function(items: list[int]) -> list[int]:
        if 1 in items:
            raise ends
        return items

    async def on_loop(items: list[int]) -> list[int]:
        return function(items)

    same = batched(name="same")(on_loop) if coroutine else batched(name="same")(function)
    with pytest.raises(RuntimeError, match=f"same raised {type(ends).__name__}"):
        await same(1)
    assert await same(2) == 2


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        ([], ResultCountError, "lossy returned 0 results for 1 items, not one for each"),
        ([1, 2], ResultCountError, "lossy returned 2 results for 1 items"),
        (np.zeros((3, 2)), ResultCountError, "lossy returned 3 results"),
        (None, TypeError, "lossy returned NoneType, it must return a list"),
        ("x", TypeError, "lossy returned str"),
        ({0: 1}, TypeError, "lossy returned dict"),
        ((n for n in [1]), TypeError, "lossy returned generator"),
    ],
)
async def test_anything_but_one_result_for_each_item_is_an_error(
    returned: Any, error: type[Exception], text: str
) -> None:
    lossy = ANY(name="lossy")(lambda items: returned)
    with pytest.raises(error, match=text):
        await lossy(1)


async def test_results_of_every_type_come_back_as_they_are() -> None:
    results = [None, [1, 2], np.zeros(3), np.array(5), (), "x", {"a": 1}]
    same = ANY()(lambda numbers: [results[n] for n in numbers])
    for got, result in zip(await asyncio.gather(*[same(n) for n in range(7)]), results, strict=True):
        assert got is result


async def test_rows_of_an_array_are_copies() -> None:
    whole = np.arange(8.0).reshape(4, 2)
    rows = ANY()(lambda items: whole[: len(items)])
    one, two = await asyncio.gather(rows(0), rows(0))
    whole[:] = -1
    assert (one.tolist(), two.tolist()) == ([0, 1], [2, 3])
    assert one.base is None


def test_an_array_that_the_next_batch_uses_again() -> None:
    """The next one runs before the event loop takes the first one's results."""
    whole = np.zeros((1, 1))

    def fill(items: list[float]) -> NDArray[Any]:
        whole[0] = items
        return whole

    engine = FunctionEngine(fill, "fill", max_batch_size=1)
    results: list[Any] = []
    for slot in range(2):
        engine.fill(slot, [slot + 1.0])
        results += engine.wait(slot)
    assert [result[0].tolist() for result in results] == [[1.0], [2.0]]


async def test_stacked_arrays_share_a_batch_if_shape_and_dtype_are_equal() -> None:
    seen: list[tuple[tuple[int, ...], str]] = []

    @batched(stack=True)
    def double(rows: NDArray[Any]) -> NDArray[Any]:
        seen.append((rows.shape, rows.dtype.str))
        return rows * 2

    items: list[Any] = [np.ones(2, np.float32), np.ones(2), [1, 2, 3], np.full(2, 3, np.float32), 7]
    results = await asyncio.gather(*[double(item) for item in items])
    for result, item in zip(results, items, strict=True):
        assert np.array_equal(result, np.asarray(item) * 2)
        assert result.dtype == np.asarray(item).dtype
    assert sorted(seen) == [((1,), "<i8"), ((1, 2), "<f8"), ((1, 3), "<i8"), ((2, 2), "<f4")]


async def test_a_coroutine_function_runs_on_the_loop_in_no_callers_context() -> None:
    caller = contextvars.ContextVar("caller", default="none")
    caller.set("ann")
    loop = asyncio.get_running_loop()
    batches = []

    @batched(max_batch_size=4)
    async def double(items: list[int]) -> list[int]:
        assert asyncio.get_running_loop() is loop
        batches.append((caller.get(), list(items)))
        await asyncio.sleep(0)
        if 2 in items:
            raise ValueError("bad")
        return [item * 2 for item in items]

    results = await asyncio.gather(*[double(n) for n in range(6)], return_exceptions=True)
    assert results[:2] == [0, 2]
    assert isinstance(results[2], ValueError)
    assert results[3:] == [6, 8, 10]
    assert {name for name, _ in batches} == {"none"}


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_as_many_batches_of_a_coroutine_function_run_at_once(concurrency: int) -> None:
    running: list[int] = []
    most = 0

    @batched(max_batch_size=1, concurrency=concurrency)
    async def count(items: list[int]) -> list[int]:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        for _ in range(20):
            await asyncio.sleep(0)
        running.pop()
        return items

    await asyncio.gather(*[count(n) for n in range(9)])
    assert most == concurrency


async def test_several_threads_run_batches_at_once() -> None:
    function = Gated(is_open=False)
    double = batched(max_batch_size=1, concurrency=2)(function)
    calls = [asyncio.ensure_future(double(n)) for n in range(2)]
    await until(lambda: len(function.batches) == 2)
    function.gate.set()
    assert await asyncio.gather(*calls) == [0, 2]


async def test_a_full_queue_refuses() -> None:
    function = Gated(is_open=False)
    double = batched(max_batch_size=8, max_queue=2)(function)
    first = await blocked(function, double, 0)
    waiting = [asyncio.ensure_future(double(n)) for n in (1, 2)]
    await queued(double.statistics, 2)
    with pytest.raises(QueueFull) as refusal:
        await double(3)
    assert refusal.value.retry_after_s > 0
    function.gate.set()
    assert [await first, *[await one for one in waiting]] == [0, 2, 4]
    assert double.statistics().refusals == {"queue": 1}


async def test_a_cancelled_call_is_not_run() -> None:
    function = Gated(is_open=False)
    double = batched(max_batch_size=8)(function)
    first = await blocked(function, double, 0)
    leaving, staying = [asyncio.ensure_future(double(n)) for n in (1, 2)]
    await queued(double.statistics, 2)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    first.cancel()  # it runs
    with pytest.raises(asyncio.CancelledError):
        await first
    function.gate.set()
    assert await staying == 4
    assert function.batches == [[0], [2]]
    assert double.statistics().cancelled == 2


def test_a_call_ends_at_its_timeout_queued_or_not() -> None:
    async def main() -> None:
        release = asyncio.Event()
        batches: list[list[int]] = []

        @batched(max_batch_size=8)
        async def double(items: list[int]) -> list[int]:
            batches.append(items)
            await release.wait()
            return [item * 2 for item in items]

        loop = asyncio.get_running_loop()
        running = asyncio.ensure_future(double(0, timeout=5))
        await until(lambda: bool(batches))
        with pytest.raises(DeadlineExceeded):
            await double(1, timeout=2)
        assert loop.time() == 2
        with pytest.raises(TimeoutError):
            await running
        assert loop.time() == 5
        release.set()
        assert await double(2, timeout=60) == 4
        assert batches == [[0], [2]]
        statistics = double.statistics()
        assert (statistics.failed, statistics.expired, statistics.queued) == (2, 2, 0)

    run(main())


async def test_a_function_has_a_timeout_for_calls_without_one() -> None:
    function = Gated(is_open=False)
    double = batched(timeout=0.05)(function)
    with pytest.raises(DeadlineExceeded):
        await double(1)
    function.gate.set()
    assert await double(2, timeout=60) == 4


async def test_a_run_that_takes_too_long_is_given_up() -> None:
    function = Gated(is_open=False)
    double = batched(execution_timeout_ms=50)(function)
    with pytest.raises(ExecutionTimeoutError):
        await double(1)
    function.gate.set()
    result = None
    while result is None:  # on a busy machine a thread may begin too late
        with contextlib.suppress(ExecutionTimeoutError):
            result = await double(2)
    assert result == 4


async def test_a_coroutine_that_takes_too_long_is_cancelled() -> None:
    cancelled = asyncio.Event()

    @batched(execution_timeout_ms=20)
    async def wait(items: list[int]) -> list[int]:
        if items == [1]:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        return items

    with pytest.raises(ExecutionTimeoutError):
        await wait(1)
    await cancelled.wait()
    result = None
    while result is None:
        with contextlib.suppress(ExecutionTimeoutError):
            result = await wait(2)
    assert result == 2


async def test_calls_of_higher_priority_run_first() -> None:
    function = Gated(is_open=False)
    double = batched(max_batch_size=1)(function)
    first = await blocked(function, double, 0)
    calls = [asyncio.ensure_future(double(n, priority=priority)) for n, priority in [(1, 0), (2, 9), (3, 1)]]
    await queued(double.statistics, 2)  # the first is with the worker already
    function.gate.set()
    await asyncio.gather(first, *calls)
    assert function.batches == [[0], [3], [1], [2]]
    with pytest.raises(ValueError, match="the priority is -1"):
        await double(1, priority=-1)


async def test_tenants_get_fair_shares_and_have_limits() -> None:
    function = Gated(is_open=False)
    double = batched(max_batch_size=2)(function)
    first = await blocked(function, double, 0)
    flood = [asyncio.ensure_future(double(n, tenant="flood")) for n in range(1, 11)]
    await queued(double.statistics, 8)
    light = asyncio.ensure_future(double(99, tenant="light"))
    await queued(double.statistics, 9)
    limited = Tenant("limited", max_concurrent=1)
    held = asyncio.ensure_future(double(100, tenant=limited))
    await queued(double.statistics, 10)
    with pytest.raises(TenantLimitError, match="'limited' has used 1 of 1 concurrent requests"):
        await double(101, tenant=limited)
    function.gate.set()
    await asyncio.gather(first, light, held, *flood)
    order = list(itertools.chain(*function.batches))
    assert order.index(99) < order.index(7)


async def test_statistics_count_calls_and_batches() -> None:
    function = Gated()
    double = batched(max_batch_size=4)(function)
    assert double.statistics().full_batch_size == 0
    await asyncio.gather(*[double(n) for n in range(6)])
    statistics = double.statistics()
    assert (statistics.accepted, statistics.batches, statistics.queued) == (6, 2, 0)
    assert statistics.batch_sizes == {4: 1, 2: 1}
    assert statistics.mean_batch_size == 3
    assert (statistics.queue_delays.count, statistics.run_times.count) == (6, 2)
    assert 0 < statistics.run_times.quantile_s(0.5) <= statistics.run_times.quantile_s(0.99)


async def test_a_call_is_explained() -> None:
    function = Gated()
    double = batched(max_batch_size=4, max_queue=2)(function)
    one, other = await asyncio.gather(double.explain(1), double.explain(2))
    assert (one.result, other.result) == (2, 4)
    assert (one.batch, one.batch_size, one.reason) == (other.batch, 2, "idle")
    assert min(one.queue_s, one.wait_s, one.run_s, one.answer_s) >= 0
    assert "It ran in batch" in str(one)
    assert "of 2 items, which left because the engine was idle." in str(one)

    def fails(item: int) -> None:
        raise ValueError("bad")

    function.fails = fails
    failed = await double.explain(3)
    with pytest.raises(ValueError, match="bad"):
        _ = failed.result
    assert "and failed with ValueError: bad" in str(failed)
    refused = (await asyncio.gather(*[double.explain(n) for n in range(3)]))[2]
    assert isinstance(refused.error, QueueFull)
    assert "It ran in no batch." in str(refused)


@pytest.fixture
def without_gc() -> Generator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Item:
    """An object that can be referred to weakly."""


class BadItemError(Exception):
    """Another one."""


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("coroutine", [False, True])
async def test_nothing_keeps_items_and_exceptions_once_a_call_has_ended(coroutine: bool) -> None:
    def function(items: list[Item]) -> list[Item]:
        if len(items) == 1:
            raise BadItemError
        return items

    async def on_loop(items: list[Item]) -> list[Item]:
        return function(items)

    same = batched()(on_loop) if coroutine else batched()(function)
    kept = [Item(), Item(), Item()]
    refs: list[weakref.ref[Any]] = [weakref.ref(item) for item in kept]
    await asyncio.gather(*[same(item) for item in kept[:2]])
    try:
        await same(kept[2])
    except BadItemError as error:
        refs.append(weakref.ref(error))
    kept.clear()
    async with asyncio.timeout(WAIT_S):  # the worker's thread may not have left the batch yet
        await until(lambda: not any(ref() for ref in refs))


@pytest.mark.parametrize("options", [{"max_batch_size": 0}, {"concurrency": 0}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="it must be at least 1"):
        ANY(**options)


def test_a_function_must_take_one_list() -> None:
    with pytest.raises(TypeError, match="it takes 0"):
        ANY()(list)
    with pytest.raises(TypeError, match="it takes 3"):
        ANY()(lambda a, b, c: [])
    ANY()(lambda items, normalize=True: items)


async def test_the_function_itself_is_at_hand() -> None:
    def double(items: list[int]) -> list[int]:
        """Double it."""
        return [item * 2 for item in items]

    made = batched()(double)
    assert made.__wrapped__ is double
    assert (made.__doc__, made.__name__) == ("Double it.", "double")  # type: ignore[attr-defined]
    assert "double" in repr(made)


async def test_calls_of_several_iterations_fill_whole_batches() -> None:
    function = Gated(is_open=False)
    double = batched(max_batch_size=4)(function)
    first = await blocked(function, double, 0)
    calls = [asyncio.ensure_future(double(n)) for n in range(1, 4)]
    await queued(double.statistics, 3)
    calls += [asyncio.ensure_future(double(n)) for n in range(4, 10)]
    await until(lambda: double.statistics().accepted == 10)
    function.gate.set()
    assert await asyncio.gather(first, *calls) == [n * 2 for n in range(10)]
    assert function.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


async def test_a_call_that_is_cancelled_before_it_is_queued_is_not_run() -> None:
    function = Gated()
    double = batched(max_batch_size=8)(function)
    calls = [asyncio.ensure_future(double(n)) for n in range(3)]
    await asyncio.sleep(0)  # they have begun
    calls[1].cancel()
    assert [await calls[0], await calls[2]] == [0, 4]
    assert calls[1].cancelled()
    assert function.batches == [[0, 2]]
    statistics = double.statistics()
    assert (statistics.accepted, statistics.cancelled) == (3, 1)


@pytest.mark.parametrize("leaving", [[0], [1, 2], [0, 1, 3]])
async def test_the_others_of_cancelled_calls_get_their_own_rows_of_an_array(leaving: list[int]) -> None:
    gate = Gated(is_open=False)

    def function(items: list[int]) -> NDArray[Any]:
        return np.array([[result, 1] for result in gate(items)])

    double = batched(max_batch_size=8)(function)
    first = await blocked(gate, double, 9)
    calls = [asyncio.ensure_future(double(n)) for n in range(4)]
    await queued(double.statistics, 4)
    for n in leaving:
        calls[n].cancel()
    await asyncio.wait([calls[n] for n in leaving])
    gate.gate.set()
    assert (await first).tolist() == [18, 1]
    for n in set(range(4)) - set(leaving):
        assert (await calls[n]).tolist() == [n * 2, 1]
    assert gate.batches[1] == [n for n in range(4) if n not in leaving]
    assert double.statistics().cancelled == len(leaving)


async def test_calls_that_all_leave_make_room_in_the_queue() -> None:
    function = Gated(is_open=False)
    double = batched(max_batch_size=8, max_queue=3)(function)
    first = await blocked(function, double, 0)
    calls = [asyncio.ensure_future(double(n)) for n in range(1, 4)]
    await queued(double.statistics, 3)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    statistics = double.statistics()
    assert (statistics.queued, statistics.cancelled) == (0, 3)
    last = asyncio.ensure_future(double(4))
    await queued(double.statistics, 1)
    function.gate.set()
    assert [await first, await last] == [0, 8]
    assert function.batches == [[0], [4]]
