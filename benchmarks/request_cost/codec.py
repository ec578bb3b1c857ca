"""Tensor data between JSON and arrays: a comparison of libraries.

`python -m benchmarks.request_cost.codec` prints microseconds per request for one row of 16, 2,048 and 150,528
elements (an image of 224 x 224 x 3). In: from the body of an infer request to the row's bytes. Out: from one
row of a batch's output to the JSON text of its data.
"""

from __future__ import annotations

import gc
import struct
import sys
import timeit
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import orjson
import simdjson
from rich.table import Table

from benchmarks.request_cost.report import wide_console
from cobatch.engines.base import Signature, TensorSpec
from cobatch.server.v2.decode import Decoder

SIZES = (16, 2_048, 150_528)
BATCH = 64
_TRIES = 5
_TRY_S = 0.03
Array = np.ndarray[Any, Any]
Way = Callable[[], object]
# V2 datatype: NumPy dtype, code of struct, simdjson's buffer and its dtype, the type of a number in JSON.
_KINDS: dict[str, tuple[str, str, str, str, type]] = {
    "FP32": ("<f4", "f", "d", "<f8", float),
    "INT32": ("<i4", "i", "i", "<i8", int),
}


class _Raw(msgspec.Struct, gc=False):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw


class _RawRequest(msgspec.Struct, gc=False):
    inputs: list[_Raw]


def ways_in(row: Array, datatype: str) -> dict[str, Way]:
    """Return functions that decode an infer request with this row to the row's bytes or array."""
    narrow, code, buffer, wide, number = _KINDS[datatype]
    tensor = {"name": "x", "shape": [1, row.size], "datatype": datatype, "data": row}
    body = orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)
    fields = [("name", str), ("shape", list[int]), ("datatype", str), ("data", list[number])]  # type: ignore[valid-type]
    typed_tensor = msgspec.defstruct("TypedTensor", fields, gc=False)
    inputs = [("inputs", list[typed_tensor])]  # type: ignore[valid-type]
    typed = msgspec.json.Decoder(msgspec.defstruct("TypedRequest", inputs, gc=False))
    raw = msgspec.json.Decoder(_RawRequest)
    pack = struct.Struct(f"<{row.size}{code}").pack

    def typed_list() -> Any:
        return typed.decode(body).inputs[0].data  # type: ignore[attr-defined]

    def as_buffer(data: Any) -> Array:
        return np.frombuffer(data.as_buffer(of_type=buffer), wide).astype(narrow)

    # A new parser each time: a shared one refuses while a result is alive.
    def whole() -> Array:
        document: Any = simdjson.Parser().parse(body)
        return as_buffer(document["inputs"][0]["data"])

    def of_raw() -> Array:
        return as_buffer(simdjson.Parser().parse(bytes(raw.decode(body).inputs[0].data)))

    spec = TensorSpec("x", datatype, (row.size,))
    server = Decoder(Signature((spec,), (spec,)), 1)
    return {
        "the server: msgspec, or simdjson in pieces": lambda: server.decode(body, None),
        "msgspec typed + struct.pack": lambda: pack(*typed_list()),
        "msgspec typed + np.array": lambda: np.array(typed_list(), narrow),
        "pysimdjson, whole document, as_buffer": whole,
        "msgspec envelope, pysimdjson as_buffer of data": of_raw,
        "orjson + np.array": lambda: np.array(orjson.loads(body)["inputs"][0]["data"], narrow),
    }


def ways_out(batch: Array) -> dict[str, tuple[Way, int]]:
    """Return functions that encode rows of [rows, n] as JSON text, with the rows of one call."""
    row = batch[0]
    numpy = orjson.OPT_SERIALIZE_NUMPY
    return {
        "msgspec of tolist()": (lambda: msgspec.json.encode(row.tolist()), 1),
        "orjson of the array": (lambda: orjson.dumps(row, option=numpy), 1),
        f"orjson of the batch of {len(batch)}, then split": (
            lambda: orjson.dumps(batch, option=numpy)[2:-2].split(b"],["),
            len(batch),
        ),
    }


def best_us(way: Way) -> float:
    """Return the microseconds of a call in the fastest of a few tries; slower ones were interrupted."""
    timer = timeit.Timer(way)
    once = timer.timeit(1)
    calls = max(1, round(_TRY_S / max(once, 1e-7)))
    gc.collect()
    return min(timer.repeat(1 if once > 0.2 else _TRIES, calls)) / calls * 1e6


def measure() -> dict[tuple[str, str], dict[str, list[float]]]:
    """Return (direction, datatype) -> way -> microseconds for each of SIZES."""
    rng = np.random.default_rng(0)
    times_us: dict[tuple[str, str], dict[str, list[float]]] = {}
    for datatype in _KINDS:
        for size in SIZES:
            batch: Array
            if datatype == "FP32":
                batch = rng.standard_normal((BATCH, size), dtype=np.float32)
            else:
                batch = rng.integers(0, 50_000, (BATCH, size), dtype=np.int32)
            for name, way in ways_in(batch[0], datatype).items():
                times_us.setdefault(("in", datatype), {}).setdefault(name, []).append(best_us(way))
            for name, (way, rows) in ways_out(batch).items():
                times_us.setdefault(("out", datatype), {}).setdefault(name, []).append(best_us(way) / rows)
    return times_us


def main() -> int:
    """Print a table with the fastest way of each size marked."""
    table = Table(title="JSON data of one row, microseconds")
    table.add_column("", no_wrap=True)
    table.add_column("way (columns: elements)", no_wrap=True)
    for size in SIZES:
        table.add_column(f"{size:,}", justify="right", no_wrap=True)
    for (direction, datatype), ways in measure().items():
        fastest = [min(times) for times in zip(*ways.values(), strict=True)]
        for name, times in ways.items():
            cells = [
                f"[bold green]{time:,.2f}[/]" if time == least else f"{time:,.2f}"
                for time, least in zip(times, fastest, strict=True)
            ]
            table.add_row(f"{direction}, {datatype}", name, *cells)
        table.add_section()
    wide_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
