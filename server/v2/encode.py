"""A finished request's rows -> the body of a V2 infer response.

What is the same for all requests of a batch is done once per batch and kept in `batch.memo`: one
call copies a whole output for the callers that want binary, and, where rows are short, one call turns
it into JSON text, which is then cut at the rows' borders. orjson does that: it writes float32 with as
few digits as keep the value, in half msgspec's time and with no Python object per element
(`benchmarks/request_cost/codec.py`). Non-finite results are null in JSON, which has no word for them; binary
keeps them.
"""

from __future__ import annotations

from math import prod
from typing import Any

import msgspec
import numpy as np
import orjson

from cobatch.batcher.request import Batch, Request
from cobatch.engines.base import Signature
from cobatch.server.http.reply import JSON, OCTETS, Reply
from cobatch.server.http.request_id import id_lead
from cobatch.server.v2.decode import Wants

_KEPT_FRAMES = 1024
# Up to so many elements, encoding all rows at once and cutting beats encoding each by itself.
_SHORT_ROW = 64
Shapes = tuple[tuple[int, ...], ...]


class Encoder:
    """Encodes answers of one model."""

    def __init__(self, name: str, version: str, signature: Signature) -> None:
        self._start = b'{"model_name":%b,"model_version":%b' % (
            msgspec.json.encode(name),
            msgspec.json.encode(version),
        )
        self._specs = signature.outputs
        self._names = [msgspec.json.encode(spec.name) for spec in signature.outputs]
        self._frames: dict[tuple[Wants, int, Shapes], list[bytes]] = {}

    def encode(self, request: Request, wants: Wants, message_id: str | None, usage: bool = False) -> Reply:
        """The reply to a request that ran; call it inside `Request.done`. `usage`: say so in the body too."""
        batch = request.batch
        assert batch is not None
        shared = batch.memo.get("shared")
        if shared is None:
            shapes = tuple([output.shape[1:] for output in batch.outputs])
            shared = batch.memo["shared"] = shapes, timing_of_batch(batch), id_lead(batch)
        shapes, shared_timing, lead_of_id = shared
        timing = b"queue;dur=%.3f%b" % ((batch.dispatched_s - request.enqueued_s) * 1e3, shared_timing)
        # One that rode in a batch of its own making (a split one, say) gets its id elsewhere.
        request_id = b"%b%d" % (lead_of_id, request.first_row) if lead_of_id else None
        start = self._start
        if message_id is not None:
            start += b',"id":' + msgspec.json.encode(message_id)
        if usage:
            start += _usage(request, batch)
        rows = request.rows
        first = request.first_row
        frame = self._frame(wants, rows, shapes)
        if len(wants) != 1:
            return self._mixed(batch, first, rows, wants, start, timing, request_id, frame)
        # One output is the common case, and spelled out.
        index, binary = wants[0]
        lead, end = frame
        if not binary:
            text = self._json_data(batch, index, first, rows)
            return Reply(200, JSON, (start, lead, text, end), timing=timing, request_id=request_id)
        if self._specs[index].datatype == "BYTES":
            return self._mixed(batch, first, rows, wants, start, timing, request_id, frame)
        data = self._binary_rows(batch, index, first, rows)
        json_length = len(start) + len(lead) + len(end)
        body = (start, lead, end, data)
        return Reply(200, OCTETS, body, timing=timing, json_length=json_length, request_id=request_id)

    def _mixed(
        self,
        batch: Batch,
        first: int,
        rows: int,
        wants: Wants,
        start: bytes,
        timing: bytes,
        request_id: bytes | None,
        frame: list[bytes],
    ) -> Reply:
        pieces: list[bytes | memoryview] = [start]
        tail: list[bytes | memoryview] = []
        for position, (index, binary) in enumerate(wants):
            pieces.append(frame[position])
            if not binary:
                pieces.append(self._json_data(batch, index, first, rows))
            elif self._specs[index].datatype == "BYTES":
                data = _bytes_tensor(batch.outputs[index][first : first + rows])
                pieces.append(b'"parameters":{"binary_data_size":%d}}' % len(data))
                tail.append(data)
            else:
                tail.append(self._binary_rows(batch, index, first, rows))
        pieces.append(frame[-1])
        if any(binary for _, binary in wants):
            json_length = sum(map(len, pieces))
            body = pieces + tail
            return Reply(200, OCTETS, body, timing=timing, json_length=json_length, request_id=request_id)
        return Reply(200, JSON, pieces, timing=timing, request_id=request_id)

    def _json_data(self, batch: Batch, index: int, first: int, rows: int) -> bytes:
        """Text of some rows of an output: the elements without brackets, flat."""
        cut: list[bytes] | None = batch.memo.get(index)
        if cut is None:
            output = batch.outputs[index]
            elements = prod(output.shape[1:])
            if output.dtype == object or not 0 < elements <= _SHORT_ROW:
                return _json_elements(output[first : first + rows].reshape(-1))
            flat = output.reshape(output.shape[0], elements)
            cut = batch.memo[index] = _orjson(flat)[2:-2].split(b"],[")
        return cut[first] if rows == 1 else b",".join(cut[first : first + rows])

    def _binary_rows(self, batch: Batch, index: int, first: int, rows: int) -> bytes | memoryview:
        key = -1 - index
        whole: memoryview | None = batch.memo.get(key)
        if whole is None:
            whole = batch.memo[key] = memoryview(batch.outputs[index].tobytes())
        size = len(whole) // batch.outputs[index].shape[0]
        return whole[first * size : (first + rows) * size]

    def _frame(self, wants: Wants, rows: int, shapes: Shapes) -> list[bytes]:
        """The JSON around the data, in pieces: one before each wanted output's data, one at the end."""
        key = (wants, rows, shapes)
        frame = self._frames.get(key)
        if frame is None:
            if len(self._frames) >= _KEPT_FRAMES:
                self._frames.clear()
            frame = self._frames[key] = self._make_frame(wants, rows, shapes)
        return frame

    def _make_frame(self, wants: Wants, rows: int, shapes: Shapes) -> list[bytes]:
        frame = []
        end = b',"outputs":['
        for index, binary in wants:
            spec = self._specs[index]
            shape = [rows, *shapes[index]]
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


def _json_elements(flat: np.ndarray[Any, Any]) -> bytes:
    """JSON of the elements of a one-dimensional array, without the brackets."""
    if flat.dtype == object:
        return msgspec.json.encode([_text(value) for value in flat])[1:-1]
    return _orjson(flat)[1:-1]


def _orjson(array: np.ndarray[Any, Any]) -> bytes:
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _bytes_tensor(values: np.ndarray[Any, Any]) -> bytes:
    """BYTES as binary: each element its length (u32, little-endian) and its bytes."""
    pieces: list[bytes] = []
    for value in values.reshape(-1):
        data = value if isinstance(value, bytes) else str(value).encode()
        pieces += (len(data).to_bytes(4, "little"), data)
    return b"".join(pieces)


def _usage(request: Request, batch: Batch) -> bytes:
    """The answer's parameters that say where its time went, in microseconds, and in which company."""
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
