"""Compare a server's answers with those of a direct run of the model, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.common import wire
from benchmarks.common.offline import default_threads, make_session

_CALLERS = 8
_REQUESTS = 32


class WrongAnswerError(Exception):
    """An answer is not the result of the request's rows."""


def check(address: str, path: str, model: str, file: Path, binary: bool) -> None:
    """Send different concurrent V2 requests of one to three rows. Raises WrongAnswerError."""

    def ask(rows: wire.Array) -> wire.Array:
        return wire.decode(wire.post(address, path, wire.encode(model, rows, binary)))

    compare(ask, model, file, most_rows=3)


def compare(ask: Callable[[wire.Array], wire.Array], model: str, file: Path, most_rows: int) -> None:
    """Send different rows from several threads. Raises WrongAnswerError.

    The tolerance allows for rounding, which depends on the batch; the result of another row is far outside
    it.
    """
    session = make_session(file, default_threads())
    name = wire.INPUTS[model].name
    inputs = [wire.rows_of(model, 1 + seed % most_rows, seed) for seed in range(_REQUESTS)]
    with ThreadPoolExecutor(_CALLERS) as callers:
        answers = list(callers.map(ask, inputs))
    for seed, (rows, answer) in enumerate(zip(inputs, answers, strict=True)):
        expected = session.run(None, {name: rows})[0]
        if answer.shape != expected.shape or not np.allclose(answer, expected, rtol=1e-3, atol=1e-4):
            raise WrongAnswerError(f"{model}, request {seed}: got {answer}, a direct run gives {expected}")
