"""A gate inside a `cobatch serve` that a test started: it holds runs until the test releases them.

`install` wraps ONNX Runtime's engine. Before a run with the value HOLD in its first input it sends a byte to
the datagram socket GATE and waits for a byte; with GATE_OPEN set also before it opens a model. The byte tells
the test that the run is held, without timing.
"""

from __future__ import annotations

import os
import socket
from typing import Any

HOLD = -3
HELD = b"h"


def install() -> None:
    """Serve every ONNX model through the gate; called by the `sitecustomize` that the test wrote."""
    from cobatch.engines import loader  # noqa: PLC0415 - loads libraries only when the command does

    loader.ENGINES["onnxruntime"] = _gated


def _gated(path: str, max_batch_size: int, options: Any) -> Any:
    from cobatch.engines.base import Array  # noqa: PLC0415
    from cobatch.engines.onnxruntime.engine import OnnxRuntimeEngine  # noqa: PLC0415

    gate = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    gate.bind("")  # an address in the abstract namespace, to be answered
    gate.connect(bytes.fromhex(os.environ["GATE"]))

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
    gate.send(HELD)
    gate.recv(1)
