"""The example of text recognition reads pages as rapidocr itself does."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rapidocr import RapidOCR

from benchmarks.common.pages import page
from tests.support.http.process import WAIT_S, Cobatch
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

# rapidocr pads lines to the widest one of six of its page, so its own scores depend on their neighbours.
SCORES_WITHIN = 0.05


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Cobatch]:
    prepare, folder = ROOT / "examples" / "ocr" / "prepare.py", tmp_path / "ocr"
    subprocess.run([sys.executable, str(prepare), str(folder)], check=True)
    # Libraries that the example uses warn.
    with Cobatch(
        tmp_path, "--config", folder / "cobatch.toml", "--port", "0", env={"PYTHONWARNINGS": "default"}
    ) as server:
        yield server.ready()


def read(server: Cobatch, picture: bytes) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/models/ocr/infer", picture, {"content-type": "image/png"}
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        return json.load(answer)


def test_pages_are_read_as_by_rapidocr_itself(server: Cobatch) -> None:
    pages = [page(seed, lines=4) for seed in (1, 2)]
    with ThreadPoolExecutor(len(pages)) as threads:
        answers = list(threads.map(lambda one: read(server, one), pages))
    rapidocr = RapidOCR(params={"Global.log_level": "error"})
    for picture, lines in zip(pages, answers, strict=True):
        own: Any = rapidocr(picture)
        assert [line["text"] for line in lines] == list(own.txts)
        assert [line["box"] for line in lines] == own.boxes.tolist()
        assert [line["score"] for line in lines] == pytest.approx(list(own.scores), abs=SCORES_WITHIN)
