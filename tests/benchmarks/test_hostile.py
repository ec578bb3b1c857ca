"""Hostile bodies, a hundredth of their size: each is answered, never with a 5xx, and the next request too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.hostile.__main__ import write_models
from benchmarks.hostile.bodies import Sizes, attacks
from cobatch.server.settings.schema import ModelSettings
from tests.support.http.in_process import in_process

SIZES = Sizes(json=1 << 17, body=1 << 19)


@pytest.mark.slow
async def test_no_body_is_a_servers_error(tmp_path: Path) -> None:
    names = write_models(tmp_path)
    settings = [ModelSettings(path=str(tmp_path / f"{name}.onnx"), threads=1) for name in names]
    limits: dict[str, Any] = {
        "max_json_bytes": SIZES.json,
        "max_body_bytes": SIZES.body,
        "compress_min_bytes": 1000,
    }
    wrong = []
    seen = set()
    async with in_process(*settings, **limits) as running:
        good = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
        for attack in attacks(SIZES):
            answer = await running.http.post(attack.path, content=attack.body, headers=attack.headers)
            seen.add(answer.status_code)
            if answer.status_code not in (200, 400, 413, 422) or not whole(answer):
                wrong.append((attack.name, answer.status_code, answer.text[:200]))
        assert (await running.http.post("/v2/models/width/infer", json=good)).status_code == 200
    assert wrong == []
    assert seen == {200, 400, 413, 422}


def whole(answer: httpx.Response) -> bool:
    """Return whether the answer's JSON, if it is JSON as a whole, can be read."""
    if "json" not in answer.headers["content-type"]:
        return True
    return json.loads(answer.content) is not None
