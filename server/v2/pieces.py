"""Long work in pieces, in a thread: decoding and encoding that would keep the event loop from others.

What holds the interpreter lock stops the event loop from any thread. So the work is cut into calls of about a
millisecond, and after each millisecond the thread sleeps for a moment, so that the event loop gets the lock:
while 8 million numbers were read, it waited 4 ms at most; 20 ms if the lock is left to the switch interval,
57 ms if the numbers are read in one call.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, ParamSpec, TypeVar

_RELEASE_S = 50e-6
_WORK_S = 1e-3
# One: the lock would let no second one run.
_thread = ThreadPoolExecutor(1, "cobatch-codec")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Turn(threading.local):
    began_s = 0.0


_turn = _Turn()


def release() -> None:
    """Let the event loop have the interpreter lock after a millisecond, unless this is its thread."""
    if threading.current_thread() is threading.main_thread():
        return
    if time.perf_counter() - _turn.began_s > _WORK_S:
        time.sleep(_RELEASE_S)
        _turn.began_s = time.perf_counter()


class _Call(Generic[_T]):
    """A call that is waiting for the thread. The queue of a cancelled one keeps it, so it keeps nothing."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work: Callable[[], _T] | None = work

    def __call__(self) -> _T:
        work, self._work = self._work, None
        assert work is not None
        # An answer takes the lock several times, on the event loop and on the worker's thread, and would wait
        # for a whole interval each time. Without work here a short interval costs 4 % of a small request.
        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(min(_WORK_S, interval_s))
        try:
            return work()
        finally:
            sys.setswitchinterval(interval_s)

    def drop(self, _: object) -> None:
        self._work = None


def in_pieces(work: Callable[_P, _T], *args: _P.args, **options: _P.kwargs) -> asyncio.Future[_T]:
    """Call a function that calls `release` between its pieces, in the thread.

    Cancel the future to let go of the function's arguments.
    """
    call = _Call(partial(work, *args, **options))
    future = asyncio.get_running_loop().run_in_executor(_thread, call)
    future.add_done_callback(call.drop)
    return future
