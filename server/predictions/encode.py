"""The prediction as an object: its present state, or its outcome.

Fields without a value are left out. An answer is made inside `Request.done`, while the outputs are valid, and
is text from then on: the text that is kept is the text that is sent.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np

from cobatch.batcher.errors import ExpiredError
from cobatch.batcher.request import Request
from cobatch.engines.base import Array, TensorSpec
from cobatch.server.http.problem import Problem, from_error
from cobatch.server.predictions.decode import WantedOutputs
from cobatch.server.v2.encode import dumps, text_of, timing_of_batch

COMPLETED = "completed"
INCOMPLETE = "incomplete"
FAILED = "failed"
CANCELLED = "cancelled"
EXPIRED = "expired"
QUEUED = "queued"
RUNNING = "running"


class Answer(NamedTuple):
    """The end of a prediction. A request that waits for it is answered with `problem`, if there is one."""

    status: str
    text: bytes
    problem: Problem | None = None
    timing: bytes | None = None


# First and last row of each missing part, both included.
Ranges = list[tuple[int, int]]


def cancelled(id_: str, model: str) -> Answer:
    """The object of a cancelled prediction."""
    fields = {"id": id_, "status": CANCELLED, "model": model}
    problem = Problem("cancelled", "the prediction was cancelled before it was done", prediction=fields)
    return Answer(CANCELLED, msgspec.json.encode(fields), problem)


def failed(id_: str, model: str, error: Exception) -> Answer:
    """The object of a failed prediction, which contains the problem."""
    status = EXPIRED if isinstance(error, ExpiredError) else FAILED
    fields: dict[str, Any] = {"id": id_, "status": status, "model": model}
    problem = from_error(error)
    body = msgspec.json.decode(problem.reply().body[0])
    del body["error"]  # repeats the detail for V2 clients
    problem.members["prediction"] = fields
    return Answer(status, msgspec.json.encode(fields | {"error": body}), problem)


def done(
    id_: str, model: str, specs: tuple[TensorSpec, ...], wanted: WantedOutputs, request: Request
) -> Answer:
    """The object of a prediction that ran, wholly or for some of its rows; call it in `Request.done`."""
    batch = request.batch
    assert batch is not None
    failures = request.failures
    missing = _merged([(first, first + rows - 1) for first, rows, _ in failures])
    status = INCOMPLETE if failures else COMPLETED
    fields: dict[str, Any] = {"id": id_, "status": status, "model": model}
    if failures:
        problem = from_error(failures[0][2])
        details = {"reason": problem.kind.slug, "detail": problem.detail, "rows": missing}
        fields["incomplete_details"] = details
    end = request.first_row + request.rows
    fields["outputs"] = {
        specs[index].name: _output(specs[index], batch.outputs[index][request.first_row : end], best, missing)
        for index, best in wanted
    }
    queue_s = batch.dispatched_s - request.enqueued_s
    fields["usage"] = {
        "rows": request.rows,
        "batch_rows": batch.rows,
        "queue_us": round(queue_s * 1e6),
        "compute_us": round((batch.finished_s - batch.started_s) * 1e6),
    }
    timing = b"queue;dur=%.3f%b" % (queue_s * 1e3, timing_of_batch(batch))
    return Answer(status, msgspec.json.encode(fields), timing=timing)


def _merged(ranges: Ranges) -> Ranges:
    """The same rows in as few ranges as possible."""
    merged: Ranges = []
    for first, last in ranges:
        if merged and merged[-1][1] == first - 1:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


def _output(spec: TensorSpec, rows: Array, best: int | None, missing: Ranges) -> dict[str, Any]:
    """An output. `shape` is that of the whole output, also where only its best scores are shown."""
    if not spec.batched:
        rows = rows.reshape(rows.shape[1:])
    fields: dict[str, Any] = {"dtype": dtype_name(spec), "shape": rows.shape}
    # The bits of BF16 are the upper half of float32's.
    values = (rows.astype(np.uint32) << 16).view(np.float32) if spec.datatype == "BF16" else rows
    if best is None or values.ndim < 1 + spec.batched:
        fields["data"] = _with_nulls(values, missing, _nested)
    else:
        fields["top_k"] = _with_nulls(values, missing, lambda some: dumps(_top(some, best)))
    return fields


def dtype_name(spec: TensorSpec) -> str:
    """The name of an output's datatype in NumPy, where it has one."""
    return {"BYTES": "bytes", "BF16": "bfloat16"}.get(spec.datatype, spec.dtype.name)


def _with_nulls(values: Array, missing: Ranges, encode: Any) -> msgspec.Raw:
    """The rows in JSON, with null for each missing one."""
    if not missing:
        return msgspec.Raw(encode(values))
    pieces: list[bytes] = []
    edges = [(-1, -1), *missing, (len(values), len(values))]
    for (_, last), (first, end) in pairwise(edges):
        if first > last + 1:
            pieces.append(encode(values[last + 1 : first])[1:-1])
        if first < len(values):
            pieces += [b"null"] * (end - first + 1)
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")


def _nested(values: Array) -> bytes:
    if values.dtype == object:
        return msgspec.json.encode(_text(values.tolist()))
    return dumps(np.ascontiguousarray(values) if values.ndim else values[()])


def _text(value: Any) -> Any:
    return [_text(one) for one in value] if isinstance(value, list) else text_of(value)


def _top(values: Array, count: int) -> list[Any]:
    """The best scores along the last axis in descending order: equal ones by index, NaN last."""
    if values.ndim > 1:
        return [_top(row, count) for row in values]
    keys = np.where(np.isnan(values), -np.inf, values) if values.dtype.kind == "f" else values
    candidates = np.arange(len(keys))
    if count < len(keys):
        least = np.partition(keys, len(keys) - count)[len(keys) - count]
        candidates = np.flatnonzero(keys >= least)
    # Sorted from the back and then reversed, which leaves equal ones in the order of their indices.
    backwards = candidates[::-1]
    order = backwards[np.argsort(keys[backwards], kind="stable")][::-1][:count]
    return [{"index": index, "score": values[index]} for index in order]
