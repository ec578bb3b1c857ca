"""ONNX Runtime without a server: the upper bound of rows per second.

It runs in its own process, with memory and threads like a server's, and measures on request, alternating with
the server. The session has the settings of cobatch's engine.

`python -m benchmarks.common.offline MODEL KIND THREADS` reads lines `ROWS SECONDS` and answers each with
JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.common import wire

SIZES = (1, 2, 4, 8, 16, 32, 64)
_SWEEPS = 4
_SWEEP_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Speed:
    """A measurement: rows per second, and the median time of a run in microseconds."""

    rows_per_s: float
    median_us: float


class Offline:
    """The process, seen from the benchmark."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def measure(self, rows: int, seconds: float) -> Speed:
        """Run batches of `rows` for about `seconds`, at least one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(rows, seconds, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the offline process exited with status {self._process.wait()}")
        return Speed(**json.loads(answer))

    def best_size(self) -> int:
        """Return the batch size with most rows per second.

        Each size counts with its fastest of several short tries, in turns, because the machine's speed
        varies. The rate at the best size is measured again later.
        """
        tries: dict[int, list[float]] = {rows: [] for rows in SIZES}
        for _ in range(_SWEEPS):
            for rows, speeds in tries.items():
                speeds.append(rows / self.measure(rows, _SWEEP_SECONDS).median_us)
        return max(SIZES, key=lambda rows: max(tries[rows]))


@contextmanager
def offline(path: Path, model: str) -> Iterator[Offline]:
    """Start the process for a model."""
    command = [sys.executable, "-m", "benchmarks.common.offline", str(path), model, str(default_threads())]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield Offline(process)
        finally:
            process.terminate()


def default_threads() -> int:
    """Return the engine's default number of threads: one core is left to the event loop."""
    return max(1, (os.cpu_count() or 1) - 1)


def make_session(path: Path, threads: int) -> Any:
    """Return an onnxruntime.InferenceSession on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _measure(session: Any, feed: dict[str, wire.Array], rows: int, seconds: float) -> Speed:
    session.run(None, feed)  # the first run of a size allocates
    times_s: list[float] = []
    start = before = time.perf_counter()
    while not times_s or before - start < seconds:
        session.run(None, feed)
        now = time.perf_counter()
        times_s.append(now - before)
        before = now
    return Speed(rows * len(times_s) / (before - start), statistics.median(times_s) * 1e6)


def main() -> None:
    """Answer measurements until stdin ends."""
    path, model, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    session = make_session(path, threads)
    feeds = {rows: {wire.INPUTS[model].name: wire.rows_of(model, rows, rows)} for rows in SIZES}
    for line in sys.stdin:
        rows, seconds = line.split()
        speed = _measure(session, feeds[int(rows)], int(rows), float(seconds))
        print(json.dumps({"rows_per_s": speed.rows_per_s, "median_us": speed.median_us}), flush=True)


if __name__ == "__main__":
    main()
