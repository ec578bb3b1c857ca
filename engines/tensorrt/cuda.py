"""CUDA's driver through PyCUDA: the only file that imports it.

Every object made here belongs to the thread that made it, and goes there: PyCUDA's context stack is the
thread's own, and what is dropped on another thread is not freed but leaked. For that reason page-locked
memory is freed by its last reference and never by hand: a view of it may still be read elsewhere, and a
leak at the end is better than reading memory that is gone. A context takes its page-locked memory along, so
one whose memory is still read is not let go at all. (Registering memory of our own with the driver would
avoid that, but PyCUDA 2026.1's `register_host_memory` crashes with NumPy 2.)

What PyCUDA says of an error is its class and one line, "cuMemAlloc failed: out of memory". Most errors
that come out of a queued operation are sticky: the context answers them to every later call, and only a
new one helps. So whatever is not known to be harmless counts as the end of the engine.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from cobatch.engines.base import Array
from cobatch.engines.errors import EngineDeadError, EngineError, EngineLoadError, EngineRunError

_INSTALL = "pip install 'cobatch[tensorrt]'"
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with the default stream, which libraries use
# After these the context works on; the words are cuGetErrorString's.
_HARMLESS = {
    "out of memory",
    "invalid argument",
    "too many resources requested for launch",
    "operation not supported",
    "device not ready",
}
# TensorRT reports errors of CUDA in words of its own, with these among them.
_STICKY = (
    "illegal memory access",
    "unspecified launch failure",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "device-side assert",
    "hardware stack error",
    "launch timed out",
    "uncorrectable ECC error",
    "context is destroyed",
    "invalid device context",
)
_FAILED = re.compile(r"(\w+) failed: (.*)", re.DOTALL)

# GPUs whose primary context has seen a sticky error. It lives on while anybody in the process holds it,
# and TensorRT's own libraries do, so an engine that opens anew there makes a context of its own.
_spoilt: set[int] = set()
_lock = threading.Lock()


class CallError(Exception):
    """A call of CUDA's failed that did not go through PyCUDA; in the words that PyCUDA would use."""


def is_sticky(text: str) -> bool:
    """Whether an error with these words leaves a CUDA context that cannot be used any more."""
    return any(words in text for words in _STICKY)


def as_engine_error(error: BaseException) -> EngineError:
    """What an exception of PyCUDA's or another's means for the engine; no reference to it is kept."""
    if isinstance(error, EngineError):
        dead = isinstance(error, EngineDeadError)
        return EngineDeadError(str(error)) if dead else EngineRunError(str(error))
    text = f"{type(error).__name__}: {error}"
    if not (type(error).__module__.startswith("pycuda") or isinstance(error, CallError)):
        return EngineRunError(text)
    found = _FAILED.fullmatch(str(error))
    harmless = found is not None and found[2] in _HARMLESS
    return EngineRunError(text) if harmless else EngineDeadError(text)


def load_pycuda() -> Any:
    """`pycuda.driver`, initialised. Raises EngineLoadError."""
    try:
        cuda = importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise EngineLoadError(f"PyCUDA cannot be used here: {error}; {_INSTALL}") from None
    try:
        cuda.init()
    except cuda.Error as error:
        raise EngineLoadError(f"CUDA cannot be used here: {error}") from None
    return cuda


def gpu_identity(device: int) -> tuple[str, str]:
    """A GPU's name and compute capability, such as ("NVIDIA H100", "9.0"). Raises EngineLoadError."""
    cuda = load_pycuda()
    gpu = _gpu(cuda, device)
    major, minor = gpu.compute_capability()
    return str(gpu.name()), f"{major}.{minor}"


def _gpu(cuda: Any, device: int) -> Any:
    try:
        count = cuda.Device.count()
        if not 0 <= device < count:
            raise EngineLoadError(f"there is no GPU {device}: CUDA sees {count}")
        return cuda.Device(device)
    except cuda.Error as error:
        raise EngineLoadError(f"GPU {device} cannot be used: {error}") from None


def _sound_primary(cuda: Any, gpu: Any) -> Any | None:
    """The GPU's primary context, made current; None where somebody else has spoilt it."""
    primary = gpu.retain_primary_context()
    # PyCUDA would let go of it as of any other context, and fail, unless it is told to `detach`.
    try:
        primary.push()
        cuda.mem_get_info()
    except cuda.Error as error:
        primary.detach()
        if isinstance(as_engine_error(error), EngineDeadError):
            return None
        raise
    return primary


class Device:
    """A GPU with its context current on this thread, from `open` to `close`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.cuda: Any = None
        self._context: Any = None

    def open(self) -> None:
        """Raises EngineLoadError."""
        self.cuda = cuda = load_pycuda()
        gpu = _gpu(cuda, self.number)
        try:
            self._context = None if self._is_spoilt() else _sound_primary(cuda, gpu)
            if self._context is None:
                self._note(dead=True)
                self._context = gpu.make_context()
        except cuda.Error as error:
            raise EngineLoadError(f"GPU {self.number} gives no context: {error}") from None

    def _is_spoilt(self) -> bool:
        with _lock:
            return self.number in _spoilt

    def close(self, dead: bool) -> None:
        """Let the context go; objects of it that are left become harmless. `dead`: it was spoilt."""
        self._note(dead)
        if self._context is not None:
            # While it is current: PyCUDA ends the process over a thread that ends with one on its stack.
            context, self._context = self._context, None
            context.detach()

    def keep(self, objects: Any, dead: bool) -> None:
        """Close without letting the context go, or anything of it: some of its memory is still read."""
        self._note(dead)
        context, self._context = self._context, None
        # For ever: at the interpreter's end PyCUDA would try, from another thread and in a context of which
        # it knows nothing.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((context, objects)))
        context.pop()

    def _note(self, dead: bool) -> None:
        if dead:
            with _lock:
                _spoilt.add(self.number)

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        free, total = self.cuda.mem_get_info()
        return int(free), int(total)

    def stream(self) -> Any:
        """A stream of its own."""
        return self.cuda.Stream(_NON_BLOCKING)

    def event(self) -> Any:
        """An event to wait for without spinning: the event loop needs the core."""
        flags = self.cuda.event_flags
        return self.cuda.Event(int(flags.BLOCKING_SYNC) | int(flags.DISABLE_TIMING))

    def allocate(self, size: int) -> Any:
        """Device memory; `int` of it is its address. Aligned to 256 bytes at least, as TensorRT wants it.

        Raises MemoryError.
        """
        return self._allocated(self.cuda.mem_alloc, max(1, size))

    def pinned(self, size: int) -> Array:
        """Page-locked host memory, zeroed, as bytes. Raises MemoryError."""
        memory: Array = self._allocated(self.cuda.pagelocked_empty, max(1, size), np.uint8)
        memory.fill(0)
        return memory

    def _allocated(self, allocate: Callable[..., Any], *arguments: Any) -> Any:
        # PyCUDA's MemoryError is none of Python's.
        try:
            return allocate(*arguments)
        except self.cuda.MemoryError:
            pass
        raise MemoryError
