"""Serve the models of ONNX's own operator tests, and compare each answer with the model's when run alone.

`python -m benchmarks.operators`: each test's model, as it is and with first axes of variable size, is opened
with `batching = "auto"`. Its test's inputs run as one request, cut into batches of at most four rows if the
model is batched. Prints the numbers of answers by verdict and outcome; ends with 1 if one is wrong.

"not rows": a request that is refused, since the inputs' first axes differ, which are taken for rows.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.backend.test.case.node import collect_testcases

from cobatch.engines.base import Array
from cobatch.engines.errors import EngineError
from cobatch.engines.onnxruntime.engine import OnnxRuntimeEngine

MAX_BATCH_SIZE = 4


def main() -> int:
    """Run all and print; return the exit status."""
    counts: Counter[tuple[str, str, str]] = Counter()
    ort.set_default_logger_severity(4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for case in collect_testcases(None):
            assert case.model is not None
            assert case.data_sets is not None
            inputs = case.data_sets[0][0]
            for kind, model in variants(case.model):
                path.write_bytes(model.SerializeToString())
                verdict, outcome = outcome_of(path, inputs)
                counts[kind, verdict, outcome] += 1
                if outcome in ("wrong", "error"):
                    print(f"{case.name}, {kind}, {verdict}: {outcome}")
    print("| first axes | verdict | outcome | models |\n|---|---|---|---:|")
    for row, count in sorted(counts.items()):
        print(f"| {' | '.join(row)} | {count} |")
    return 1 if any(outcome == "wrong" for _, _, outcome in counts) else 0


def variants(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yield the model, and a copy whose tensors' first axes have a variable size."""
    yield "as they are", model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in (*copy.graph.input, *copy.graph.output):
        axes = value.type.tensor_type.shape.dim
        if axes:
            axes[0].Clear()
            axes[0].dim_param = "n"
    del copy.graph.value_info[:]
    yield "variable", copy


def outcome_of(path: Path, given: Sequence[Any]) -> tuple[str, str]:
    """Return the verdict and the outcome of a request."""
    try:
        inputs = [np.asarray(one) for one in given]
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feed = {one.name: array for one, array in zip(session.get_inputs(), inputs, strict=True)}
        alone = [np.asarray(output) for output in session.run(None, feed)]
    except Exception:  # noqa: BLE001 - ONNX Runtime's errors have no base class; sequences are no arrays
        return "-", "refused by ONNX Runtime"
    with closing(OnnxRuntimeEngine(str(path), MAX_BATCH_SIZE, threads=1)) as engine:
        try:
            engine.open()
        except EngineError:
            return "-", "not loaded"
        verdict = engine.signature.batching.verdict
        try:
            served = answers(engine, inputs)
        except EngineError:
            return verdict, "error"
    if served is None:
        return verdict, "not rows"
    return verdict, "right" if all(map(same, alone, served)) else "wrong"


def answers(engine: OnnxRuntimeEngine, inputs: Sequence[Array]) -> list[Array] | None:
    """Return the answers to one request, as the batcher runs it; None if its inputs are no rows."""
    if not engine.signature.batching.on:
        inputs = [array[np.newaxis] for array in inputs]
    counts = {len(array) for array in inputs}
    if len(counts) > 1 or 0 in counts:
        return None
    shapes = tuple(array.shape[1:] for array in inputs)
    parts = []
    for first in range(0, counts.pop(), engine.max_batch_size):
        rows = [array[first : first + engine.max_batch_size] for array in inputs]
        for buffer, array in zip(engine.inputs(0, len(rows[0]), shapes), rows, strict=True):
            buffer[: len(array)] = array
        engine.enqueue(0, len(rows[0]), shapes)
        parts.append([np.array(output) for output in engine.wait(0)])
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
    return joined if engine.signature.batching.on else [output[0, ...] for output in joined]


def same(one: Any, other: Any) -> bool:
    """Return True if two outputs agree, up to rounding."""
    if one.shape != other.shape:
        return False
    if one.dtype.kind not in "biuf":
        return bool((one == other).all())
    wide = one.astype(np.float64), other.astype(np.float64)
    return bool(np.allclose(*wide, rtol=1e-3, atol=1e-3, equal_nan=True))


if __name__ == "__main__":
    sys.exit(main())
