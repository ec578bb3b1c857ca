"""Long calls of POST /batch: the answers of short ones, and bounded work for each step."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto

from cobatch.server.batch import items as decoding
from cobatch.server.http.problem import Problem
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.v2 import decode as v2_decode
from cobatch.server.v2.long_json import ENVELOPE_BYTES
from tests.support.http.in_process import in_process
from tests.support.http.parsing import ParsedTexts
from tests.support.models import models

LIMIT = 16
# Of the items' envelopes.
MOST_BYTES = ENVELOPE_BYTES + 1024 * LIMIT
BODY_BYTES = 1 << 20


def call(count: int, data: str, shape: str = "[1,4]", extra: str = "") -> str:
    """Return a call whose items have this data."""
    tensor = f'{{"name":"x","datatype":"INT64","shape":{shape},"data":{data}}}'
    item = f'"method":"POST","url":"/v2/models/gate/infer","body":{{{extra}"inputs":[{tensor}]}}'
    return '{"requests":[' + ",".join(f'{{"id":"{n}",{item}}}' for n in range(count)) + "]}"


def fill(unit: str, end: str, size: int = BODY_BYTES) -> str:
    return unit * (size // len(unit)) + end


HOSTILE = {
    "items": '{"requests":[' + fill("{},", "{}]}"),
    "good items": call(BODY_BYTES // 150, "[1]"),
    "an item's array": call(1, f"[{fill('1,', '1')}]"),
    "arrays of all items": call(LIMIT, f"[{fill('1,', '1', BODY_BYTES // LIMIT)}]"),
    "empty arrays": call(LIMIT, f"[{fill('[],', '[]', BODY_BYTES // LIMIT)}]"),
    "parameters": call(1, "[1]", extra='"parameters":{' + fill('"a":1,', '"b":1},')),
    "an id": '{"requests":[{"id":"' + fill("a", '"}]}'),
    "headers": '{"requests":[{"headers":{' + fill('"a":"b",', '"a":"b"}}]}'),
    "blanks": '{"requests":[' + fill(" ", "]}"),
}


@pytest.mark.parametrize("form", HOSTILE)
def test_no_parser_gets_more_than_the_envelopes(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = ParsedTexts(monkeypatch)
    parsed.watch(decoding, "_decode")
    parsed.watch(decoding, "_decode_parsed")
    parsed.watch(v2_decode, "_decode")
    with contextlib.suppress(Problem):
        items, _ = decoding.decode_items(HOSTILE[form].encode(), LIMIT)
        for item in items:
            decoding.message_of(item)
    assert parsed.longest <= MOST_BYTES
    assert parsed.total <= 2 * MOST_BYTES


@pytest.mark.parametrize("width", [3, 3000, 30_000])
async def test_long_items_are_answered_like_short_ones(tmp_path: Path, width: int) -> None:
    path = models.write(tmp_path, models.negate(width="n", datatype=TensorProto.INT64), "gate.onnx")
    text = call(LIMIT, f"[{','.join(['7'] * width)}]", f"[1,{width}]")
    async with in_process(ModelSettings(path=path, threads=1)) as running:
        answer = await running.http.post("/batch", content=text.encode())
    responses: list[Any] = answer.json()["responses"]
    assert [response["id"] for response in responses] == [str(n) for n in range(LIMIT)]
    for response in responses:
        assert response["status"] == 200
        assert response["body"]["outputs"][0]["data"] == [-7] * width
