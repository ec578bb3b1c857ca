"""Bodies that cost much for their size: every form that the server reads, up to its limits."""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

# Just short enough for the event loop's own thread.
SHORT_BYTES = (1 << 16) - 1
SHORT_STRINGS_BYTES = (1 << 14) - 1
STRINGS = 1 << 17

_JSON = {"Content-Type": "application/json"}
_FORM = {"Content-Type": "multipart/form-data; boundary=aaaaaaaa"}


class Sizes(NamedTuple):
    """The longest bodies. The defaults are the server's limits; tests divide them."""

    json: int = 1 << 24
    body: int = 1 << 26


class Attack(NamedTuple):
    """A request: its path, headers and body."""

    name: str
    path: str
    headers: dict[str, str]
    body: bytes


def attacks(sizes: Sizes = Sizes()) -> Iterator[Attack]:  # noqa: B008 - immutable
    """Yield all of them, made one at a time."""
    yield from _v2_json(sizes)
    yield from _v2_binary(sizes)
    yield from _v1(sizes)
    yield from _batch(sizes)
    yield from _compressed(sizes)
    yield from _answers(sizes)


def _infer(model: str) -> str:
    return f"/v2/models/{model}/infer"


def _filled(size: int, lead: str, unit: str, end: str) -> bytes:
    """`unit` as often as it fits between `lead` and `end`."""
    text = lead + unit * ((size - len(lead) - len(end)) // len(unit)) + end
    return text.encode()


def _tensor(datatype: str, shape: str) -> str:
    return f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":'


_NUMBERS = {
    "integers": ("[", "1,", "1]"),
    "long numbers": ("[", "0.12345678901234567,", "1]"),
    "one number": ("[", "1", "]"),
    "empty arrays": ("[", "[],", "[]]"),
    "arrays of one": ("[", "[1],", "[1]]"),
    "opened arrays": ("[", "[", ""),
    "empty objects": ("[", "{},", "{}]"),
    "nulls": ("[", "null,", "null]"),
    "blanks": ("[", " ", "1]"),
    "commas": ("[", ",", "]"),
    "strings": ("[", '"a",', '"a"]'),
}
_STRINGS = {
    "empty strings": ("[", '"",', '""]'),
    "short strings": ("[", '"abcdefgh",', '""]'),
    "nested strings": ("[", '[""],', '[""]]'),
    "opened arrays of strings": ("[", '["a",', "1]"),
    "one string": ('["', "a", '"]'),
    "one string of quotes": ('["', '\\"', '"]'),
    "one string of escapes": ('["', "\\u00e9", '"]'),
    "numbers": ("[", "1,", "1]"),
    "empty arrays": ("[", "[],", "[]]"),
}
_ENVELOPES = {
    "parameters": ('{"parameters":{', '"abcd":1,', '"a":1},"inputs":[]}'),
    "inputs": ('{"inputs":[', '{"name":"x","shape":[],"datatype":""},', "{}]}"),
    "outputs": ('{"inputs":[],"outputs":[', '{"name":"y"},', "{}]}"),
    "unknown fields": ("{", '"a":1,', '"inputs":[]}'),
    "an unknown array": ('{"a":[', "[],", '[]],"inputs":[]}'),
    "shape": ('{"inputs":[{"name":"x","datatype":"FP32","shape":[', "1,", '1],"data":[1]}]}'),
    "id": ('{"inputs":[],"id":"', "a", '"}'),
    "blanks before": ("", " ", '{"inputs":[]}'),
}


def _v2_json(sizes: Sizes) -> Iterator[Attack]:
    for size in (sizes.json, SHORT_BYTES):
        short = "" if size == sizes.json else " (short)"
        for name, (lead, unit, end) in _NUMBERS.items():
            count = size // len(unit)
            for shape in ("[1,4]", f"[1,{(size - 60 - len(str(count))) // 2}]"):
                body = _filled(size, _tensor("FP32", shape) + lead, unit, end + "}]}")
                fits = ", any count" if len(shape) > 6 else ""
                yield Attack(f"V2 numbers: {name}{fits}{short}", _infer("width"), {}, body)
        flags = _filled(size, _tensor("BOOL", f"[1,{size // 5}]") + "[", "true,", "true]}]}")
        yield Attack(f"V2 flags{short}", _infer("truth"), {}, flags)
        for name, (lead, unit, end) in _ENVELOPES.items():
            yield Attack(f"V2: {name}{short}", _infer("width"), {}, _filled(size, lead, unit, end))
    for size in (sizes.json, SHORT_STRINGS_BYTES):
        short = "" if size == sizes.json else " (short)"
        for name, (lead, unit, end) in _STRINGS.items():
            body = _filled(size, _tensor("BYTES", "[1,4]") + lead, unit, end + "}]}")
            yield Attack(f"V2 strings: {name}{short}", _infer("text"), {}, body)
    count = (sizes.json - 200) // 2
    data = "[" + "1," * (count - 1) + "1]}]}"
    yield Attack("V2 numbers, valid", _infer("width"), {}, (_tensor("FP32", f"[1,{count}]") + data).encode())
    count = sizes.json // 32
    rows = _tensor("FP32", f"[1,{4 * count}]") + "[" + ",".join(["[1,1,1,1]"] * count) + "]}]}"
    yield Attack("V2 nested, valid", _infer("width"), {}, rows.encode())
    strings = "[" + ",".join(['"abcdefgh"'] * STRINGS) + "]}]}"
    yield Attack(
        "V2 strings, valid", _infer("text"), {}, (_tensor("BYTES", f"[1,{STRINGS}]") + strings).encode()
    )


def binary(model: str, datatype: str, shape: list[int], data: bytes, **parameters: object) -> Attack:
    """A request with one tensor in binary."""
    tensor = {
        "name": "x",
        "datatype": datatype,
        "shape": shape,
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return Attack("", _infer(model), headers, head + data)


def _v2_binary(sizes: Sizes) -> Iterator[Attack]:
    most = sizes.body - 1000
    floats = bytes(most // 4 * 4)
    yield binary("sum", "FP32", [1, len(floats) // 4], floats)._replace(name="binary numbers")
    yield binary("any-truth", "BOOL", [1, most], bytes(most))._replace(name="binary flags")
    empty = bytes(most // 4 * 4)
    for count in (4, len(empty) // 4):
        yield binary("text", "BYTES", [1, count], empty)._replace(name=f"binary strings: {count} empty")
    yield binary("text", "BYTES", [1, STRINGS], bytes(4 * STRINGS))._replace(
        name="binary strings: valid, empty"
    )
    for length, name in ((most - 4, "one too long"), (sizes.body // 4, "one")):
        one = length.to_bytes(4, "little") + b"a" * length
        yield binary("text", "BYTES", [1, 1], one)._replace(name=f"binary strings: {name}")
    short = bytes(SHORT_STRINGS_BYTES // 4 * 4 - 200)
    yield binary("text", "BYTES", [1, len(short) // 4], short)._replace(name="binary strings (short)")
    for shape in ([1, 0, 2**29], [1, 2**24, 0]):
        yield binary("sum-3", "FP32", shape, b"")._replace(name=f"binary: {shape}")
    text = _filled(sizes.json, _tensor("FP32", "[1,4]") + "[", "1,", "1]}]}")
    yield Attack(
        "binary: long JSON", _infer("width"), {"Inference-Header-Content-Length": str(len(text))}, text
    )
    text = _filled(most, _tensor("FP32", "[1,4]") + "[", "1,", "1]}]}")
    yield Attack(
        "binary: JSON of 64 MiB", _infer("width"), {"Inference-Header-Content-Length": str(len(text))}, text
    )


def _predict(model: str) -> str:
    return f"/v1/models/{model}/predictions"


def _v1(sizes: Sizes) -> Iterator[Attack]:
    for size in (sizes.json, SHORT_STRINGS_BYTES):
        short = "" if size == sizes.json else " (short)"
        for name, (lead, unit, end) in _NUMBERS.items():
            body = _filled(size, '{"inputs":{"x":' + lead, unit, end + "}}")
            yield Attack(f"/v1 numbers: {name}{short}", _predict("width"), _JSON, body)
        for name, (lead, unit, end) in _STRINGS.items():
            body = _filled(size, '{"inputs":{"x":' + lead, unit, end + "}}")
            yield Attack(f"/v1 strings: {name}{short}", _predict("text"), _JSON, body)
        for name, (lead, unit, end) in {
            "names": ('{"inputs":{', '"abcd":1,', '"x":[[1]]}}'),
            "outputs": ('{"inputs":{"x":[[1]]},"outputs":[', '"y",', '"y"]}'),
            "top_k": ('{"inputs":{"x":[[1]]},"top_k":{', '"abcd":1,', '"y":1}}'),
            "shape": ('{"inputs":{"x":{"b64":"","dtype":"FP32","shape":[', "1,", "1]}}}"),
            "base64": ('{"inputs":{"x":{"dtype":"FP32","shape":[1,4],"b64":"', "AAAA", '"}}}'),
            "base64 of blanks": ('{"inputs":{"x":{"dtype":"FP32","shape":[1,4],"b64":"', " ", '"}}}'),
        }.items():
            yield Attack(f"/v1 {name}{short}", _predict("width"), _JSON, _filled(size, lead, unit, end))
    rows = ",".join(["[1,1,1,1,1,1,1,1]"] * 900)
    body = f'{{"inputs":{{"x":[{rows}]}},"top_k":8}}'.encode()
    yield Attack("/v1 rows with top_k, valid", _predict("width"), _JSON, body)
    yield from _npy(sizes)
    yield from _forms(sizes)


def saved(array: np.ndarray[Any, Any]) -> bytes:
    """An array as a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _npy(sizes: Sizes) -> Iterator[Attack]:
    headers = {"Content-Type": "application/x-npy"}
    many = (sizes.body - 1000) // 4
    arrays: dict[str, tuple[str, Callable[[], np.ndarray[Any, Any]]]] = {
        "numbers": ("sum", lambda: np.zeros((1, many), "<f4")),
        "numbers, other order": ("sum", lambda: np.asfortranarray(np.zeros((64, many // 64), ">f4"))),
        "bytes": ("text", lambda: np.zeros((1, many), "S1")),
        "text": ("text", lambda: np.full((1, STRINGS), "ab", "<U2")),
        "text of 64 MiB": ("text", lambda: np.full((1, 1), "a", f"<U{many}")),
    }
    for name, (model, make) in arrays.items():
        yield Attack(f"/v1 npy: {name}", _predict(model), headers, saved(make()))


def _forms(sizes: Sizes) -> Iterator[Attack]:
    lead = '--aaaaaaaa\r\nContent-Disposition: form-data; name="x"\r\n\r\n'
    end = "\r\n--aaaaaaaa--\r\n"
    size = sizes.body - 1000
    for name, unit in {
        "zeros": "\0",
        "line feeds": "\r\n",
        "almost boundaries": "\r\n--aaaaaaa",
        "dashes": "\r\n--",
        "arrays": "[],",
    }.items():
        yield Attack(f"/v1 form: {name}", _predict("width"), _FORM, _filled(size, lead, unit, end))
    part = lead + "[[1]]\r\n"
    yield Attack("/v1 form: parts", _predict("width"), _FORM, _filled(size, "", part, "--aaaaaaaa--\r\n"))
    yield Attack("/v1 form: a header", _predict("width"), _FORM, _filled(size, lead[:40], "a", end))
    yield Attack("/v1 form: headers", _predict("width"), _FORM, _filled(size, lead[:-2], "a: b\r\n", end))
    options = lead.replace('"x"', '"request"') + '{"shapes":{'
    yield Attack(
        "/v1 form: shapes", _predict("width"), _FORM, _filled(size, options, '"a":[1],', '"x":[1]}}' + end)
    )


def _batch(sizes: Sizes) -> Iterator[Attack]:
    def calls(
        count: int, data: str, shape: str = "[1,4]", datatype: str = "FP32", model: str = "width"
    ) -> bytes:
        body = _tensor(datatype, shape) + data + "}]}"
        item = '{{"id":"{}","method":"POST","url":"' + _infer(model) + '","body":' + "{}}}"
        return ('{"requests":[' + ",".join(item.format(n, body) for n in range(count)) + "]}").encode()

    yield Attack("/batch: items", "/batch", {}, _filled(sizes.json, '{"requests":[', "{},", "{}]}"))
    yield Attack("/batch: good items", "/batch", {}, calls(sizes.json // 280, "[1,1,1,1]"))
    yield Attack("/batch: arrays", "/batch", {}, calls(256, "[" + "[]," * (sizes.json // 800) + "[]]"))
    yield Attack("/batch: arrays (short)", "/batch", {}, calls(30, "[" + "[]," * 650 + "[]]"))
    count = sizes.json // 560
    numbers = ",".join(["1"] * count)
    long = calls(256, f"[{numbers}]", f"[1,{count}]")
    yield Attack("/batch: long items, valid", "/batch", {}, long)
    yield Attack("/batch: long items, gzip", "/batch", {"Accept-Encoding": "gzip"}, long)
    short = calls(256, f"[{','.join(['1'] * 900)}]", "[1,900]")
    yield Attack("/batch: items, valid", "/batch", {}, short)
    yield Attack("/batch: items, gzip", "/batch", {"Accept-Encoding": "gzip"}, short)
    strings = ",".join(['"a"'] * (STRINGS // 256))
    body = calls(256, f"[{strings}]", f"[1,{STRINGS // 256}]", "BYTES", "text")
    yield Attack("/batch: strings, valid", "/batch", {}, body)
    escapes = "\\u0001" * (sizes.json // 2048)
    body = calls(256, f'["{escapes}"]', "[1,1]", "BYTES", "text")
    yield Attack("/batch: strings of escapes", "/batch", {}, body)
    for name, (lead, unit, end) in _ENVELOPES.items():
        for size in (sizes.json, 300_000, SHORT_BYTES):
            start = '{"requests":[{"id":"a","method":"POST","url":"' + _infer("width") + '","body":'
            body = _filled(size, start + lead, unit, end + "}]}")
            yield Attack(f"/batch: {name} ({size})", "/batch", {}, body)


def _compressed(sizes: Sizes) -> Iterator[Attack]:
    packers: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
    for coding, pack in packers.items():
        headers = {"Content-Encoding": coding}
        bodies = {
            "empty arrays": _filled(sizes.json, _tensor("BYTES", "[1,4]") + "[", "[],", "[]]}]}"),
            "integers": _filled(2 * sizes.json, _tensor("FP32", "[1,4]") + "[", "1,", "1]}]}"),
            "parameters": _filled(sizes.body, *_ENVELOPES["parameters"]),
        }
        for name, body in bodies.items():
            yield Attack(f"{coding}: {name}", _infer("text"), headers, pack(body))
        text = binary("text", "BYTES", [1, sizes.body // 4], bytes(sizes.body))
        packed = text._replace(
            headers=text.headers | headers, body=pack(text.body), name=f"{coding}: strings"
        )
        yield packed
        noise = np.random.default_rng(0).bytes(sizes.body - 1000)
        sent = binary("sum", "FP32", [1, len(noise) // 4], noise)
        yield sent._replace(headers=sent.headers | headers, body=pack(sent.body), name=f"{coding}: noise")


def _answers(sizes: Sizes) -> Iterator[Attack]:
    noise = np.random.default_rng(0).random(sizes.body * 15 // 64, np.float32)
    gzipped = {"Accept-Encoding": "gzip"}
    for rows in (1, 1000):
        shape = [rows, len(noise) // rows]
        data = noise[: shape[0] * shape[1]].tobytes()
        for outputs in (True, False):
            kind = "binary" if outputs else "JSON"
            sent = binary("width", "FP32", shape, data, binary_data_output=outputs)
            yield sent._replace(name=f"answer: {kind}, {rows} rows")
            yield sent._replace(name=f"answer: {kind}, {rows} rows, gzip", headers=sent.headers | gzipped)
    headers = {"Content-Type": "application/octet-stream"}
    yield Attack("answer: /v1", _predict("width"), headers, noise.tobytes())
    yield Attack("answer: /v1, top_k", f"{_predict('width')}?top_k=1000000", headers, noise.tobytes())
    kept = headers | {"Idempotency-Key": "a"}
    yield Attack("answer: /v1, kept", _predict("width"), kept, noise.tobytes())
    many = np.tile(noise[: len(noise) // 1000], (1000, 1))
    npy = {"Content-Type": "application/x-npy"}
    yield Attack("answer: /v1 npy, 1000 rows", _predict("width"), npy, saved(many))
    for rows in (1, 512):  # as many numbers as JSON may have
        numbers = noise[: sizes.body // 8].tobytes()
        sent = binary("width", "FP32", [rows, sizes.body // 8 // rows], numbers)
        yield sent._replace(name=f"answer: JSON of 8 million, {rows} rows")
        yield sent._replace(
            name=f"answer: JSON of 8 million, {rows} rows, gzip", headers=sent.headers | gzipped
        )
    small = noise[: sizes.body // 16].tobytes()
    sent = binary("width", "FP32", [1, sizes.body // 16], bytes(len(small)), binary_data_output=True)
    yield sent._replace(name="answer: zeros, gzip", headers=sent.headers | gzipped)
    yield from _larger_answers(sizes)
    yield from _text_answers(sizes)


def _larger_answers(sizes: Sizes) -> Iterator[Attack]:
    """Answers that are much longer than their requests."""
    for outputs in (True, False):
        for side in (math.isqrt(sizes.body // 4), math.isqrt(sizes.body)):
            x = np.random.default_rng(0).random(side, np.float32).tobytes()
            sent = binary("outer", "FP32", [1, side], x, binary_data_output=outputs)
            kind = "binary" if outputs else "JSON"
            yield sent._replace(name=f"answer: {kind}, {side} times as long")
    for model in ("labels", "unforeseen"):
        for count in (STRINGS, sizes.body // 8 - 1000):
            numbers = np.arange(count, dtype=np.int64).tobytes()
            for outputs in (True, False):
                kind = "binary" if outputs else "JSON"
                sent = binary(model, "INT64", [1, count], numbers, binary_data_output=outputs)
                yield sent._replace(name=f"answer: {kind}, {model}, {count}")


def _text_answers(sizes: Sizes) -> Iterator[Attack]:
    """Strings of as many bytes as ONNX Runtime takes: one, many, in several rows."""
    for name, unit in {"letters": b"a", "control characters": b"\1", "euro signs": b"\xe2\x82\xac"}.items():
        for rows, width in ((1, 1), (1, STRINGS), (2, 1), (4, 1), (4, STRINGS // 4), (1000, 1)):
            row_bytes = min(sizes.body // 4, (sizes.body - 1000) // rows)
            count = max(0, row_bytes // width - 4) // len(unit)
            data = (count * len(unit)).to_bytes(4, "little") + count * unit
            for outputs in (True, False):
                kind = "binary" if outputs else "JSON"
                sent = binary("text", "BYTES", [rows, width], rows * width * data, binary_data_output=outputs)
                yield sent._replace(name=f"answer: {kind}, {rows} x {width} x {count} {name}")
