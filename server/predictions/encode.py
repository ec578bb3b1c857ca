"""The prediction as an object: its present state, or its outcome.

Fields without a value are left out. An answer is made inside `Request.done`, while the outputs are valid, and
is text from then on: the text that is kept is the text that is sent.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np

from cobatch.batcher.errors import ExpiredError
from cobatch.batcher.request import Request
from cobatch.engines.base import Array, TensorSpec
from cobatch.server.http.problem import Problem, from_error
from cobatch.server.predictions.decode import WantedOutputs
from cobatch.server.v2.encode import dumps, json_pieces, timing_of_batch
from cobatch.server.v2.pieces import release

COMPLETED = "completed"
INCOMPLETE = "incomplete"
FAILED = "failed"
CANCELLED = "cancelled"
EXPIRED = "expired"
QUEUED = "queued"
RUNNING = "running"
_SCORES_AT_ONCE = 1 << 12
_ROWS_AT_ONCE = 64


class Answer(NamedTuple):
    """The end of a prediction, and its text in pieces.

    A request that waits for it is answered with `problem`, if there is one.
    """

    status: str
    pieces: Sequence[bytes]
    problem: Problem | None = None
    timing: bytes | None = None

    @property
    def length(self) -> int:
        """Bytes of the text."""
        return sum(map(len, self.pieces))


# First and last row of each missing part, both included.
Ranges = list[tuple[int, int]]


def cancelled(id_: str, model: str) -> Answer:
    """The object of a cancelled prediction."""
    fields = {"id": id_, "status": CANCELLED, "model": model}
    problem = Problem("cancelled", "the prediction was cancelled before it was done", prediction=fields)
    return Answer(CANCELLED, (msgspec.json.encode(fields),), problem)


def failed(id_: str, model: str, error: Exception) -> Answer:
    """The object of a failed prediction, which contains the problem."""
    status = EXPIRED if isinstance(error, ExpiredError) else FAILED
    fields: dict[str, Any] = {"id": id_, "status": status, "model": model}
    problem = from_error(error)
    body = msgspec.json.decode(problem.reply().body[0])
    del body["error"]  # repeats the detail for V2 clients
    problem.members["prediction"] = fields
    return Answer(status, (msgspec.json.encode(fields | {"error": body}),), problem)


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
    pieces = [msgspec.json.encode(fields)[:-1] + b',"outputs":{']
    for number, (index, best) in enumerate(wanted):
        rows = batch.outputs[index][request.first_row : end]
        pieces.append(b"%b%b:" % (b"," if number else b"", msgspec.json.encode(specs[index].name)))
        pieces += _output(specs[index], rows, best, missing)
    queue_s = batch.dispatched_s - request.enqueued_s
    usage = {
        "rows": request.rows,
        "batch_rows": batch.rows,
        "queue_us": round(queue_s * 1e6),
        "compute_us": round((batch.finished_s - batch.started_s) * 1e6),
    }
    timing = b"queue;dur=%.3f%b" % (queue_s * 1e3, timing_of_batch(batch))
    pieces.append(b'},"usage":' + msgspec.json.encode(usage) + b"}")
    return Answer(status, pieces, timing=timing)


def _merged(ranges: Ranges) -> Ranges:
    """The same rows in as few ranges as possible."""
    merged: Ranges = []
    for first, last in ranges:
        if merged and merged[-1][1] == first - 1:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


def _output(spec: TensorSpec, rows: Array, best: int | None, missing: Ranges) -> list[bytes]:
    """An output in JSON, in pieces. Its shape is the whole output's, also if only best scores are shown."""
    if not spec.batched:
        rows = rows.reshape(rows.shape[1:])
    fields: dict[str, Any] = {"dtype": dtype_name(spec), "shape": rows.shape}
    # The bits of BF16 are the upper half of float32's.
    values = (rows.astype(np.uint32) << 16).view(np.float32) if spec.datatype == "BF16" else rows
    if best is None or values.ndim < 1 + spec.batched:
        key, pieces = b"data", _with_nulls(values, missing, json_pieces)
    else:
        key, pieces = b"top_k", _with_nulls(values, missing, lambda some: _top(some, best))
    return [b'%b,"%b":' % (msgspec.json.encode(fields)[:-1], key), *pieces, b"}"]


def dtype_name(spec: TensorSpec) -> str:
    """The name of an output's datatype in NumPy, where it has one."""
    return {"BYTES": "bytes", "BF16": "bfloat16"}.get(spec.datatype, spec.dtype.name)


def _with_nulls(values: Array, missing: Ranges, encode: Callable[[Array], list[bytes]]) -> list[bytes]:
    """The rows in JSON, in pieces, with null for each missing one."""
    if not missing:
        return encode(values)
    pieces: list[bytes] = []
    end = b"["
    edges = [(-1, -1), *missing, (len(values), len(values))]
    for (_, last), (first, last_missing) in pairwise(edges):
        if first > last + 1:
            some = b"".join(encode(values[last + 1 : first]))
            pieces += (end, some[1:-1])
            end = b","
        if first < len(values):
            pieces += (end, b",".join([b"null"] * (last_missing - first + 1)))
            end = b","
    return [*pieces, b"]"]


def _top(values: Array, count: int) -> list[bytes]:
    """The best scores along the last axis in JSON, in descending order: equal ones by index, NaN last."""
    if values.ndim > 1:
        pieces: list[bytes] = []
        for number, row in enumerate(values):
            pieces += (b"," if number else b"[", *_top(row, count))
            if number % _ROWS_AT_ONCE == _ROWS_AT_ONCE - 1:
                release()
        return [*pieces, b"]"]
    keys = np.where(np.isnan(values), -np.inf, values) if values.dtype.kind == "f" else values
    candidates = np.arange(len(keys))
    if count < len(keys):
        least = np.partition(keys, len(keys) - count)[len(keys) - count]
        candidates = np.flatnonzero(keys >= least)
    # Sorted from the back and then reversed, which leaves equal ones in the order of their indices.
    backwards = candidates[::-1]
    order = backwards[np.argsort(keys[backwards], kind="stable")][::-1][:count]
    scores: list[bytes] = []
    for at in range(0, len(order), _SCORES_AT_ONCE):
        best = [{"index": index, "score": values[index]} for index in order[at : at + _SCORES_AT_ONCE]]
        scores.append((b"," if at else b"[") + dumps(best)[1:-1])
        if at:
            release()
    return [*scores, b"]"]
