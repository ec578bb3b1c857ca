"""Runs of a session: strings in a form that it takes, few of them at once, and outputs that last."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np
import onnxruntime as ort

from cobatch.engines.base import Array, RowShapes, Signature
from cobatch.engines.errors import BadRequest, EngineRunError

# ONNX Runtime holds the interpreter lock while it converts the strings of a run: 100 ms for a million. Longer
# strings than glibc has in its heap (32 MiB) are copied into new pages: 64 MiB take 150 ms, 16 MiB 10 ms.
_MOST_STRINGS = 1 << 17
MOST_TEXT_BYTES = 1 << 24


def run(
    session: ort.InferenceSession,
    signature: Signature,
    arrays: Sequence[Array],
    options: ort.RunOptions | None = None,
) -> list[Array]:
    """Run it once; the outputs are copies. Raises EngineRunError, and BadRequest for too many strings."""
    feed = {
        spec.name: _text(array) if array.dtype == object else array
        for spec, array in zip(signature.inputs, arrays, strict=True)
    }
    try:
        if _may_make_many_strings(signature, arrays):
            made = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
            outputs = session.run_with_ort_values(None, made, options)  # takes 200 µs more
            strings = _count_strings(signature, outputs)
            if strings > _MOST_STRINGS:
                del outputs  # the error refers to this frame
                why = f"the outputs have {strings} strings; {_MOST_STRINGS} may be converted at once"
                raise BadRequest(why)
            return [output.numpy() for output in outputs]
        # Copies: ONNX Runtime never gives memory back that outputs had while a client took its answer.
        return [np.array(output) for output in session.run(None, feed, options)]
    except UnicodeDecodeError as error:
        raise EngineRunError(f"ONNX Runtime cannot return strings that are not UTF-8: {error}") from error


def _may_make_many_strings(signature: Signature, arrays: Sequence[Array]) -> bool:
    """Return True if strings should be counted before they are converted, which takes inputs without any."""
    numbers = sum(array.size for array in arrays if array.dtype != object)
    texts = any(array.dtype == object for array in arrays)
    return numbers > _MOST_STRINGS and not texts and any(s.datatype == "BYTES" for s in signature.outputs)


def _count_strings(signature: Signature, outputs: Sequence[ort.OrtValue]) -> int:
    shapes = [output.shape() for output in outputs]
    specs = zip(signature.outputs, shapes, strict=True)
    return sum(prod(shape) for spec, shape in specs if spec.datatype == "BYTES")


def strings_of_row(signature: Signature, row_shapes: RowShapes) -> int:
    """Return the strings of a row, of inputs or of outputs, as far as the shapes are known before the run."""
    shapes = list(zip(signature.inputs, row_shapes, strict=True))
    sizes = {name: size for spec, shape in shapes for name, size in zip(spec.axis_names, shape, strict=True)}
    sizes[""] = 1
    inputs = [prod(shape) for spec, shape in shapes if spec.datatype == "BYTES"]
    outputs = [
        prod(
            sizes.get(name, 1) if size == -1 else size
            for size, name in zip(spec.shape, spec.axis_names, strict=True)
        )
        for spec in signature.outputs
        if spec.datatype == "BYTES"
    ]
    return max(sum(inputs), sum(outputs))


def cuts_of(arrays: Sequence[Array], rows: int, strings: int) -> list[int]:
    """Return where parts of a batch end that have few enough strings and bytes; `strings`: of a row."""
    texts = [array for array in arrays if array.dtype == object]
    bytes_ = sum(sum(map(len, array.flat)) for array in texts)
    if rows * strings <= _MOST_STRINGS and bytes_ <= MOST_TEXT_BYTES:
        return [rows]
    most_rows = max(1, _MOST_STRINGS // (strings or 1))
    cuts = []
    first = size = 0
    for row in range(rows):
        own = sum(sum(map(len, array[row : row + 1].flat)) for array in texts)
        if row > first and (row - first == most_rows or size + own > MOST_TEXT_BYTES):
            cuts.append(row)
            first, size = row, 0
        size += own
    return [*cuts, rows]


def run_in_parts(
    session: ort.InferenceSession, signature: Signature, arrays: Sequence[Array], cuts: Sequence[int]
) -> list[Array]:
    """Run the rows in parts that end there."""
    parts = [
        run(session, signature, [array[first:end] for array in arrays]) for first, end in pairwise([0, *cuts])
    ]
    if len({tuple(output.shape[1:] for output in part) for part in parts}) > 1:
        return run(session, signature, arrays)  # shapes that depend on values
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _text(array: Array) -> Array:
    """Return strings in a form that ONNX Runtime's Python interface takes. Raises EngineRunError.

    It takes any text, and bytes if all have one length, or none has a NUL.
    """
    flat = array.reshape(-1).tolist()
    try:
        text = [value.decode() if isinstance(value, bytes) else value for value in flat]
        return np.array(text, dtype=object).reshape(array.shape)
    except UnicodeDecodeError:
        raw = [value if isinstance(value, bytes) else value.encode() for value in flat]
    longest = max(map(len, raw))
    same = all(len(value) == longest for value in raw)
    # NumPy's `V` is passed on whole, `S` up to a NUL. It has each as long as the longest.
    if longest * len(raw) > MOST_TEXT_BYTES or (not same and any(b"\0" in value for value in raw)):
        raise EngineRunError("ONNX Runtime cannot take strings that are not UTF-8 and differ in length")
    return np.array(raw, f"{'V' if same else 'S'}{longest}").reshape(array.shape)


def quiet() -> ort.RunOptions:
    """Return options of a run that may fail without a line in the log."""
    options = ort.RunOptions()
    options.log_severity_level = 4
    return options
