"""A model in Python under the server as a process of its own: its log, and the end of its process with it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.http.process import WAIT_S, Cobatch, Connection
from tests.support.python_models import faulty
from tests.support.python_models.faulty import EXITS, HANGS, WAITS
from tests.support.python_models.gates import passed

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, params=[1, 3], ids=["one", "three"])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with one process and with three."""
    monkeypatch.setattr(Cobatch, "processes", request.param)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Cobatch]:
    shutil.copy(faulty.__file__, tmp_path)
    os.mkfifo(tmp_path / "gate")
    arguments = ["faulty.py:Faulty", "--port", "0", "--drain-timeout-s", "1"]
    with Cobatch(tmp_path, *arguments, cwd=tmp_path) as server:
        yield server.ready()


def ask(connection: Connection, row: int) -> object:
    return connection.infer("Faulty", [[row]], "INT64").rows


@contextlib.contextmanager
def watched(server: Cobatch) -> Iterator[int]:
    """Give the number of the model's process; check that it has ended at the end."""
    number = process_of(server)
    descriptor = os.pidfd_open(number)
    try:
        yield number
        assert select.select([descriptor], [], [], WAIT_S)[0], "the model's process was left behind"
    finally:
        os.close(descriptor)


def process_of(server: Cobatch) -> int:
    """Return the number of the model's process, from the system's list."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if b"\0cobatch.engines.python.child\0Faulty\0" in path.read_bytes():
                found.append(int(path.parent.name))
    (number,) = [number for number in found if server.process.pid in ancestors(number)]
    return number


def ancestors(number: int) -> Iterator[int]:
    """Iterate over the numbers of its parent, and so on."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while number > 1:
            yield (number := parent_of(number))


def parent_of(number: int) -> int:
    (parent,) = re.findall(r"PPid:\s+(\d+)", Path(f"/proc/{number}/status").read_text())
    return int(parent)


def test_it_ends_with_the_server(server: Cobatch) -> None:
    assert ask(server.connect(), 1) == [[2]]
    with watched(server) as number:
        os.kill(number, signal.SIGTERM)  # as a service manager sends it to all processes
        os.kill(number, signal.SIGINT)
        assert ask(server.connect(), 1) == [[2]]
        assert server.stop() == 0


def test_it_ends_with_a_server_that_gives_a_run_up(server: Cobatch) -> None:
    connection = server.connect()
    connection.send_infer("Faulty", [[WAITS]], "INT64")
    with watched(server), passed(server.stderr_path.parent / "gate"):  # once its run has begun
        assert server.stop() == 0


@pytest.mark.parametrize("row", [1, HANGS], ids=["idle", "busy"])
def test_it_ends_with_a_server_that_is_killed(server: Cobatch, row: int) -> None:
    connection = server.connect()
    connection.send_infer("Faulty", [[row]], "INT64")
    with watched(server) as number:
        os.kill(parent_of(number), signal.SIGKILL)


def test_what_it_prints_is_in_the_log_with_the_reference(server: Cobatch) -> None:
    connection = server.connect()
    answer = connection.infer("Faulty", [[EXITS]], "INT64")
    assert answer.status == 500
    assert ask(connection, 1) == [[2]]
    assert server.stop() == 0
    (told,) = re.findall(rf"reference {answer.json['reference']}\): (.*\n.*\n.*)", server.stderr)
    assert told == f"the model's process exited with status 3\n  its last output:\n  row {EXITS}"
