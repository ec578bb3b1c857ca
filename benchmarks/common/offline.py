"""What ONNX Runtime reaches with no server around it: the bound for rows per second.

A process of its own, so that its memory and threads are as a server's are; it runs only when told
to, in turns with the server. The session has the settings that the engine gives its own.

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
    """One measurement: rows per second, and the median microseconds of one run."""

    rows_per_s: float
    median_us: float


class Offline:
    """Drives the process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def measure(self, rows: int, seconds: float) -> Speed:
        """Run batches of `rows` for about that long, at least one of them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(rows, seconds, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the offline process ended with status {self._process.wait()}")
        return Speed(**json.loads(answer))

    def best_size(self) -> int:
        """The batch size with most rows per second.

        Each size's fastest of several short tries, taken in turns: the machine's speed swings, and
        a slow moment must not decide. What counts is measured again, at that size.
        """
        tries: dict[int, list[float]] = {rows: [] for rows in SIZES}
        for _ in range(_SWEEPS):
            for rows, speeds in tries.items():
                speeds.append(rows / self.measure(rows, _SWEEP_SECONDS).median_us)
        return max(SIZES, key=lambda rows: max(tries[rows]))


@contextmanager
def offline(path: Path, model: str) -> Iterator[Offline]:
    """The process for *tiny*, *wide* or *magika* in the file `path`."""
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
    """As many threads as the engine takes: one core is left for the event loop."""
    return max(1, (os.cpu_count() or 1) - 1)


def make_session(path: Path, threads: int) -> Any:
    """An onnxruntime.InferenceSession on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _measure(session: Any, feed: dict[str, wire.Array], rows: int, seconds: float) -> Speed:
    session.run(None, feed)  # the first run of a size sets up memory for it
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
