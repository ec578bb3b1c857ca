"""A model in Python that is loaded again when its files change."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import cobatch.engines.python.process
import cobatch.server.inference.model
from cobatch.engines.errors import EngineLoadError
from cobatch.engines.python.engine import ProcessEngine
from cobatch.server.app import create_app
from cobatch.server.inference.model import Model
from cobatch.server.inference.reloading import Backoff, changes
from cobatch.server.settings.schema import ModelSettings, Settings
from cobatch.server.settings.values import SettingsError
from tests.support.http.serving import DEADLINE_S, Served, data_of, get, opened_again, post, rows_of, serve

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
        self.last = False  # the next change is
        self.fails = False  # the watch does, at the next change
        self._changed = asyncio.Event()

    async def changes(self, folder: str) -> AsyncIterator[None]:
        assert folder == str(self.folder)
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.fails:
                raise OSError("no watches are left")
            yield
            if self.last:
                return

    def write(self, text: str, served: Served | None = None) -> str:
        """Change the file; return the model's message about it."""
        (self.folder / "app.py").write_text(text)
        if served is None:
            return ""
        self.tell(served)
        return self.message()

    def tell(self, served: Served) -> None:
        """Tell that the file has changed."""
        served.call(self._changed.set)

    def message(self) -> str:
        """Return the model's next message."""
        return self.logged.get(timeout=DEADLINE_S)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    files.write(MODEL.format(factor=2))
    log = mock.Mock()
    log.error = log.exception = log.info = lambda text, *values: (
        files.logged.put(text % values) if "changed" in text or "loaded" in text else None
    )
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


class Gate:
    """Processes of models start once `may_start` is set, or not, with an `error`."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.may_start = threading.Event()
        self.may_start.set()
        self.lost = threading.Event()  # a worker
        self.error: EngineLoadError | None = None
        self.starts = 0
        self.pid = 0  # of the process that serves

    def open(self, engine: ProcessEngine) -> None:
        self.asked.set()
        assert self.may_start.wait(DEADLINE_S)
        self.starts += 1
        error, self.error = self.error, None
        if error is not None:
            raise error
        _OPEN(engine)


_OPEN = ProcessEngine.open


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate, on_lost = Gate(), Model._on_lost

    def note(model: Model, *lost: Any) -> None:
        on_lost(model, *lost)
        gate.lost.set()

    monkeypatch.setattr(ProcessEngine, "open", lambda engine: gate.open(engine))  # noqa: PLW0108 - as a method
    monkeypatch.setattr(Model, "_on_lost", note)
    return gate


@contextlib.contextmanager
def reloading(files: Files) -> Iterator[Served]:
    """Serve the model; the first change of its file is the last one, too."""
    model = ModelSettings(python="app.py:model", python_path=str(files.folder), reload=True)
    with serve(True, (model,)) as served:
        while not files.logged.empty():
            files.logged.get()
        files.last = True
        yield served


def pid(served: Served) -> int:
    engine: Any = served.inference.models["model"].engine_worker.engine
    number: int = engine.pid
    return number


@contextlib.contextmanager
def loading_again(files: Files, gate: Gate) -> Iterator[Served]:
    """Serve the model, which waits at the gate while it is loaded again."""
    with reloading(files) as served:
        gate.pid = pid(served)
        gate.asked.clear()
        gate.may_start.clear()
        files.tell(served)
        assert gate.asked.wait(DEADLINE_S)
        try:
            yield served
        finally:
            gate.may_start.set()


def test_all_routes_answer_while_it_is_loaded_again(files: Files, gate: Gate) -> None:
    with loading_again(files, gate) as served:
        for path in ("/v2/models/model", "/v2/models/model/config", "/openapi.json"):
            assert served.ask(get(path)).status == 200
        assert data_of(served.ask(ASK)) == [2]
        gate.may_start.set()
        assert files.message() == "model model: loaded again"


def test_its_process_ends_while_another_one_fails_to_load(files: Files, gate: Gate) -> None:
    with loading_again(files, gate) as served:
        gate.error = EngineLoadError("not today")
        os.kill(gate.pid, signal.SIGKILL)
        assert gate.lost.wait(DEADLINE_S)
        gate.may_start.set()
        assert files.message() == "model model: the changed files cannot be loaded: not today"
        assert data_of(served.ask(ASK)) == [2]


def test_its_process_ends_while_another_one_is_loaded(files: Files, gate: Gate) -> None:
    """No third one is started."""
    with loading_again(files, gate) as served:
        os.kill(gate.pid, signal.SIGKILL)
        assert gate.lost.wait(DEADLINE_S)
        gate.may_start.set()
        opened_again(served, "model")
        assert gate.starts == 2
        assert data_of(served.ask(ASK)) == [2]


def test_the_server_ends_while_it_is_loaded_again(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    log = mock.Mock(info=lambda _, name, line: lines.put(line))
    monkeypatch.setattr(cobatch.engines.python.process, "log", log)
    with reloading(files) as served:
        pids = [pid(served)]
        files.write("import os, time; print('loading', os.getpid(), flush=True); time.sleep(1000)")
        files.tell(served)
        while len(pids) < 2:
            pids += [int(line.split()[-1]) for line in [lines.get(timeout=DEADLINE_S)] if "loading" in line]
    for number in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_the_watch_fails(files: Files) -> None:
    with reloading(files) as served:
        files.fails = True
        files.tell(served)
        assert files.message() == "model model: changed files are not loaded any more"
        assert data_of(served.ask(ASK)) == [2]


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
