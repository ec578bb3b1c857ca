"""Long JSON is cut and read in pieces: the values of a whole parser, ragged data, and the work of a step."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from cobatch.engines.base import Signature, TensorSpec
from cobatch.server.http.problem import Problem
from cobatch.server.v2 import decode
from cobatch.server.v2.checks import MAX_STRINGS
from cobatch.server.v2.decode import LARGE_BYTES, Decoder, parse
from cobatch.server.v2.json_data import JsonReader
from cobatch.server.v2.long_json import LONG_BYTES, PIECE_BYTES
from cobatch.server.v2.messages import InferMessage, Parsed
from tests.support.http.parsing import ParsedTexts

WIDTH = 2000
DECODER = Decoder(Signature((TensorSpec("x", "FP32", (WIDTH,)),), (TensorSpec("y", "FP32", (1,)),)), 1000)


def message(data: list[object], **more: object) -> bytes:
    tensor = {"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


def test_a_long_array_is_cut_out_and_keeps_its_values() -> None:
    values: list[object] = [n / 8 for n in range(WIDTH)]
    body = message(values, id="a", outputs=[{"name": "y"}])
    assert len(body) >= LARGE_BYTES
    assert len(parse(body, None)[2]) == 1
    decoded = DECODER.decode(body, None)
    assert np.frombuffer(decoded.payloads[0], "<f4").tolist() == values  # type: ignore[arg-type]
    assert decoded.id == "a"


@pytest.mark.parametrize(
    "inner", [[[7.25] * 900], [[]], [[1.0, 2.0], []], [[[1.0]]]], ids=["longer", "empty", "even", "deep"]
)
def test_rows_hidden_within_a_row_are_refused(inner: list[object]) -> None:
    """Flattened by simdjson they would be more or fewer numbers than their place in the batch takes."""
    data = [0.5, *inner, *[0.5] * (WIDTH - 1 - len(inner))]
    with pytest.raises(Problem) as refused:
        DECODER.decode(message(data), None)
    assert refused.value.kind.slug == "wrong-data"


ODD: list[object] = [1.5, "text", True, None, {}, 300, -1, 2**63, 2**64, 1e39, 1e400]


@pytest.mark.parametrize("odd", ODD, ids=repr)
@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT8", "UINT64", "BOOL", "BYTES", "BF16"])
def test_the_same_values_and_refusals_as_through_msgspec(datatype: str, odd: object) -> None:
    plain = {"BOOL": True, "BYTES": "grüße"}.get(datatype, 7)
    decoder = Decoder(Signature((TensorSpec("x", datatype, (WIDTH,)),), (TensorSpec("y", "FP32", (1,)),)), 10)
    for data in ([plain] * WIDTH, [plain] * (WIDTH - 1), [*[plain] * (WIDTH - 1), odd]):
        tensor = {"name": "x", "shape": [1, WIDTH], "datatype": datatype, "data": data}
        body = json.dumps({"inputs": [tensor]}, ensure_ascii=False).replace("Infinity", "1e400").encode()
        assert len(body) >= LARGE_BYTES
        through_msgspec = msgspec.json.decode(body, type=InferMessage)
        assert outcome(decoder, parse(body, None)) == outcome(decoder, (through_msgspec, None, ()))


def outcome(decoder: Decoder, parsed: Parsed) -> object:
    """Return the payload as a list or bytes, or the problem's detail."""
    try:
        (payload,) = decoder.read(parsed).payloads
    except Problem as problem:
        return problem.detail
    return payload if isinstance(payload, list) else bytes(payload)


def flexible(datatype: str, axes: int) -> Decoder:
    spec = TensorSpec("x", datatype, (-1,) * (axes - 1))
    return Decoder(Signature((spec,), (TensorSpec("y", "FP32", (1,)),)), 1000)


def nested(flat: list[Any], shape: list[int]) -> list[Any]:
    width = len(flat) // shape[0]
    return (
        flat
        if len(shape) == 1
        else [nested(flat[n * width : (n + 1) * width], shape[1:]) for n in range(shape[0])]
    )


VALUES: dict[str, list[Any]] = {
    "FP32": [0.5, -1, 2, 1e-3, 3.25e7],
    "INT64": [0, -5, 2**40],
    "UINT8": [0, 7, 255],
    "BOOL": [True, False, True],
    "BYTES": ["", "a", 'q"\\[]{},', "grüße\n", "\\", '"', ",", "x" * 70_000],
}


@pytest.mark.parametrize("datatype", VALUES)
@pytest.mark.parametrize("shape", [[1, 2000], [3, 40, 50], [5, 2, 7, 9, 11], [1, 1, 30_000], [700, 50]])
@pytest.mark.parametrize("indent", [None, 1])
def test_any_nesting_and_blanks(datatype: str, shape: list[int], indent: int | None) -> None:
    elements = math.prod(shape)
    values = VALUES[datatype]
    flat = [values[n % (len(values) - (n > 9))] for n in range(elements)]
    decoder = flexible(datatype, len(shape))
    for data in (flat, nested(flat, shape)):
        tensor = {"name": "x", "shape": shape, "datatype": datatype, "data": data}
        (payload,) = decoder.decode(json.dumps({"inputs": [tensor]}, indent=indent).encode(), None).payloads
        if datatype == "BYTES":
            assert payload == [value.encode() for value in flat]
        else:
            dtype = decoder.signature.inputs[0].dtype
            assert np.array_equal(np.frombuffer(payload, dtype), np.array(flat, dtype))  # type: ignore[arg-type]


LONG = ",".join(["1"] * 2000)
ROW = f"[{LONG}]"


@pytest.mark.parametrize(
    "data",
    [
        f"[{ROW},{ROW[:-3]}]]", f"[{ROW},[{ROW}]]", f"[{ROW},{LONG}]", f"[{ROW}{ROW}]", f"[[{LONG},],{ROW}]",
        f"[{ROW}1,[{LONG[2:]}]]", f"[{ROW},1[,{LONG[2:]}]]", f"[[{LONG},1 1],[{LONG[4:]}]]", f"[{ROW},{ROW}",
        f"[[,{LONG[2:]}],{ROW}]", "[" * 5000 + LONG + "]" * 5000, f"[{ROW},[{LONG[:-1]}nan]]",
        f"[{ROW},[{LONG[:-1]}null]]", f"[{ROW},[{LONG[:-2]},1.]]", f"[{ROW},,{ROW}]", f"[{ROW},{ROW}]]",
    ],
)  # fmt: skip
def test_damaged_nestings_are_refused(data: str) -> None:
    body = f'{{"inputs":[{{"name":"x","shape":[2,2000],"datatype":"FP32","data":{data}}}]}}'
    with pytest.raises(Problem) as refused:
        flexible("FP32", 2).decode(body.encode(), None)
    assert refused.value.kind.slug in {"wrong-data", "not-json"}


TEXT = '"' + '","'.join(["a"] * 2000) + '"'


@pytest.mark.parametrize(
    "data",
    [
        f"[[{TEXT}],[{TEXT},]]", f"[[{TEXT}],[,{TEXT}]]", f"[[{TEXT}][{TEXT}]]", f"[[{TEXT}],{TEXT}]",
        f"[[{TEXT}],[{TEXT} {TEXT}]]", f"[[{TEXT}],[{TEXT[:-4]}]]", f'[[{TEXT}],[{TEXT},"\\x"]]',
    ],
)  # fmt: skip
def test_damaged_strings_are_refused(data: str) -> None:
    body = f'{{"inputs":[{{"name":"x","shape":[2,2000],"datatype":"BYTES","data":{data}}}]}}'
    with pytest.raises(Problem):
        flexible("BYTES", 2).decode(body.encode(), None)


@pytest.mark.parametrize("data", [ROW, f"[{ROW},{ROW}]", f"[{' ' * 9000}]"])
def test_numbers_are_no_strings(data: str) -> None:
    with pytest.raises(Problem) as refused:
        flexible("BYTES", 3).decode(message_of(data, shape="[2,1000,1]", datatype="BYTES"), None)
    assert refused.value.kind.slug == "wrong-data"


@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BOOL", "BF16"])
@pytest.mark.parametrize("data", [f"[{TEXT}]", f"[[{TEXT}],[{TEXT}]]"])
def test_strings_are_no_numbers(datatype: str, data: str) -> None:
    with pytest.raises(Problem) as refused:
        flexible(datatype, 2).decode(message_of(data, shape="[2,2000]", datatype=datatype), None)
    assert refused.value.kind.slug == "wrong-data"


@pytest.mark.parametrize("unit", ["a", "é", "€", "😀", "\\", '"', "\n", "\\ud83d", 'aé€😀\\"\n'])
@pytest.mark.parametrize("ascii_", [True, False])
def test_a_long_string_is_read_in_pieces(unit: str, ascii_: bool) -> None:
    for lead in ("", "a", "ab", "abc", "abcde"):
        text = lead + unit * (60_000 // len(unit))
        data = json.dumps([text], ensure_ascii=ascii_)
        body = message_of(data, datatype="BYTES")
        assert flexible("BYTES", 2).decode(body, None).payloads[0] == [text.encode()]


@pytest.mark.parametrize("unit", ["\\ud83d", "\\ude00", "\\u12", "\\x"])
def test_a_long_string_of_no_characters(unit: str) -> None:
    with pytest.raises(Problem):
        flexible("BYTES", 2).decode(message_of(f'["{unit * 9000}"]', datatype="BYTES"), None)


def test_a_mark_cannot_be_sent() -> None:
    message, _, values = parse(message_of(f'"{"0" * 16}:0"'), None)
    assert len(values) == 0
    assert bytes(message.inputs[0].data) == f'"{"0" * 16}:0"'.encode()


def message_of(data: str, before: str = "", shape: str = "[1,1]", datatype: str = "FP32") -> bytes:
    blanks = " " * LARGE_BYTES
    tensor = f'{{"name":"x","shape":{shape},"datatype":"{datatype}","data":{data}}}'
    return f'{{{before}"inputs":[{tensor}]{blanks}}}'.encode()


# How much work

BODY_BYTES = 1 << 21


def fill(unit: str, last: str) -> str:
    return unit * (BODY_BYTES // len(unit)) + last


HOSTILE = {
    "integers": message_of(f"[{fill('1,', '1')}]", shape=f"[1,{BODY_BYTES // 2 + 1}]"),
    "long numbers": message_of(f"[{fill('0.12345678901234567,', '1')}]", shape=f"[1,{BODY_BYTES // 20 + 1}]"),
    "one long number": message_of(f"[1,{fill('1', '')}]", shape="[1,2]"),
    "empty arrays": message_of(f"[{fill('[],', '[]')}]"),
    "arrays of one": message_of(f"[{fill('[1],', '[1]')}]"),
    "deep": message_of(fill("[", "")),
    "deep and closed": message_of("[" * (BODY_BYTES // 2) + "]" * (BODY_BYTES // 2)),
    "only closed": message_of("[" + fill("]", "")),
    "blanks": message_of(f"[{fill(' ', '1')}]"),
    "commas": message_of(f"[{fill(',', '1')}]"),
    "empty objects": message_of(f"[{fill('{},', '{}')}]"),
    "empty strings": message_of("[" + fill('"",', '""') + "]", datatype="BYTES"),
    "nested strings": message_of("[" + fill('[""],', '[""]') + "]", datatype="BYTES"),
    "strings, then a number": message_of("[" + fill('"",', "1") + "]", datatype="BYTES"),
    "arrays of strings in each other": message_of(fill('["a",', "1"), datatype="BYTES"),
    "one string": message_of(f'["{fill("a", "")}"]', datatype="BYTES"),
    "one string of quotes": message_of(f'["{fill(chr(92) + chr(34), "")}"]', datatype="BYTES"),
    "one string of backslashes": message_of(f'["{fill(chr(92) * 2, "")}"]', datatype="BYTES"),
    "a string without end": message_of(f'["{fill("a", "")}', datatype="BYTES"),
    "empty arrays for strings": message_of(f"[{fill('[],', '[]')}]", datatype="BYTES"),
    "parameters": message_of("[1]", '"parameters":{' + fill('"a":1,', '"b":1') + "},"),
    "unknown fields": message_of("[1]", fill('"a":1,', "")),
    "an unknown array": message_of("[1]", f'"a":[{fill("1,", "1")}],'),
    "inputs": ('{"inputs":[' + fill('{"name":"","shape":[],"datatype":""},', "{}") + "]}").encode(),
    "outputs": message_of("[1]", '"outputs":[' + fill('{"name":"y"},', "{}") + "],"),
    "shape": message_of("[1]", shape=f"[{fill('1,', '1')}]"),
    "name": message_of("[1]", f'"id":"{fill("a", "")}",'),
}  # fmt: skip
MAY_BE_LONG = {"one string", "one string of quotes", "one string of backslashes"}


@pytest.mark.parametrize("form", HOSTILE)
def test_no_parser_gets_more_than_a_piece(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of a parser is for a bounded text, and so makes a bounded number of objects."""
    parsed = ParsedTexts(monkeypatch)
    parsed.watch(decode, "_decode")
    parsed.watch(JsonReader, "_parse")
    parsed.watch(JsonReader, "_read_piece")
    body = HOSTILE[form]
    with contextlib.suppress(Problem):
        flexible("BYTES" if b'"BYTES"' in body else "FP32", 2).decode(body, None)
    assert parsed.longest <= PIECE_BYTES + LONG_BYTES
    assert parsed.total <= 2 * len(body)


def test_strings_are_counted() -> None:
    decoder = flexible("BYTES", 2)
    for count, refused in ((MAX_STRINGS, False), (MAX_STRINGS + 1, True)):
        text = message_of("[" + ",".join(['""'] * count) + "]", shape=f"[1,{count}]", datatype="BYTES")
        tensor = {"name": "x", "shape": [1, count], "datatype": "BYTES"}
        header = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": 4 * count}}]}).encode()
        for body, length in ((text, None), (header + bytes(4 * count), len(header))):
            with pytest.raises(Problem) if refused else contextlib.nullcontext() as problem:
                assert list(decoder.decode(body, length).payloads) == [[b""] * count]
            assert problem is None or problem.value.kind.slug == "too-many-elements"


def test_outputs_are_foreseen_from_the_names_of_axes() -> None:
    x = TensorSpec("x", "FP32", (-1, 4), axis_names=("n", ""))
    y = TensorSpec("y", "FP32", (-1, -1), axis_names=("n", "n"))
    z = TensorSpec("z", "FP32", (-1, -1), axis_names=("n", "other"))
    for output, rows, n, refused in (
        (y, 1, 2**14, False),
        (y, 1, 2**14 + 1, True),
        (y, 4, 2**13 + 1, True),
        (z, 1, 2**15, False),
    ):
        decoder = Decoder(Signature((x,), (output,)), 1000)
        tensor = {"name": "x", "shape": [rows, n, 4], "datatype": "FP32"}
        data = bytes(rows * n * 16)
        message = {"inputs": [tensor | {"parameters": {"binary_data_size": len(data)}}]}
        header = json.dumps(message).encode()
        with pytest.raises(Problem, match="would have") if refused else contextlib.nullcontext():
            decoder.decode(header + data, len(header))


def test_strings_of_outputs_are_foreseen() -> None:
    x = TensorSpec("x", "INT64", (-1,), axis_names=("n",))
    y = TensorSpec("y", "BYTES", (-1, 2), axis_names=("n", ""))
    decoder = Decoder(Signature((x,), (y,)), 1000)
    for rows, count, refused in (
        (1, 2**16, False),
        (1, 2**16 + 1, True),
        (4, 2**14, False),
        (4, 2**14 + 1, True),
    ):
        tensor = {"name": "x", "shape": [rows, count], "datatype": "INT64"}
        size = 8 * rows * count
        header = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": size}}]}).encode()
        with pytest.raises(Problem) if refused else contextlib.nullcontext() as problem:
            decoder.decode(header + bytes(size), len(header))
        assert problem is None or problem.value.kind.slug == "too-many-elements"


@pytest.mark.parametrize("shape", [[1, 0, 2**29], [1, 2**29, 0], [2**29, 0, 1], [1, 0, 2**24 + 1]])
def test_empty_axes_count_like_full_ones(shape: list[int]) -> None:
    spec = TensorSpec("x", "FP32", (-1, -1))
    decoder = Decoder(Signature((spec,), (TensorSpec("y", "FP32", (1,)),)), 2**30)
    tensor = {"name": "x", "shape": shape, "datatype": "FP32", "data": []}
    with pytest.raises(Problem, match="without its empty axes"):
        decoder.decode(json.dumps({"inputs": [tensor]}).encode(), None)
    tensor["shape"] = [1, 0, 2**24]
    assert decoder.decode(json.dumps({"inputs": [tensor]}).encode(), None).rows == 1
