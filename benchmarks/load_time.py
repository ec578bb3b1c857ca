"""The cost of the proof of batching at load: each model opened with and without it, in turn.

`python -m benchmarks.load_time [--rounds 9] [MODEL ...]`: MODEL is a benchmark's model, by name, or a file.
Prints medians of the time until the first answer (open, and one run of a row), and the verdict.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from pathlib import Path
from statistics import median

from benchmarks.common.models import model_path
from cobatch.engines.base import AUTO, Batching
from cobatch.engines.onnxruntime.engine import OnnxRuntimeEngine


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_time")
    parser.add_argument("models", nargs="*", default=["magika", "wide", "tiny"], metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print("| model | verdict | without, ms | with, ms | the proof, ms |\n|---|---|---:|---:|---:|")
    for name in options.models:
        path = Path(name) if Path(name).is_file() else model_path(name)
        loads = [(load(path, Batching("on")), load(path, AUTO)) for _ in range(options.rounds)]
        without_s, with_s = (median(s for s, _ in column) for column in zip(*loads, strict=True))
        cost_s = median(proven_s - plain_s for (plain_s, _), (proven_s, _) in loads)
        cells = f"{without_s * 1e3:.1f} | {with_s * 1e3:.1f} | {cost_s * 1e3:.1f}"
        print(f"| {name} | {loads[0][1][1]} | {cells} |", flush=True)


def load(path: Path, batching: Batching) -> tuple[float, str]:
    """Return the seconds until the first answer, and the verdict."""
    began_s = time.perf_counter()
    with closing(OnnxRuntimeEngine(str(path), 64, batching=batching)) as engine:
        engine.open()
        shapes = tuple(spec.least_row for spec in engine.signature.inputs)
        engine.inputs(0, 1, shapes)
        engine.enqueue(0, 1, shapes)
        engine.wait(0)
        return time.perf_counter() - began_s, engine.signature.batching.verdict


if __name__ == "__main__":
    main()
