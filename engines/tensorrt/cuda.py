"""What an engine asks of its GPU's memory, and what would fit where it is too much.

CUDA's driver through PyCUDA: the only file that imports it.

Every object made here belongs to the thread that made it, and goes there: PyCUDA's context stack is the
thread's own, and what is dropped on another thread is not freed but leaked. For that reason page-locked
memory is freed by its last reference and never by hand: a view of it may still be read elsewhere, and a
leak at the end is better than reading memory that is gone. A context takes its page-locked memory along, so
one whose memory is still read is not let go at all. (Registering memory of our own with the driver would
avoid that, but PyCUDA 2026.1's `register_host_memory` crashes with NumPy 2.)

What PyCUDA says of an error is its class and one line, "cuMemAlloc failed: out of memory". Most errors
that come out of a queued operation are sticky: the context answers them to every later call, and only a
new one helps. So whatever is not known to be harmless counts as the end of the engine.

CUDA graphs through NVIDIA's cuda-bindings, on PyCUDA's stream: PyCUDA itself knows none.

Optional: without the package a batch is enqueued call by call. A graph holds the copies and the kernels of
one batch size in one slot and is launched with one call.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cobatch.engines.base import Array
from cobatch.engines.errors import EngineDeadError, EngineError, EngineLoadError, EngineRunError

_SHARE = 0.95
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


class OutOfMemoryError(EngineLoadError):
    """An allocation at load failed. `what` and how many bytes."""

    def __init__(self, what: str, size: int) -> None:
        super().__init__(f"{show_bytes(size)} for {what}")


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes on the GPU, beside the weights. `working`: TensorRT's own, of a slot's execution contexts;
    `buffers`: a slot's inputs and outputs, at `rows` rows."""

    slots: int
    rows: int
    working: int
    buffers: int

    @property
    def total(self) -> int:
        """Of all slots."""
        return self.slots * (self.working + self.buffers)

    def fitting_rows(self, free: int) -> int:
        """The largest batch that would fit. Both kinds of memory grow about as the rows do; a little is left
        for what grows otherwise."""
        return min(self.rows, int(free * _SHARE) * self.rows // max(1, self.total))

    def refusal(self, gpu: str, failed: str, free: int) -> str:
        """What to tell who asked for the model. `free`: before anything of this was allocated."""
        rows = self.fitting_rows(free)
        if rows >= self.rows:
            hint = "which should have been enough: another process may have taken it meanwhile"
        elif rows:
            hint = f"max_batch_size = {rows} would fit, with a plan that is built for it"
        else:
            hint = "not even one row would fit"
        return (
            f"{gpu} is out of memory: {failed}. Beside its weights the model needs {show_bytes(self.total)} "
            f"for batches of {self.rows} rows ({self.slots} slots, each {show_bytes(self.working)} for "
            f"TensorRT and {show_bytes(self.buffers)} for inputs and outputs); {show_bytes(free)} were free; "
            f"{hint}"
        )


def working_memory(engine: Any, profile: int) -> int:
    """Bytes that an execution context of this profile takes; 0 where this TensorRT does not say."""
    for name in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
        if hasattr(engine, name):
            return max(0, int(getattr(engine, name)(profile)))
    return 0


def show_bytes(size: int) -> str:
    """Such as "1.5 GiB"."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


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


class CaptureError(EngineRunError):
    """This work cannot be captured; it can be enqueued all the same."""


def load_graphs() -> Any | None:
    """cuda-bindings' driver module, None where it is not installed or finds no driver. Raises CallError."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        # It looks for the driver's library at the first call.
        (code,) = driver.cuInit(0)
    except (ImportError, RuntimeError, OSError):
        return None
    if code != driver.CUresult.CUDA_SUCCESS:
        raise CallError(_words(driver, "cuInit", code))
    return driver


def _words(driver: Any, name: str, code: Any) -> str:
    _, text = driver.cuGetErrorString(code)
    return f"{name} failed: {text.decode() if isinstance(text, bytes) else code}"


class Graph:
    """A captured and instantiated graph. Belongs to the thread and the context that it was made in."""

    def __init__(self, driver: Any, stream: int, work: Callable[[], None]) -> None:
        """Capture what `work` enqueues on the stream (a handle). The same work must have run there before.

        Raises CaptureError, or what `work` raises, and the stream can be used on; or EngineDeadError.
        """
        self._driver = driver
        self._stream = driver.CUstream(stream)
        self._launch = driver.cuGraphLaunch
        self._done = driver.CUresult.CUDA_SUCCESS
        self._exec: Any = None
        # Other threads go on with their own work meanwhile.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(driver.cuStreamBeginCapture, self._stream, mode)
        failed = True
        try:
            work()
            failed = False
        finally:
            code, graph = driver.cuStreamEndCapture(self._stream)
            if failed and code == self._done and int(graph):
                driver.cuGraphDestroy(graph)
        if code != self._done:
            raise self._not_ended(code)
        self._exec = self._call(driver.cuGraphInstantiate, graph, 0)
        self._call(driver.cuGraphDestroy, graph)

    def launch(self) -> None:
        """Enqueue all of it. Raises CallError."""
        (code,) = self._launch(self._exec, self._stream)
        if code != self._done:
            raise CallError(_words(self._driver, "cuGraphLaunch", code))

    def close(self) -> None:
        """Free it. Raises as the constructor does."""
        made, self._exec = self._exec, None
        if made is not None:
            self._call(self._driver.cuGraphExecDestroy, made)

    def _not_ended(self, code: Any) -> EngineError:
        """Why there is no graph. A stream that is still being captured can be used for nothing else."""
        text = _words(self._driver, "cuStreamEndCapture", code)
        if is_sticky(text):
            return EngineDeadError(text)
        asked, status = self._driver.cuStreamIsCapturing(self._stream)
        free = self._driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        return CaptureError(text) if asked == self._done and status == free else EngineDeadError(text)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        code, *results = function(*arguments)
        if code != self._done:
            text = _words(self._driver, function.__name__, code)
            raise EngineDeadError(text) if is_sticky(text) else CaptureError(text)
        return results[0] if results else None
