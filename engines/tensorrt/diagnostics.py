"""TensorRT's error recorder: what an object reports while it works, for the error of the batch it ran."""

from __future__ import annotations

import threading
from typing import Any

_KEPT = 16


def make_recorder(trt_module: Any) -> Any:
    """An instance of a subclass of this module's `IErrorRecorder`; `take` answers and clears its entries.

    TensorRT may report from any thread, and an exception of ours must not reach it.
    """

    class Recorder(trt_module.IErrorRecorder):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            trt_module.IErrorRecorder.__init__(self)
            self._lock = threading.Lock()
            self._entries: list[tuple[Any, str]] = []
            self._overflowed = False

        def num_errors(self) -> int:
            """How many are kept."""
            return len(self._entries)

        def get_error_code(self, index: int) -> Any:
            """The code of one."""
            return self._entries[index][0]

        def get_error_desc(self, index: int) -> str:
            """The words of one."""
            return self._entries[index][1]

        def has_overflowed(self) -> bool:
            """Whether there were more than are kept."""
            return self._overflowed

        def clear(self) -> None:
            """Forget all."""
            self.take()

        def report_error(self, code: Any, description: str) -> bool:
            """Keep one. False: TensorRT decides itself whether it goes on."""
            with self._lock:
                if len(self._entries) < _KEPT:
                    self._entries.append((code, description))
                else:
                    self._overflowed = True
            return False

        def take(self) -> list[str]:
            """The entries since the last call, each with its code."""
            with self._lock:
                entries, self._entries, self._overflowed = self._entries, [], False
            return [f"{getattr(code, 'name', code)}: {' '.join(text.split())}" for code, text in entries]

    return Recorder()
