"""Long bodies of predictions: the values of short ones, and bounded work for each step."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import numpy as np
import pytest

from cobatch.engines.base import Signature, TensorSpec
from cobatch.server.http.problem import Problem
from cobatch.server.predictions import decode as decoding
from cobatch.server.predictions.content import JSON, MULTIPART, Content, Field
from cobatch.server.v2.decode import Decoder
from cobatch.server.v2.json_data import JsonReader
from cobatch.server.v2.long_json import LONG_BYTES, PIECE_BYTES
from tests.support.http.parsing import ParsedTexts

BODY_BYTES = 1 << 20
ROWS = [[n / 8, -n, 3] for n in range(20_000)]
ARRAY = np.array(ROWS, np.float32)


def decoder(datatype: str = "FP32") -> Decoder:
    spec = TensorSpec("x", datatype, (-1,))
    return Decoder(Signature((spec,), (TensorSpec("y", "FP32", (1,)),)), 1 << 20)


def in_json(text: str) -> Content:
    return Content(JSON, [Field("", JSON, text.encode())], [])


def in_a_form(text: str) -> Content:
    return Content(MULTIPART, [Field("x", JSON, bytearray(text.encode()))], [])


@pytest.mark.parametrize("indent", [None, 1])
def test_nested_rows(indent: int | None) -> None:
    text = json.dumps(ROWS, indent=indent)
    for content in (in_json(f'{{"inputs":{{"x":{text}}}}}'), in_a_form(f" {text}\n")):
        decoded = decoding.decode(content, decoder())
        assert decoded.rows == len(ROWS)
        assert bytes(decoded.payloads[0]) == ARRAY.tobytes()  # type: ignore[arg-type]


def test_strings() -> None:
    rows = [["a", 'q"\\[]{},é\n'], ["", "x" * 900]] * 900 + [["y" * 70_000, ""]]
    decoded = decoding.decode(in_json(json.dumps({"inputs": {"x": rows}})), decoder("BYTES"))
    assert decoded.payloads[0] == [text.encode() for row in rows for text in row]


@pytest.mark.parametrize("slash", ["/", "\\/"])
def test_base64(slash: str) -> None:
    text = base64.b64encode(ARRAY.tobytes()).decode().replace("/", slash)
    tensor = f'{{"b64":"{text}","dtype":"float32","shape":[{len(ROWS)},3]}}'
    for content in (in_json(f'{{"inputs":{{"x":{tensor}}}}}'), in_a_form(tensor)):
        decoded = decoding.decode(content, decoder())
        assert bytes(decoded.payloads[0]) == ARRAY.tobytes()  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["=", "!", "\\n", " "])
@pytest.mark.parametrize("at", [0, PIECE_BYTES - 1, PIECE_BYTES, -5])
def test_damaged_base64(change: str, at: int) -> None:
    text = base64.b64encode(ARRAY.tobytes()).decode()
    at %= len(text)
    damaged = text[:at] + change + text[at + 1 :]
    tensor = f'{{"b64":"{damaged}","dtype":"float32","shape":[{len(ROWS)},3]}}'
    with pytest.raises(Problem, match="not base64"):
        decoding.decode(in_json(f'{{"inputs":{{"x":{tensor}}}}}'), decoder())


def fill(lead: str, unit: str, end: str) -> str:
    return lead + unit * (BODY_BYTES // len(unit)) + end


HOSTILE = {
    "numbers": fill('{"inputs":{"x":[', "1,", "1]}}"),
    "empty arrays": fill('{"inputs":{"x":[', "[],", "[]]}}"),
    "rows of one": fill('{"inputs":{"x":[', "[1],", "[1]]}}"),
    "names": fill('{"inputs":{', '"abc":1,', '"x":[[1]]}}'),
    "outputs": fill('{"inputs":{"x":[[1]]},"outputs":[', '"y",', '"y"]}'),
    "top_k": fill('{"inputs":{"x":[[1]]},"top_k":{', '"y":1,', '"y":1}}'),
    "a shape": fill('{"inputs":{"x":{"b64":"","dtype":"FP32","shape":[', "1,", "1]}}}"),
    "base64": fill('{"inputs":{"x":{"dtype":"FP32","shape":[1,4],"b64":"', "AAAA", '"}}}'),
    "base64 of blanks": fill('{"inputs":{"x":{"dtype":"FP32","shape":[1,4],"b64":"', " ", '"}}}'),
    "a dtype": fill('{"inputs":{"x":{"b64":"","shape":[1],"dtype":"', "f", '"}}}'),
}


@pytest.mark.parametrize("form", HOSTILE)
def test_no_parser_gets_more_than_a_piece(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = ParsedTexts(monkeypatch)
    for name in ("_decode_request", "_decode_options", "_decode_encoded", "_from_base64_piece"):
        parsed.watch(decoding, name)
    parsed.watch(JsonReader, "_parse")
    parsed.watch(JsonReader, "_read_piece")
    text = HOSTILE[form]
    contents: list[Any] = [in_json(text), in_a_form(text[len('{"inputs":{"x":') : -2])]
    for content in contents:
        with contextlib.suppress(Problem):
            decoding.decode(content, decoder())
    assert parsed.longest <= PIECE_BYTES + LONG_BYTES
    assert parsed.total <= 3 * len(text)
