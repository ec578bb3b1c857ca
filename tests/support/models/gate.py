"""Inside a `cobatch serve` that a test started: runs that stand still until the test lets them go.

`install` puts an engine around ONNX Runtime's that, before a run with the value HOLD in its first input,
writes a byte to the socket whose number is in GATE_FD and waits for one to come back. With GATE_OPEN set
it does so when a model is opened too. No time is involved: the test knows that the run stands.
"""

from __future__ import annotations

import os
import socket
from typing import Any

HOLD = -3
HELD = b"h"


def install() -> None:
    """Serve every ONNX model through the gate; called by the `sitecustomize` that the test wrote."""
    from cobatch.engines import loader  # noqa: PLC0415 - the libraries load when the command would load them

    loader.ENGINES["onnxruntime"] = _gated


def _gated(path: str, max_batch_size: int, options: Any) -> Any:
    from cobatch.engines.base import Array  # noqa: PLC0415
    from cobatch.engines.onnxruntime import OnnxRuntimeEngine  # noqa: PLC0415

    gate = socket.socket(fileno=os.dup(int(os.environ["GATE_FD"])))

    class Gated(OnnxRuntimeEngine):
        def open(self) -> None:
            if "GATE_OPEN" in os.environ:
                _hold(gate)
            super().open()

        def wait(self, slot: int) -> tuple[Array, ...]:
            state = self._slots[slot]
            if (self.inputs(slot, state.rows, state.row_shapes)[0][: state.rows] == HOLD).any():
                _hold(gate)
            return super().wait(slot)

    return Gated(path, max_batch_size, options.threads)


def _hold(gate: socket.socket) -> None:
    gate.sendall(HELD)
    # Empty when the test has ended: then there is nobody to wait for.
    gate.recv(1)
