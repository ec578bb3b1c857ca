"""Models in Python that tests serve. A row's first number says how it misbehaves."""

import ctypes
import os
import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from cobatch import BadRequest

FAILS, EXITS, CRASHES, HOLDS_LOCK, HANGS, LEAKS, WAITS, REFUSED = range(1001, 1009)
# Opening it waits for the test, which opens the other end.
GATE = Path(__file__).with_name("gate")
Array = np.ndarray[Any, Any]
Tensors = dict[str, tuple[str, list[int]]]


class OddError(BadRequest):
    """An error of the model's own."""


class Faulty:
    """y = 2 * x."""

    inputs: ClassVar[Tensors] = {"x": ("INT64", [-1, 1])}
    outputs: ClassVar[Tensors] = {"y": ("INT64", [-1, 1])}

    def __init__(self) -> None:
        self.kept: list[bytes] = []

    def predict(self, batch: dict[str, Array]) -> dict[str, Array]:
        x = batch["x"]
        for number in x[:, 0].tolist():
            if number > 1000:
                print(f"row {number}")
                self.misbehave(number)
        return {"y": x * 2}

    def misbehave(self, number: int) -> None:
        if number == FAILS:
            raise ValueError("no such row\udcff")
        if number == REFUSED:
            raise OddError(f"{number} is no number of this model\udcff")
        if number == EXITS:
            os._exit(3)
        if number == CRASHES:
            ctypes.string_at(0)
        if number == HOLDS_LOCK:
            ctypes.PyDLL(None).sleep(1000)  # with the interpreter lock, unlike CDLL
        if number == HANGS:
            time.sleep(1000)
        if number == LEAKS:
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            # The process must have enough left to say so: half of the last piece, which does not fit.
            limit = pages * resource.getpagesize() + (1 << 28) + (1 << 25)
            resource.setrlimit(resource.RLIMIT_AS, (limit, most))
            while True:
                self.kept.append(bytes(1 << 26))
        if number == WAITS:
            GATE.read_bytes()


class Reuses(Faulty):
    """Returns the same array for each batch of one size, and views of it for others."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = np.zeros((2, 1), np.int64)

    def predict(self, batch: dict[str, Array]) -> dict[str, Array]:
        x = batch["x"]
        rows = self.buffer if len(x) == 2 else self.buffer[:1] if len(x) == 1 else x.copy()
        np.multiply(x, 2, out=rows)
        return {"y": rows}


class Exits(Faulty):
    """Ends its process while it is loaded."""

    def load(self) -> None:
        print("not today", file=sys.stderr)
        os._exit(4)


class Refuses(Faulty):
    """Cannot be loaded."""

    def load(self) -> None:
        raise ValueError("not this\udcff")


class Wrong:
    """Returns the output that a row asks for."""

    inputs: ClassVar[Tensors] = {"x": ("INT64", [-1, 1])}
    outputs: ClassVar[Tensors] = {"y": ("FP32", [-1, 2]), "z": ("INT64", [-1])}

    def predict(self, batch: dict[str, Array]) -> object:
        rows = len(batch["x"])
        good: dict[str, Any] = {"y": np.zeros((rows, 2), np.float32), "z": np.zeros(rows, np.int64)}
        answers: list[Any] = [
            good,
            {"y": good["y"]},
            good | {"y": good["y"].astype(float)},
            good | {"y": good["y"][:, :1]},
            good | {"z": np.zeros(rows + 1, np.int64)},
            good | {"z": [0] * rows},
            good | {"w": good["z"]},
            None,
            good["y"],
        ]
        return answers[batch["x"][0, 0]]


def upper(
    text: Annotated[Array, "BYTES", [-1, -1]], times: Annotated[Array, "INT64", [-1, 1]]
) -> Annotated[Array, "BYTES", [-1, -1]]:
    """Write strings in capitals, repeated."""
    capitals: Array = np.frompyfunc(lambda one, n: one.upper() * n, 2, 1)(text, times)
    return capitals


def double(x: Annotated[Array, "FP32", [-1, -1]]) -> Annotated[Array, "FP32", [-1, -1]]:
    """Return rows of the same length."""
    return x * 2


def half(x: Annotated[Array, "FP32", [-1]]) -> Annotated[Array, "FP32", [-1]]:
    """Return another datatype than is declared."""
    return x.astype(np.float64) / 2


def widen(x: Annotated[Array, "FP32", [-1, -1]]) -> Annotated[Array, "FP32", [-1, -1]]:
    """Repeat each row 1,000 times."""
    return np.tile(x, (1, 1000))


def mean(x: Annotated[Array, "FP32", [3, -1]]) -> Annotated[Array, "FP64", []]:
    """Return one number for the whole tensor."""
    return np.array(x.mean(dtype=float))
