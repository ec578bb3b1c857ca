"""The decorator: a function on lists becomes a coroutine function on single items that share batches."""

from __future__ import annotations

import functools
import inspect
import weakref
from asyncio import CancelledError, Future
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any, Generic, Literal, Protocol, TypedDict, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cobatch.batcher.library.call import Call, Explanation, explained
from cobatch.batcher.library.runner import Core, Plan, Runner
from cobatch.batcher.library.statistics import Ledger, Statistics
from cobatch.batcher.tenant import Tenant
from cobatch.engines.python.pickled import Wrapper, refer_to

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
D = TypeVar("D", bound=np.generic)
S_contra = TypeVar("S_contra", contravariant=True)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class CallOptions(TypedDict, total=False):
    """The options of a call."""

    timeout: float | None
    priority: int
    tenant: str | Tenant | None


class BatchOptions(TypedDict, total=False):
    """The options of `batched` that do not change the types of items and results."""

    max_batch_size: int
    max_queue: int | None
    max_delay_ms: float
    latency_target_ms: float | None
    timeout: float | None
    execution_timeout_ms: float | None
    concurrency: int
    run_in: Literal["thread", "process"]
    name: str | None


class Batched(Wrapper, Generic[T, R]):
    """A batched function: `await embed(item)` returns the result of `item`, computed in a batch with others.

    `__wrapped__` of a function, but not of a method, is the function itself, on a list.
    """

    def __init__(self, core: Core, ledger: Ledger, of: object = None) -> None:
        self._core = core
        self._ledger = ledger
        self._of = of  # the object whose method it is lives while it is called

    async def __call__(
        self,
        item: T,
        /,
        timeout: float | None = None,  # noqa: ASYNC109 - the deadline is the scheduler's, too
        priority: int = 0,
        tenant: str | Tenant | None = None,
    ) -> R:
        """Return the result of one item. Raises the function's exception, or one of cobatch's errors.

        `timeout`: seconds until it must be answered (DeadlineExceeded); as soon as that cannot be met, it is
        refused or leaves the queue. `priority`: 1 is the highest, 0 the default. `tenant`: the name or
        account of the caller on whose behalf it runs; tenants get fair shares. Raises QueueFull if there is
        no room.
        """
        core = self._core
        if timeout is not None or tenant is not None or priority or core.always_alone:
            return await self._alone(item, timeout=timeout, priority=priority, tenant=tenant)
        future: Future[R] = Future()  # of the running loop
        pending = core.pending
        if pending is None or pending.loop is not future.get_loop():
            pending = core.gather()
        pending.items.append(item)
        pending.futures.append(future)
        try:
            return await future
        except CancelledError:
            if future.cancelled():
                pending.leave(pending)
            raise
        finally:
            del future, pending  # the exception refers to this frame

    async def _alone(self, item: T, **options: Unpack[CallOptions]) -> R:
        """Queue a call as a request of its own."""
        call = None
        future: Future[R] = Future()
        runner = self._core.runner()
        try:
            call = self._submit(runner, item, future, **options)
            return await future
        finally:
            if call is not None:
                self._end(runner, call, future)
            del call, future

    async def explain(self, item: T, /, **options: Unpack[CallOptions]) -> Explanation[R]:
        """Call the function, and return its result or exception with where the time of the call went."""
        call, value, failure = None, None, None
        future: Future[R] = Future()
        runner = self._core.runner()
        try:
            call = self._submit(runner, item, future, **options)
            value = await future
        except Exception as error:  # noqa: BLE001 - it is a part of the explanation
            failure = error
        finally:
            if call is not None:
                self._end(runner, call, future)
        try:
            return explained(value, failure, call, monotonic())
        finally:
            del call, future, failure

    @staticmethod
    def _end(runner: Runner, call: Call, future: Future[R]) -> None:
        if call.timer is not None:
            call.timer.cancel()
        if future.cancelled():
            runner.batcher.cancel(call)

    def statistics(self) -> Statistics:
        """Return the counts of all calls, on all event loops. Any thread may ask."""
        return self._ledger.statistics()

    def _submit(
        self,
        runner: Runner,
        item: Any,
        future: Future[R],
        *,
        timeout: float | None = None,
        priority: int = 0,
        tenant: str | Tenant | None = None,
    ) -> Call:
        plan = self._core.plan
        call = Call(item, future)
        if plan.stack:
            call.item = array = np.asarray(item)
            # Arrays of another dtype share no batch either: it would be converted to that of the others.
            call.row_shapes = array.shape, tuple(array.dtype.str.encode())
        if priority:
            if priority < 0:
                raise ValueError(f"the priority is {priority}, 1 is the highest, 0 the default")
            call.priority = priority
        if tenant is not None:
            call.tenant = runner.tenant(tenant) if isinstance(tenant, str) else tenant
        if timeout is None:
            timeout = plan.timeout
        call.timeout_s = timeout
        runner.batcher.submit(call)
        if timeout is not None:
            call.timer = runner.loop.call_later(timeout, runner.batcher.end_late, call)
        return call

    def __repr__(self) -> str:
        return f"<batched {self._core.plan.name}>"


class BatchedMethod(Generic[S_contra, T, R]):
    """A batched method: each object's calls share batches, those of different objects do not.

    Objects are held weakly; they need not be hashable. `statistics` sums over all of them.
    """

    def __init__(self, function: Callable[..., Any], plan: Plan) -> None:
        self.__wrapped__, self.__doc__ = function, function.__doc__
        self._function = function
        self._plan = plan
        self._ledger = Ledger(plan.name, plan.max_batch_size)
        self._objects: dict[int, tuple[weakref.ref[Any], Core, Ledger]] = {}

    @overload
    def __get__(self, instance: None, owner: type) -> BatchedMethod[S_contra, T, R]: ...
    @overload
    def __get__(self, instance: S_contra, owner: type) -> Batched[T, R]: ...

    def __get__(self, instance: Any, owner: type) -> BatchedMethod[S_contra, T, R] | Batched[T, R]:
        if instance is None:
            return self
        known = self._objects.get(id(instance))
        if known is None or known[0]() is not instance:
            known = self._objects[id(instance)] = self._add(instance)
        _, core, ledger = known
        return Batched(core, ledger, instance)

    def _add(self, instance: object) -> tuple[weakref.ref[Any], Core, Ledger]:
        objects, function, number = self._objects, self._function, id(instance)

        def forget(gone: weakref.ref[Any]) -> None:
            known = objects.get(number)
            if known is not None and known[0] is gone:
                del objects[number]

        ref = weakref.ref(instance, forget)
        # Its callers hold the object; without a caller no result is needed.
        method = functools.partial(_call_method, function, ref)
        ledger = Ledger(self._plan.name, self._plan.max_batch_size)
        return ref, Core(self._plan, method, self._ledger, ledger), ledger

    def statistics(self) -> Statistics:
        """Return the counts of all calls, of all objects. Any thread may ask."""
        return self._ledger.statistics()


def _call_method(function: Callable[[Any, Any], Any], ref: weakref.ref[Any], items: Any) -> Any:
    return function(ref(), items)


class ListDecorator(Protocol):
    """Makes a function on lists, or a method, a batched one."""

    @overload
    def __call__(self, function: Callable[[list[T]], Awaitable[Sequence[R]]], /) -> Batched[T, R]: ...
    @overload
    def __call__(self, function: Callable[[list[T]], NDArray[D]], /) -> Batched[T, NDArray[D]]: ...
    @overload
    def __call__(self, function: Callable[[list[T]], Sequence[R]], /) -> Batched[T, R]: ...
    @overload
    def __call__(
        self, function: Callable[[S, list[T]], Awaitable[Sequence[R]]], /
    ) -> BatchedMethod[S, T, R]: ...
    @overload
    def __call__(
        self, function: Callable[[S, list[T]], NDArray[D]], /
    ) -> BatchedMethod[S, T, NDArray[D]]: ...
    @overload
    def __call__(self, function: Callable[[S, list[T]], Sequence[R]], /) -> BatchedMethod[S, T, R]: ...


class ArrayDecorator(Protocol):
    """Makes a function on stacked arrays, or a method, a batched one."""

    @overload
    def __call__(
        self, function: Callable[[NDArray[Any]], Awaitable[NDArray[D]]], /
    ) -> Batched[ArrayLike, NDArray[D]]: ...
    @overload
    def __call__(
        self, function: Callable[[NDArray[Any]], NDArray[D]], /
    ) -> Batched[ArrayLike, NDArray[D]]: ...
    @overload
    def __call__(self, function: Callable[[NDArray[Any]], Sequence[R]], /) -> Batched[ArrayLike, R]: ...
    @overload
    def __call__(
        self, function: Callable[[S, NDArray[Any]], Awaitable[NDArray[D]]], /
    ) -> BatchedMethod[S, ArrayLike, NDArray[D]]: ...
    @overload
    def __call__(
        self, function: Callable[[S, NDArray[Any]], NDArray[D]], /
    ) -> BatchedMethod[S, ArrayLike, NDArray[D]]: ...
    @overload
    def __call__(
        self, function: Callable[[S, NDArray[Any]], Sequence[R]], /
    ) -> BatchedMethod[S, ArrayLike, R]: ...


@overload
def batched(*, stack: Literal[True], **options: Unpack[BatchOptions]) -> ArrayDecorator: ...
@overload
def batched(*, stack: Literal[False] = False, **options: Unpack[BatchOptions]) -> ListDecorator: ...
def batched(
    *,
    stack: bool = False,
    max_batch_size: int = 64,
    max_queue: int | None = None,
    max_delay_ms: float = 0.0,
    latency_target_ms: float | None = None,
    timeout: float | None = None,
    execution_timeout_ms: float | None = None,
    concurrency: int = 1,
    run_in: Literal["thread", "process"] = "thread",
    name: str | None = None,
) -> Any:
    """Batch the calls of a function, or of a method, that takes a list and returns a list of equal length.

    A function runs in a thread of its own, a coroutine function on the event loop. After an exception its
    batch runs again in halves, so it may get an item several times; the callers whose items fail alone get
    the exception.

    `stack`: items are arrays; the function gets those of one shape and dtype stacked, [n, ...].
    `max_queue`: most items in the queue (16 batches, at least 1024); more raise QueueFull.
    `max_delay_ms`: how long an item may wait for others while no batch runs.
    `latency_target_ms`: keeps batches so small that an answer takes no longer.
    `timeout`: of calls that have none, in seconds. `execution_timeout_ms`: a run that takes longer is given
    up, and its calls raise ExecutionTimeoutError. `concurrency`: batches that run at once.
    `run_in`: "process" runs the function, which another process must be able to import, in a process of its
    own, to which items and results are pickled. A crash there fails the item that caused it.
    `name`: for errors, logs and metrics; that of the function by default.
    """
    for what, value in (("max_batch_size", max_batch_size), ("concurrency", concurrency)):
        if value < 1:
            raise ValueError(f"{what} is {value}, it must be at least 1")

    def decorate(function: Callable[..., Any]) -> Any:
        title = str(name or getattr(function, "__qualname__", type(function).__name__))
        coroutine = _is_coroutine_function(function)
        method = _is_method(function, title)
        if run_in == "process" and (coroutine or method):
            kind = "method" if method else "coroutine function"
            raise TypeError(f"{title} cannot run in a process: it is a {kind}")
        plan = Plan(
            title,
            coroutine,
            refer_to(function, title, stack=stack) if run_in == "process" else None,
            stack,
            max_batch_size,
            max(1024, 16 * max_batch_size) if max_queue is None else max_queue,
            max_delay_ms,
            latency_target_ms,
            timeout,
            execution_timeout_ms,
            concurrency,
        )
        if method:
            return BatchedMethod(function, plan)
        ledger = Ledger(plan.name, max_batch_size)
        return functools.update_wrapper(Batched[Any, Any](Core(plan, function, ledger), ledger), function)

    return decorate


def _is_coroutine_function(function: Callable[..., Any]) -> bool:
    call = type(function).__call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _is_method(function: Callable[..., Any], name: str) -> bool:
    """Return whether it takes an object before its list. Raises TypeError if it takes neither one nor two."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # one of C
        return False
    needed = [one for one in parameters if one.kind in _POSITIONAL and one.default is one.empty]
    several = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    if len(needed) not in (1, 2) and not (several and not needed):
        raise TypeError(f"{name} must take one argument, the list of items; it takes {len(needed)}")
    return len(needed) == 2
