"""CUDA graphs through NVIDIA's cuda-bindings, on PyCUDA's stream: PyCUDA itself knows none.

Optional: without the package a batch is enqueued call by call. A graph holds the copies and the kernels of
one batch size in one slot and is launched with one call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cobatch.engines.errors import EngineDeadError, EngineError, EngineRunError
from cobatch.engines.tensorrt.cuda import CallError, is_sticky


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
