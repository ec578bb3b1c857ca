"""The settings of the apps, and the model, which counts its runs.

The session has the settings of cobatch's engine, so that all engines are equally fast.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any

import numpy as np
import onnxruntime

PORT = int(os.environ.get("PEER_PORT", "8000"))
NAME = os.environ.get("PEER_MODEL_NAME", "")
MAX_BATCH = int(os.environ.get("PEER_MAX_BATCH", "64"))
MAX_WAIT_MS = 2
# Set in the overload case: each framework then refuses or drops late requests in its own way.
DEADLINE_MS = int(os.environ.get("PEER_DEADLINE_MS", "0"))
# The limit of concurrent requests, large except in the overload case.
MAX_QUEUE = int(os.environ.get("PEER_MAX_QUEUE", "0")) or 4096

_COUNTS = struct.Struct("=qq")


class Model:
    """ONNX Runtime over a batch of rows, one input and one output."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["PEER_THREADS"])
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            os.environ["PEER_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self.input, self.output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self.elements = int(self.input.shape[1])
        self.dtype: np.dtype[Any] = np.dtype("<i4" if "int32" in self.input.type else "<f4")
        for rows in (1, MAX_BATCH):
            self._session.run(None, {self.input.name: np.zeros((rows, self.elements), self.dtype)})
        self._counts = _counts()

    def __call__(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Run a batch, and count it for the benchmark."""
        # Read from the file: mosec has a process for each route, and they take turns.
        runs, done = _COUNTS.unpack_from(self._counts)
        _COUNTS.pack_into(self._counts, 0, runs + 1, done + len(rows))
        result: np.ndarray[Any, Any] = self._session.run(None, {self.input.name: rows})[0]
        return result

    def stack(self, bodies: list[bytes]) -> np.ndarray[Any, Any]:
        """Return rows given as bytes as one array."""
        return np.frombuffer(b"".join(bodies), self.dtype).reshape(len(bodies), self.elements)


def _counts() -> mmap.mmap:
    with open(os.environ["PEER_COUNTS"], "r+b") as file:  # noqa: PTH123 - for its number
        return mmap.mmap(file.fileno(), _COUNTS.size)
