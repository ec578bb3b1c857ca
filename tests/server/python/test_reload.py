"""A model in Python that is loaded again when its files change."""

from __future__ import annotations

import asyncio
import queue
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest import mock

import pytest

import cobatch.server.inference.model
from cobatch.server.app import create_app
from cobatch.server.inference.reloading import Backoff, changes
from cobatch.server.settings.schema import ModelSettings, Settings
from cobatch.server.settings.values import SettingsError
from tests.support.http.serving import DEADLINE_S, Served, data_of, post, rows_of, serve

MODEL = """
from typing import Annotated
import numpy as np
X = Annotated[np.ndarray, "INT64", [-1, 1]]

def model(x: X) -> X:
    return x * {factor}
"""
ASK = post("/v2/models/model/infer", rows_of(1))


class Files:
    """The model's file. Changes are told when the test says so, and answered by the log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logged: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._changed = asyncio.Event()

    async def changes(self, folder: str) -> AsyncIterator[None]:
        assert folder == str(self.folder)
        while True:
            await self._changed.wait()
            self._changed.clear()
            yield

    def write(self, text: str, served: Served | None = None) -> str:
        """Change the file; return the model's message about it."""
        (self.folder / "app.py").write_text(text)
        if served is None:
            return ""
        served.call(self._changed.set)
        return self.logged.get(timeout=DEADLINE_S)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    files.write(MODEL.format(factor=2))
    log = mock.Mock()
    log.error = log.info = lambda text, *values: files.logged.put(text % values) if "ed" in text else None
    with (
        mock.patch.object(cobatch.server.inference.model, "changes", files.changes),
        mock.patch.object(cobatch.server.inference.model, "log", log),
    ):
        yield files


def test_a_changed_file(files: Files) -> None:
    model = ModelSettings(python="app.py:model", python_path=str(files.folder), reload=True, instances=2)
    with serve(True, (model,)) as served:
        while not files.logged.empty():
            files.logged.get()
        assert data_of(served.ask(ASK)) == [2]
        assert files.write(MODEL.format(factor=3), served) == "model model: loaded again"
        assert [data_of(served.ask(ASK)) for _ in range(3)] == [[3]] * 3
        text = files.write("def broken(", served)
        assert text.startswith("model model: the changed files cannot be loaded: importing app.py failed")
        assert data_of(served.ask(ASK)) == [3]
        text = files.write(MODEL.format(factor=4).replace("INT64", "FP32"), served)
        assert "its inputs or outputs have changed; start the server again" in text
        assert data_of(served.ask(ASK)) == [3]
        assert files.write(MODEL.format(factor=5), served) == "model model: loaded again"
        assert data_of(served.ask(ASK)) == [5]
        assert len(served.inference.models["model"]._workers) == 2


async def test_changes_of_files(tmp_path: Path) -> None:
    """A change from before the watch began may be told, too."""
    (tmp_path / "app.py").write_text("")
    number = 0
    async with asyncio.timeout(DEADLINE_S):
        told = changes(str(tmp_path))
        first = asyncio.ensure_future(anext(told))
        while not first.done():
            number += 1
            (tmp_path / "app.py").write_text(str(number))
            await asyncio.wait([first], timeout=0.01)
    await first
    await told.aclose()  # type: ignore[attr-defined]


def test_the_first_two_in_a_row_are_immediate() -> None:
    backoff = Backoff()
    assert [backoff.delay_s(0) for _ in range(9)] == [0, 0, 1, 2, 4, 8, 16, 30, 30]
    assert [backoff.delay_s(7) for _ in range(3)] == [0, 0, 1]


def test_it_needs_a_library(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(MODEL)
    model = ModelSettings(python="app.py:model", python_path=str(tmp_path), reload=True)
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(SettingsError, match=re.escape("pip install 'cobatch[reload]'")),
    ):
        create_app(Settings(models=(model,)))
