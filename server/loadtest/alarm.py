"""Waking an event loop at a moment, to the microsecond.

uvloop's own timers are rounded to whole milliseconds: too coarse for servers that answer in 0.1. Linux has
a clock that is read like a file; elsewhere the loop's timers have to do, and the report says how late sends
were.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable

_CLOCK_MONOTONIC = 1  # what time.monotonic reads
_ABSOLUTE = 1
_FLAGS = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class Alarm:
    """Calls back once for each `set`, at its moment or right after."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._file = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, _FLAGS)
        if self._file >= 0:
            self._spec = _Itimerspec()
            self._pointer = ctypes.byref(self._spec)
            loop.add_reader(self._file, self._on_file)

    def set(self, moment_s: float) -> None:
        """Ring at this moment of `time.monotonic`, at once where it has passed; forget any other."""
        if self._file < 0:
            if self._handle is not None:
                self._handle.cancel()
            self._handle = self._loop.call_at(moment_s, self._callback)
            return
        seconds = int(moment_s)
        value = self._spec.it_value
        value.tv_sec = seconds
        value.tv_nsec = int((moment_s - seconds) * 1e9)
        self._libc.timerfd_settime(self._file, _ABSOLUTE, self._pointer, None)

    def _on_file(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:  # set anew since the loop saw it ring
            return
        self._callback()

    def close(self) -> None:
        """Never ring again."""
        if self._handle is not None:
            self._handle.cancel()
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1
