"""CUDA through PyCUDA: context, streams, memory, errors; CUDA graphs through NVIDIA's cuda-bindings.

The only module that imports PyCUDA.

Threads: each object belongs to the thread that created it and must be freed there. PyCUDA's context stack is
per thread, and an object dropped on another thread leaks. So page-locked memory is freed by its last
reference and never explicitly: a view of it may still be in use, and a leak is better than reading freed
memory. Destroying a context frees its page-locked memory, so a context whose memory is still in use is kept.
(Registering our own memory with the driver would avoid that, but PyCUDA 2026.1's `register_host_memory`
crashes with NumPy 2.)

Errors: PyCUDA reports a class and one line, "cuMemAlloc failed: out of memory". Most errors of queued
operations are sticky: the context returns them for every later call. So each error that is not known to be
harmless ends the engine.

Graphs: PyCUDA has none, so cuda-bindings captures them on PyCUDA's stream. A graph holds the copies and
kernels of one batch size in one slot and is launched with one call. Without the package a batch is enqueued
call by call.
"""

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

_USABLE_SHARE = 0.95  # of the free memory: some of it does not grow with the rows
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


class OutOfMemoryError(EngineLoadError):
    """An allocation of `size` bytes at load failed."""

    def __init__(self, what: str, size: int) -> None:
        super().__init__(f"{show_bytes(size)} for {what}")


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes needed on the GPU besides the weights.

    `working`: TensorRT's working memory of a slot; `buffers`: a slot's inputs and outputs at `rows` rows.
    """

    slots: int
    rows: int
    working: int
    buffers: int

    @property
    def total(self) -> int:
        """Bytes of all slots."""
        return self.slots * (self.working + self.buffers)

    def fitting_rows(self, free: int) -> int:
        """Return the largest batch that would fit, as memory grows about linearly with the rows."""
        return min(self.rows, int(free * _USABLE_SHARE) * self.rows // max(1, self.total))

    def refusal(self, gpu: str, failed: str, free: int) -> str:
        """Return the error text. `failed`: the failed allocation; `free`: bytes free before the first."""
        rows = self.fitting_rows(free)
        if rows >= self.rows:
            hint = "which should suffice: another process may have taken memory in the meantime"
        elif rows:
            hint = f"max_batch_size = {rows} would fit, with a plan built for it"
        else:
            hint = "not even one row would fit"
        return (
            f"{gpu} is out of memory: {failed}. Besides its weights the model needs {show_bytes(self.total)} "
            f"for batches of {self.rows} rows ({self.slots} slots, each {show_bytes(self.working)} for "
            f"TensorRT and {show_bytes(self.buffers)} for inputs and outputs); {show_bytes(free)} were free; "
            f"{hint}"
        )


def working_memory(engine: Any, profile: int) -> int:
    """Return the bytes of an execution context of this profile; 0 if this TensorRT does not tell."""
    for name in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
        if hasattr(engine, name):
            return max(0, int(getattr(engine, name)(profile)))
    return 0


def show_bytes(size: int) -> str:
    """Format a size, such as "1.5 GiB"."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


_INSTALL = "pip install 'cobatch[tensorrt]'"
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not synchronised with the default stream, which libraries use
# Errors, as cuGetErrorString words them, that leave the context usable.
_HARMLESS = {
    "out of memory",
    "invalid argument",
    "too many resources requested for launch",
    "operation not supported",
    "device not ready",
}
# Parts of the texts of errors that make the context unusable; TensorRT quotes them in its own texts.
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

# GPUs whose primary context has had a sticky error. TensorRT's libraries keep that context alive, so an
# engine that is opened later creates its own context.
_corrupt: set[int] = set()
_lock = threading.Lock()


class CallError(Exception):
    """A CUDA call outside PyCUDA failed; the text is like PyCUDA's."""


def is_sticky(text: str) -> bool:
    """Return True if an error with this text leaves the CUDA context unusable."""
    return any(words in text for words in _STICKY)


def as_engine_error(error: BaseException) -> EngineError:
    """Return the engine error for any exception, without a reference to it."""
    if isinstance(error, EngineError):
        dead = isinstance(error, EngineDeadError)
        return EngineDeadError(str(error)) if dead else EngineRunError(str(error))
    text = f"{type(error).__name__}: {error}"
    if not (type(error).__module__.startswith("pycuda") or isinstance(error, CallError)):
        return EngineRunError(text)
    match = _FAILED.fullmatch(str(error))
    harmless = match is not None and match[2] in _HARMLESS
    return EngineRunError(text) if harmless else EngineDeadError(text)


def load_pycuda() -> Any:
    """Import and initialise `pycuda.driver`. Raises EngineLoadError."""
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
    """Return a GPU's name and compute capability, as ("NVIDIA H100", "9.0"). Raises EngineLoadError."""
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


def _usable_primary(cuda: Any, gpu: Any) -> Any | None:
    """Make the GPU's primary context current and return it; None if it is unusable."""
    primary = gpu.retain_primary_context()
    # Without `detach` PyCUDA would release it as a context of its own, and fail.
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
    """A GPU whose context is current on this thread from `open` to `close`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.cuda: Any = None
        self._context: Any = None

    def open(self) -> None:
        """Create the context. Raises EngineLoadError."""
        self.cuda = cuda = load_pycuda()
        gpu = _gpu(cuda, self.number)
        try:
            self._context = None if self._is_corrupt() else _usable_primary(cuda, gpu)
            if self._context is None:
                self._mark_corrupt(dead=True)
                self._context = gpu.make_context()
        except cuda.Error as error:
            raise EngineLoadError(f"no context on GPU {self.number}: {error}") from None

    def _is_corrupt(self) -> bool:
        with _lock:
            return self.number in _corrupt

    def close(self, dead: bool) -> None:
        """Release the context; its remaining objects become harmless. `dead`: it had a sticky error."""
        self._mark_corrupt(dead)
        if self._context is not None:
            # While it is current: PyCUDA aborts the process if a thread ends with a context on its stack.
            context, self._context = self._context, None
            context.detach()

    def keep(self, objects: Any, dead: bool) -> None:
        """Close, but keep the context and its `objects` for ever: some of its memory is still in use."""
        self._mark_corrupt(dead)
        context, self._context = self._context, None
        # A reference that is never dropped: at the interpreter's end PyCUDA would free the context from
        # another thread, where it is not on the stack.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object((context, objects)))
        context.pop()

    def _mark_corrupt(self, dead: bool) -> None:
        if dead:
            with _lock:
                _corrupt.add(self.number)

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes."""
        free, total = self.cuda.mem_get_info()
        return int(free), int(total)

    def stream(self) -> Any:
        """Create a stream."""
        return self.cuda.Stream(_NON_BLOCKING)

    def event(self) -> Any:
        """Create an event that is waited for without spinning: the event loop needs the core."""
        flags = self.cuda.event_flags
        return self.cuda.Event(int(flags.BLOCKING_SYNC) | int(flags.DISABLE_TIMING))

    def allocate(self, size: int) -> Any:
        """Allocate device memory, aligned to 256 bytes as TensorRT requires; `int` of it is its address.

        Raises MemoryError.
        """
        return self._allocated(self.cuda.mem_alloc, max(1, size))

    def pinned(self, size: int) -> Array:
        """Allocate zeroed page-locked host memory, as bytes. Raises MemoryError."""
        memory: Array = self._allocated(self.cuda.pagelocked_empty, max(1, size), np.uint8)
        memory.fill(0)
        return memory

    def _allocated(self, allocate: Callable[..., Any], *arguments: Any) -> Any:
        # PyCUDA's MemoryError is no subclass of Python's.
        try:
            return allocate(*arguments)
        except self.cuda.MemoryError:
            pass
        raise MemoryError


class CaptureError(EngineRunError):
    """This work cannot be captured in a graph, but can be enqueued."""


def load_graphs() -> Any | None:
    """Import cuda-bindings' driver module; None if it is missing or finds no driver. Raises CallError."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        # The first call looks for the driver's library.
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
    """A captured and instantiated graph. Belongs to the thread and context that created it."""

    def __init__(self, driver: Any, stream: int, work: Callable[[], None]) -> None:
        """Capture what `work` enqueues on the stream (a handle), where it must have run before.

        Raises CaptureError or an error of `work`, which leave the stream usable, or EngineDeadError.
        """
        self._driver = driver
        self._stream = driver.CUstream(stream)
        self._launch = driver.cuGraphLaunch
        self._done = driver.CUresult.CUDA_SUCCESS
        self._exec: Any = None
        # Other threads may use CUDA during the capture.
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
            raise self._capture_failure(code)
        try:
            self._exec = self._call(driver.cuGraphInstantiate, graph, 0)
        finally:
            self._call(driver.cuGraphDestroy, graph)
        try:
            # Else the first replay does this, while a batch waits.
            self._call(driver.cuGraphUpload, self._exec, self._stream)
        except CaptureError:
            self.close()
            raise

    def launch(self) -> None:
        """Enqueue the graph. Raises CallError."""
        (code,) = self._launch(self._exec, self._stream)
        if code != self._done:
            raise CallError(_words(self._driver, "cuGraphLaunch", code))

    def close(self) -> None:
        """Free the graph. Raises as the constructor."""
        graph, self._exec = self._exec, None
        if graph is not None:
            self._call(self._driver.cuGraphExecDestroy, graph)

    def _capture_failure(self, code: Any) -> EngineError:
        """Return the error. A stream that is still capturing is unusable."""
        text = _words(self._driver, "cuStreamEndCapture", code)
        if is_sticky(text):
            return EngineDeadError(text)
        result, status = self._driver.cuStreamIsCapturing(self._stream)
        idle = self._driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        return CaptureError(text) if result == self._done and status == idle else EngineDeadError(text)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        code, *results = function(*arguments)
        if code != self._done:
            text = _words(self._driver, function.__name__, code)
            raise EngineDeadError(text) if is_sticky(text) else CaptureError(text)
        return results[0] if results else None
