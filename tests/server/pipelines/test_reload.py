"""Pipelines whose processes are started again when their files change."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest

import cobatch.server.app
import cobatch.server.pipelines.pipeline
from cobatch.server.app import create_app
from cobatch.server.pipelines.pipeline import Pipeline
from cobatch.server.settings.schema import PipelineSettings, Settings
from cobatch.server.settings.values import SettingsError
from tests.support.http.in_process import InProcess, in_process
from tests.support.http.serving import DEADLINE_S

APP = """
import asyncio, os, pathlib
from typing import Any

class Versioned:
    def load(self):
        gate = pathlib.Path(__file__).with_name("gate")
        if gate.exists():
            pathlib.Path(__file__).with_name("loads").touch()
            while gate.exists():
                os.sched_yield()

    async def handle(self, ask: {takes}) -> Any:
        if ask.get("do") == "wait":
            await asyncio.Event().wait()
        return ["{version}", os.getpid()]
"""


class Files:
    """The folder of a pipeline. Changes are told when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told: asyncio.Queue[None] = asyncio.Queue()
        self._size = 2 * len(APP)

    async def changes(self, folder: str) -> AsyncIterator[None]:
        assert folder == str(self.folder)
        while True:
            await self._told.get()
            yield

    def write(self, version: str, takes: str = "dict") -> None:
        """Change the file and its size: by size and second Python finds old bytecode."""
        self._size += 1
        text = APP.format(version=version, takes=takes) + "#"
        (self.folder / "app.py").write_text(text.ljust(self._size, "#"))
        self._told.put_nowait(None)


async def logged(caplog: pytest.LogCaptureFixture, text: str, count: int = 1) -> None:
    """Wait for a message."""
    async with asyncio.timeout(DEADLINE_S):
        while sum(text in one for one in caplog.messages) < count:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)


async def ask(running: InProcess, what: str = "") -> list[object]:
    answer = await running.http.post("/v1/models/Versioned/infer", json={"do": what})
    told: list[object] = answer.json()
    return told


@pytest.fixture
async def files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Files]:
    caplog.set_level("INFO")
    files = Files(tmp_path)
    (tmp_path / "app.py").write_text(APP.format(version="first", takes="dict"))
    with (
        mock.patch.object(cobatch.server.pipelines.pipeline, "changes", files.changes),
        mock.patch.object(cobatch.server.app, "_need"),
    ):
        yield files


@pytest.fixture
async def running(files: Files) -> AsyncIterator[InProcess]:
    settings = PipelineSettings(
        python="app.py:Versioned", python_path=str(files.folder), processes=2, reload=True
    )
    async with in_process(pipelines=[settings]) as running:
        yield running


async def test_changed_files_are_loaded(
    running: InProcess, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await ask(running))[0] == "first"
    waiting = asyncio.create_task(ask(running, "wait"))  # it does not hold up the change
    files.write("second")
    await logged(caplog, "pipeline Versioned: loaded again")
    assert {(await ask(running))[0] for _ in range(4)} == {"second"}
    assert not waiting.done()
    waiting.cancel()


async def test_files_that_cannot_be_loaded_change_nothing(
    running: InProcess, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    files.write("second", takes="int")
    await logged(caplog, "the changed files cannot be loaded: its request or answer has changed")
    files.write("third", takes="NoType")
    await logged(caplog, "the changed files cannot be loaded: importing app.py failed: NameError")
    assert (await ask(running))[0] == "first"
    files.write("fourth")
    await logged(caplog, "loaded again")
    assert (await ask(running))[0] == "fourth"


async def test_a_process_that_ends_while_its_files_are_loaded(
    running: InProcess, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = running.inference.pipelines["Versioned"]
    assert isinstance(pipeline, Pipeline)
    gate, loads = files.folder / "gate", files.folder / "loads"
    gate.touch()
    files.write("second")
    async with asyncio.timeout(DEADLINE_S):
        while not loads.exists():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0)
    first = (await ask(running))[1]
    assert isinstance(first, int)
    os.kill(first, signal.SIGKILL)
    await logged(caplog, "a process has ended")
    gate.unlink()
    await logged(caplog, "loaded again")
    await logged(caplog, "a process was started again")
    assert {(await ask(running))[0] for _ in range(4)} == {"second"}
    assert len(pipeline._processes) == 2
    files.write("third")
    await logged(caplog, "loaded again", 2)
    assert {(await ask(running))[0] for _ in range(4)} == {"third"}


def test_without_watchfiles_it_is_refused_at_once(tmp_path: Path) -> None:
    settings = PipelineSettings(python="app.py:Versioned", python_path=str(tmp_path), reload=True)
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(SettingsError, match=r"pipelines\[\*\].reload: needs watchfiles"),
    ):
        create_app(Settings(pipelines=(settings,)))
