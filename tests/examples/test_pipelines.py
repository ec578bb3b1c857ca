"""The small examples of pipelines answer as their heads say."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator

import pytest
from PIL import Image

from cobatch.server.settings.schema import PipelineSettings
from tests.support.http.in_process import InProcess, in_process
from tests.support.paths import ROOT


@pytest.fixture
async def running() -> AsyncIterator[InProcess]:
    folder = str(ROOT / "examples" / "pipelines")
    pipelines = [
        PipelineSettings(python=source, python_path=folder, processes=1)
        for source in ("pictures.py:Thumbnail", "stream.py:Words")
    ]
    async with in_process(pipelines=pipelines) as running:
        yield running


async def test_a_picture_becomes_a_picture(running: InProcess) -> None:
    file = io.BytesIO()
    Image.new("RGB", (640, 320), "red").save(file, "jpeg")
    address, headers = "/v1/models/Thumbnail/infer", {"content-type": "image/jpeg"}
    answer = await running.http.post(address, content=file.getvalue(), headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    image = Image.open(io.BytesIO(answer.content))
    assert (image.format, image.size) == ("PNG", (64, 32))
    printed = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(printed, "jpeg")
    assert (await running.http.post(address, content=printed.getvalue(), headers=headers)).status_code == 200
    refused = await running.http.post(address, content=b"no picture", headers=headers)
    assert (refused.status_code, refused.json()["type"]) == (422, "/problems/refused-by-model")
    assert "the picture cannot be read" in refused.json()["detail"]


async def test_a_text_becomes_a_stream(running: InProcess) -> None:
    headers = {"content-type": "text/plain"}
    answer = await running.http.post("/v1/models/Words/infer", content="one two", headers=headers)
    assert answer.text.split("\n\n") == [
        'data: {"text":"one","place":0}',
        'data: {"text":"two","place":1}',
        "event: completed\ndata: {}",
        "",
    ]
    refused = await running.http.post("/v1/models/Words/infer", content=" ", headers=headers)
    assert (refused.status_code, refused.json()["detail"]) == (422, "the text has no words")
