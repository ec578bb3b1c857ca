"""A finished request's rows -> the body of a V2 infer response.

Work that all requests of a batch share is done once and kept in `batch.memo`: one call copies a whole output
for the callers that want binary, and, where rows are short, one call turns it into JSON text, which is then
cut between the rows. orjson writes the text: float32 with the fewest digits that keep the value, in half
msgspec's time and with no Python object per element (`benchmarks/request_cost/codec.py`). Non-finite results
are null in JSON, which cannot express them; binary keeps them.
"""

import codecs
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from math import prod
from typing import Any, TypeVar

import msgspec
import numpy as np
import orjson

from cobatch.batcher.request import Batch, Request
from cobatch.batcher.rows.copying import copied
from cobatch.engines.base import Array, Signature
from cobatch.server.http.problem import Problem
from cobatch.server.http.reply import JSON, OCTETS, Reply
from cobatch.server.http.request_id import LEAD
from cobatch.server.v2.binary import LONG_ELEMENTS, LONG_TEXT, TEXT_PIECE, bytes_tensor, characters
from cobatch.server.v2.decode import WantedOutputs
from cobatch.server.v2.pieces import in_pieces, release

log = logging.getLogger("cobatch.server")

_KEPT_FRAMES = 1024
# The answers of a batch are written one after another, so they may have this many elements together, or
# characters. Handing one with fewer than LEAST_ELEMENTS to the thread would take longer than encoding it.
BATCH_ELEMENTS = 1 << 18
BATCH_TEXT = 1 << 23
LEAST_ELEMENTS = 1 << 10
_COPIED_BYTES = 1 << 20
# Of an output in JSON, of which all is in memory: as many numbers as a JSON request of 16 MiB can have, and
# bytes of strings, whose text is up to six times as long.
MOST_JSON_NUMBERS = 1 << 23
MOST_JSON_TEXT = 1 << 25
# In the memo of a batch that holds one request's own outputs.
_OWN = "own"
# Encoding all rows at once and cutting is faster than encoding each by itself up to this length.
_SHORT_ROW_ELEMENTS = 64
Shapes = tuple[tuple[int, ...], ...]
_T = TypeVar("_T")


class LongAnswerError(Exception):
    """The answer is too long to be encoded on the event loop's thread; see `encode_later`."""


class Shared(msgspec.Struct, eq=False):
    """The parts that the answers of a batch share; `frame` is that of `rows` rows of the outputs `wanted`."""

    shapes: Shapes
    timing: bytes
    lead_of_id: bytes | None
    wanted: WantedOutputs = ()
    rows: int = 0
    frame: list[bytes] = msgspec.field(default_factory=list)


class Encoder:
    """Encodes the responses of one model."""

    def __init__(self, name: str, version: str, signature: Signature) -> None:
        self._start = b'{"model_name":%b,"model_version":%b' % (
            msgspec.json.encode(name),
            msgspec.json.encode(version),
        )
        self._specs = signature.outputs
        self._names = [msgspec.json.encode(spec.name) for spec in signature.outputs]
        self._frames: dict[tuple[WantedOutputs, int, Shapes], list[bytes]] = {}

    def encode(
        self, request: Request, wanted: WantedOutputs, message_id: str | None, usage: bool = False
    ) -> Reply:
        """The reply to a request that ran; call it inside `Request.done`. `usage`: times in the body too.

        Raises LongAnswerError.
        """
        batch = request.batch
        assert batch is not None
        shared: Shared | None = batch.memo.get("shared")
        if shared is None:
            shapes = tuple([output.shape[1:] for output in batch.outputs])
            # A request with a batch of its own (a split one, for example) gets its id elsewhere.
            lead_of_id = LEAD % batch.number if batch.number else None
            shared = batch.memo["shared"] = Shared(shapes, timing_of_batch(batch), lead_of_id)
        timing = b"queue;dur=%.3f%b" % ((batch.dispatched_s - request.enqueued_s) * 1e3, shared.timing)
        first, rows = request.first_row, request.rows
        request_id = None if shared.lead_of_id is None else b"%b%d" % (shared.lead_of_id, first)
        start = self._start
        if message_id is not None:
            start += b',"id":' + msgspec.json.encode(message_id)
        if usage:
            start += _usage(request, batch)
        if shared.wanted is not wanted or shared.rows != rows:
            shared.wanted, shared.rows = wanted, rows
            shared.frame = self._frame(wanted, rows, shared.shapes)
        frame = shared.frame
        body: Sequence[bytes | memoryview]
        index, binary = wanted[0]
        if len(wanted) > 1 or (binary and self._specs[index].datatype == "BYTES"):
            body, json_length = self._several(batch, first, rows, wanted, start, frame)
        elif binary:
            # One output is the common case, and spelled out.
            lead, end = frame
            body = (start, lead, end, self._binary_rows(batch, index, first, rows))
            json_length = len(start) + len(lead) + len(end)
        else:
            lead, end = frame
            data, json_length = self._json_data(batch, index, first, rows), None
            body = (start, lead, data, end) if type(data) is bytes else (start, lead, *data, end)
        kind = JSON if json_length is None else OCTETS
        return Reply(200, kind, body, timing=timing, json_length=json_length, request_id=request_id)

    def _several(
        self, batch: Batch, first: int, rows: int, wanted: WantedOutputs, start: bytes, frame: list[bytes]
    ) -> tuple[Sequence[bytes | memoryview], int | None]:
        """The body with all wanted outputs, and the length of its JSON if some are binary."""
        pieces: list[bytes | memoryview] = [start]
        tail: list[bytes | memoryview] = []
        for (index, binary), lead in zip(wanted, frame, strict=False):
            pieces.append(lead)
            if not binary:
                data = self._json_data(batch, index, first, rows)
                pieces += [data] if isinstance(data, bytes) else data
            elif self._specs[index].datatype == "BYTES":
                values = batch.outputs[index][first : first + rows]
                if _OWN not in batch.memo and _is_long(values, batch.outputs[index]):
                    raise LongAnswerError
                data = bytes_tensor(values)
                pieces.append(b'"parameters":{"binary_data_size":%d}}' % sum(map(len, data)))
                tail += data
            else:
                tail.append(self._binary_rows(batch, index, first, rows))
        pieces.append(frame[-1])
        json_length = sum(map(len, pieces)) if any(binary for _, binary in wanted) else None
        return pieces + tail, json_length

    def _json_data(self, batch: Batch, index: int, first: int, rows: int) -> bytes | list[bytes]:
        """The text of some rows of an output: the elements without brackets, flat; a long one in pieces."""
        cut: list[bytes] | None = batch.memo.get(index)
        if cut is None:
            output = batch.outputs[index]
            elements = prod(output.shape[1:])
            if output.dtype == object or not 0 < elements <= _SHORT_ROW_ELEMENTS:
                values = output[first : first + rows].reshape(-1)
                if _OWN not in batch.memo and _is_long(values, output):
                    raise LongAnswerError
                pieces = json_pieces(values)
                return pieces[0][1:-1] if len(pieces) == 1 else [pieces[0][1:], *pieces[1:-1]]
            flat = output.reshape(output.shape[0], elements)
            cut = batch.memo[index] = dumps(flat)[2:-2].split(b"],[")
        return cut[first] if rows == 1 else b",".join(cut[first : first + rows])

    def _binary_rows(self, batch: Batch, index: int, first: int, rows: int) -> bytes | memoryview:
        key = -1 - index
        whole: memoryview | None = batch.memo.get(key)
        if whole is None:
            output = batch.outputs[index]
            if output.nbytes < _COPIED_BYTES:
                whole = memoryview(output.tobytes())
            else:
                whole = _own(batch, output).reshape(-1).view(np.uint8).data
            batch.memo[key] = whole
        size = len(whole) // batch.outputs[index].shape[0]
        return whole[first * size : (first + rows) * size]

    def _frame(self, wanted: WantedOutputs, rows: int, shapes: Shapes) -> list[bytes]:
        """The JSON around the data, in pieces: one before each wanted output's data, one at the end."""
        key = (wanted, rows, shapes)
        frame = self._frames.get(key)
        if frame is None:
            if len(self._frames) >= _KEPT_FRAMES:
                self._frames.clear()
            frame = self._frames[key] = self._make_frame(wanted, rows, shapes)
        return frame

    def _make_frame(self, wanted: WantedOutputs, rows: int, shapes: Shapes) -> list[bytes]:
        frame = []
        end = b',"outputs":['
        for index, binary in wanted:
            spec = self._specs[index]
            shape = spec.tensor_shape(rows, shapes[index])
            head = b'{"name":%b,"shape":%b,"datatype":"%b",' % (
                self._names[index],
                msgspec.json.encode(shape),
                spec.datatype.encode(),
            )
            if not binary:
                frame.append(end + head + b'"data":[')
                end = b"]},"
            elif spec.datatype == "BYTES":
                frame.append(end + head)
                end = b","
            else:
                size = prod(shape) * spec.dtype.itemsize
                frame.append(end + head + b'"parameters":{"binary_data_size":%d}}' % size)
                end = b","
        return [*frame, end.removesuffix(b",") + b"]}"]


def is_long(request: Request, outputs: Collection[int]) -> bool:
    """Return whether encoding these outputs of a request that ran takes too long for the event loop."""
    batch = request.batch
    assert batch is not None
    end = request.first_row + request.rows
    tensors = [(batch.outputs[index][request.first_row : end], batch.outputs[index]) for index in outputs]
    elements = sum([values.size for values, _ in tensors])
    return elements > LONG_ELEMENTS or any(_is_long(values, output) for values, output in tensors)


def encode_later(
    request: Request, outputs: Collection[int], encode: Callable[[Request], _T], deliver: Callable[[_T], None]
) -> None:
    """Encode a long answer in the thread, from a copy of the request's outputs, and deliver it.

    `encode` must not raise; it gets the request itself, with an error, if there is no memory for a copy.
    """
    try:
        own = _detached(request, outputs)
    except Exception:
        log.exception("copying a long answer failed")
        request.error = LongAnswerError()
        deliver(encode(request))
    else:
        in_pieces(encode, own).add_done_callback(lambda encoded: deliver(encoded.result()))


def _detached(request: Request, outputs: Collection[int]) -> Request:
    """A request that ran, with a copy of its rows of these outputs, to be encoded when its batch is gone."""
    batch = request.batch
    assert batch is not None
    end = request.first_row + request.rows
    own = batch.for_one((batch,))
    own.outputs = [
        _own(batch, output, request.first_row, end) if index in outputs else output[request.first_row : end]
        for index, output in enumerate(batch.outputs)
    ]
    own.memo[_OWN] = True
    one = Request(request.rows, request.row_shapes, ())
    one.batch, one.parts, one.enqueued_s = own, request.parts, request.enqueued_s
    return one


def _is_long(values: Array, output: Array) -> bool:
    """Return whether encoding some rows of a batch's output takes longer than their share of its time."""
    size = values.size
    if size > LONG_ELEMENTS or (output.size > BATCH_ELEMENTS and size > LEAST_ELEMENTS):
        return True
    if values.dtype != object or not size:
        return False
    return characters(values) > min(LONG_TEXT, BATCH_TEXT * size // output.size)


def _own(batch: Batch, output: Array, first: int = 0, end: int | None = None) -> Array:
    """Some rows of an output that stay valid: a copy, unless they are most of one that stays valid."""
    rows = output[first:end]
    if batch.lasting and 2 * rows.size >= output.size:
        return rows
    return copied(rows)


def json_pieces(values: Array) -> list[bytes]:
    """JSON of an array, nested as its axes are; of a long one in several pieces (`server.v2.pieces`).

    Raises Problem for one that would take too much memory.
    """
    is_text = values.dtype == object
    actual, what = (characters(values), "bytes of strings") if is_text else (values.size, "numbers")
    limit = MOST_JSON_TEXT if is_text else MOST_JSON_NUMBERS
    if actual > limit:
        detail = f"an output has {actual} {what}; as JSON it may have {limit}"
        raise Problem("answer-too-long", detail, limit=limit)
    return _pieces(values)


def _pieces(values: Array) -> list[bytes]:
    if values.size <= LONG_ELEMENTS:
        if values.dtype == object:
            if values.ndim and characters(values) > TEXT_PIECE:
                return [*_row_pieces(values), b"]"]
            return [msgspec.json.encode(_texts(values.tolist()))]
        return [dumps(np.ascontiguousarray(values) if values.ndim else values[()])]
    step = LONG_ELEMENTS // (values.size // len(values))
    pieces: list[bytes] = []
    end = b"["
    for first in range(0, len(values), step or 1):
        if step:
            some = _pieces(values[first : first + step])
            pieces += (end, some[0][1:], *some[1:])
            pieces[-1] = pieces[-1][:-1]
        else:
            pieces += (end, *_pieces(values[first]))
        end = b","
        release()
    return [*pieces, b"]"]


def _row_pieces(values: Array) -> Iterator[bytes]:
    """JSON of the rows of strings, without the last bracket: long rows and long strings in pieces."""
    end = b"["
    few: list[Any] = []
    left = TEXT_PIECE
    for row in [*values, None]:
        length = 0 if row is None else len(row) if values.ndim == 1 else characters(row)
        if few and (row is None or length > left):
            yield end + msgspec.json.encode(_texts(few))[1:-1]
            end, few, left = b",", [], TEXT_PIECE
            release()
        if row is None:
            return
        if length <= left:
            few.append(row if values.ndim == 1 else row.tolist())
            left -= length
            continue
        yield end
        yield from _string_pieces(row) if values.ndim == 1 else _pieces(row)
        end = b","


def _string_pieces(value: bytes | str) -> Iterator[bytes]:
    """JSON of a long string."""
    end = b'"'
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    value = value if isinstance(value, bytes) else str(value)
    for at in range(0, len(value), TEXT_PIECE):
        part = value[at : at + TEXT_PIECE]
        text = decode(part, at + TEXT_PIECE >= len(value)) if isinstance(part, bytes) else part
        yield end + msgspec.json.encode(text)[1:-1]
        end = b""
        release()
    yield b'"'


def _texts(value: Any) -> Any:
    return [_texts(one) for one in value] if isinstance(value, list) else text_of(value)


def dumps(value: Any) -> bytes:
    """A value in JSON: float32 with the fewest digits that keep it, null for non-finite values."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def text_of(value: object) -> str:
    """An element of a BYTES output as text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _usage(request: Request, batch: Batch) -> bytes:
    """The response's parameters: its batch's rows, and microseconds in the queue and in the engine."""
    return b',"parameters":{"batch_rows":%d,"queue_us":%d,"compute_us":%d}' % (
        batch.rows,
        (batch.dispatched_s - request.enqueued_s) * 1e6,
        (batch.finished_s - batch.started_s) * 1e6,
    )


def timing_of_batch(batch: Batch) -> bytes:
    """The part of Server-Timing that all requests of a batch share. Durations in milliseconds."""
    compute_ms = (batch.finished_s - batch.started_s) * 1e3
    return b", compute;dur=%.3f, batch;desc=%d, reason;desc=%b" % (
        compute_ms,
        batch.rows,
        batch.reason.encode(),
    )
