"""A Python model that misbehaves: only its own callers notice, and it is started again.

The other model's process serves throughout. Time passes only when a test skips it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http.clock import Clock
from tests.support.http.serving import (
    DEADLINE_S,
    Answer,
    Client,
    Served,
    data_of,
    get,
    opened_again,
    post,
    rows_of,
    serve,
)
from tests.support.python_models import faulty
from tests.support.python_models.faulty import (
    CRASHES,
    EXITS,
    FAILS,
    GATE,
    HANGS,
    HOLDS_LOCK,
    LEAKS,
    REFUSED,
    WAITS,
)
from tests.support.python_models.gates import passed

LIMIT_S = 3600.0


def ask(*rows: int, model: str = "bad") -> bytes:
    return post(f"/v2/models/{model}/infer", rows_of(*rows))


@pytest.fixture(scope="module", params=WAYS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with two such models, `bad` and `good`; each test leaves both well."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(faulty.__file__, folder)
    os.mkfifo(folder / GATE.name)
    models = [
        ModelSettings(
            name=name,
            python="faulty.py:Faulty",
            python_path=str(folder),
            max_batch_size=4,
            execution_timeout_ms=LIMIT_S * 1000,
            threads=1,
        )
        for name in ("bad", "good")
    ]
    with serve(models=tuple(models), clock=Clock(), **way(request.param)) as served:
        yield served


on_one_edge = pytest.mark.parametrize("running", ["fast"], indirect=True)


def pid(running: Served, model: str = "bad") -> int:
    """Return the number of a model's process."""
    engine: Any = running.inference.models[model].engine_worker.engine
    number: int = engine.pid
    return number


def pass_gate(running: Served) -> None:
    """Let the row that waits go on, once it has come."""
    with passed(Path(running.inference.models["bad"].settings.python_path, GATE.name)):
        pass


@contextlib.contextmanager
def heard(pattern: str) -> Iterator[threading.Event]:
    """Give an event that is set when a model's process prints this, a regular expression."""
    event = threading.Event()

    def hear(record: logging.LogRecord) -> bool:
        if re.search(pattern, record.getMessage()):
            event.set()
        return True

    logger = logging.getLogger("cobatch.python")
    logger.addFilter(hear)
    try:
        yield event
    finally:
        logger.removeFilter(hear)


def both_well(running: Served) -> None:
    assert data_of(running.ask(ask(1, model="good"))) == [2]
    assert data_of(running.ask(ask(2))) == [4]


def told(answer: Answer, status: int, slug: str, log: pytest.LogCaptureFixture) -> str:
    """Check a problem, and return the log's message with its reference."""
    assert (answer.status, answer.slug) == (status, slug)
    reference = f"reference {answer.json['reference']}"
    (line,) = [one.getMessage() for one in log.records if reference in one.getMessage()]
    return line


def send(running: Served, clients: contextlib.ExitStack, row: int) -> Client:
    """Send a request, and wait until it is accepted."""
    counters = running.batcher("bad").counters
    before = counters.accepted
    client = clients.enter_context(running.connect())
    client.send(ask(row))
    running.until(lambda: counters.accepted > before)
    return client


@pytest.mark.parametrize(("row", "end"), [(EXITS, "exited with status 3"), (CRASHES, "ended by SIGSEGV")])
def test_a_row_that_ends_the_process(
    running: Served, row: int, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = pid(running, "good")
    for _ in range(2):  # in a row
        line = told(running.ask(ask(row)), 500, "run-failed", caplog)
        assert end in line
        assert f"\n  row {row}" in line
        assert data_of(running.ask(ask(1, model="good"))) == [2]
    both_well(running)
    assert pid(running, "good") == before
    assert re.search(
        r'cobatch_engine_ends_total\{model="bad"\} [1-9]', running.ask(get("/metrics")).body.decode()
    )


@pytest.mark.parametrize("row", [HANGS, HOLDS_LOCK])
def test_a_row_that_does_not_end(running: Served, row: int, caplog: pytest.LogCaptureFixture) -> None:
    """Its process says where it is, also with the interpreter lock held."""
    caplog.set_level("INFO", "cobatch.python")
    place = r"faulty\.py\", line \d+ in (predict|misbehave)"
    with contextlib.ExitStack() as clients, heard(f"row {row}") as begun, heard(place) as said:
        client = send(running, clients, row)
        assert begun.wait(DEADLINE_S)
        assert data_of(running.ask(ask(1, model="good"))) == [2]
        before = os.pidfd_open(pid(running))
        running.skip(LIMIT_S)
        assert client.answer().slug == "execution-timeout"
        assert select.select([before], [], [], DEADLINE_S)[0], "the process was left behind"
        os.close(before)
        assert said.wait(DEADLINE_S)
    both_well(running)


@on_one_edge
def test_a_row_that_leaks(running: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Its process has no memory left, until the kernel ends it."""
    assert "MemoryError" in told(running.ask(ask(LEAKS)), 422, "input-rejected", caplog)
    assert data_of(running.ask(ask(1, model="good"))) == [2]
    os.kill(pid(running), signal.SIGKILL)
    both_well(running)


def test_the_rows_beside_it_are_answered(running: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Each runs alone afterwards: the process ends twice, not once for each half."""
    batcher = running.batcher("bad")
    failed, suspects = batcher.counters.failed_runs, batcher.suspects
    with contextlib.ExitStack() as clients:
        first = send(running, clients, WAITS)
        one, two, bad, three = (send(running, clients, row) for row in (1, 2, EXITS, 3))
        pass_gate(running)
        assert data_of(first.answer()) == [2 * WAITS]
        assert [data_of(each.answer()) for each in (one, two, three)] == [[2], [4], [6]]
        told(bad.answer(), 500, "run-failed", caplog)
        assert batcher.counters.failed_runs - failed == 2
        assert batcher.suspects - suspects == 1
    both_well(running)


def test_later_restarts_wait(running: Served, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        told(running.ask(ask(EXITS)), 500, "run-failed", caplog)
    refused = running.ask(ask(1))
    assert "the engine is started again in 1 s" in told(refused, 503, "engine-restarting", caplog)
    assert (refused.headers["retry-after"], refused.json["retry_after_ms"]) == ("1", 1000)
    assert running.ask(get("/v2/health/live")).status == 200
    assert running.ask(get("/v2/models/bad/ready")).status == 503
    assert data_of(running.ask(ask(1, model="good"))) == [2]
    running.skip(1.0)
    opened_again(running, "bad")
    both_well(running)


@on_one_edge
def test_an_idle_process_that_ends(running: Served) -> None:
    """It is started again before a request comes, which could not be its cause."""
    before, failed = pid(running), running.batcher("bad").counters.failed
    os.kill(before, signal.SIGKILL)
    both_well(running)
    assert pid(running) != before
    assert running.batcher("bad").counters.failed == failed


def test_a_row_that_the_model_refuses(running: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Its caller gets the model's own words, which are not logged; rows beside it are answered."""
    with contextlib.ExitStack() as clients:
        first = send(running, clients, WAITS)
        one, refused, two = (send(running, clients, row) for row in (1, REFUSED, 2))
        pass_gate(running)
        assert data_of(first.answer()) == [2 * WAITS]
        assert [data_of(each.answer()) for each in (one, two)] == [[2], [4]]
        answer = refused.answer()
    assert (answer.status, answer.slug) == (422, "refused-by-model")
    assert answer.json["detail"] == rf"{REFUSED} is no number of this model\udcff"
    assert "no number of this model" not in caplog.text
    both_well(running)


@on_one_edge
def test_errors_have_their_traceback_in_the_log(running: Served, caplog: pytest.LogCaptureFixture) -> None:
    line = told(running.ask(ask(1, FAILS)), 422, "input-rejected", caplog)
    assert "ValueError: no such row" in line
    assert f"\n  row {FAILS}" in line.partition("its last output:")[2]


def test_the_end_of_the_server_ends_them() -> None:
    model = ModelSettings(python="faulty.py:Faulty", python_path=str(GATE.parent))
    with serve(True, (model,)) as running:
        number = pid(running, "Faulty")
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
