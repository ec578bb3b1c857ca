"""Several engines for one model, over the wire: they run at the same time, each on its own threads."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from unittest import mock

import pytest

import cobatch.server.inference.model
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import DEADLINE_S, GatedEngine, data_of, gate, get, opened_again, serve
from tests.support.models import models


def threads() -> list[str]:
    return sorted(one.name for one in threading.enumerate() if one.name.startswith("cobatch-gate-"))


@pytest.mark.parametrize("path", WAYS)
def test_two_run_at_the_same_time(path: str) -> None:
    engines = [GatedEngine(), GatedEngine()]
    model = ModelSettings(path="gate", max_batch_size=4, instances=2)
    with (
        mock.patch("tests.support.http.serving.load_engine", side_effect=list(engines)),
        serve(**way(path), models=(model,)) as served,
        contextlib.ExitStack() as stack,
    ):
        assert threads() == ["cobatch-gate-0.0", "cobatch-gate-0.1"]
        for engine in engines:
            engine.hold()
        clients = [stack.enter_context(served.connect()) for _ in range(2)]
        for number, client in enumerate(clients, 1):
            client.send(gate(number))
            engines[number - 1].began.get(timeout=DEADLINE_S)  # although the other one has not ended
        engines[1].release()
        assert data_of(clients[1].answer()) == [4]
        engines[0].release()
        assert data_of(clients[0].answer()) == [2]
    assert not threads()


def test_one_engine_hangs_and_the_other_keeps_working() -> None:
    engines = [GatedEngine(), GatedEngine(), GatedEngine()]
    model = ModelSettings(path="gate", max_batch_size=4, instances=2, execution_timeout_ms=50.0)
    with (
        mock.patch("tests.support.http.serving.load_engine", side_effect=engines[:2]),
        serve(True, (model,)) as served,
        served.connect() as client,
        mock.patch.object(cobatch.server.inference.model, "load_engine", return_value=engines[2]),
    ):
        engines[0].hold()
        engines[2].may_open.clear()  # its replacement takes time to open
        client.send(gate(1))
        assert client.answer().slug == "execution-timeout"
        assert served.ask(get("/v2/models/gate/ready")).status == 200
        assert data_of(served.ask(gate(2))) == [4]
        engines[2].may_open.set()
        opened_again(served, "gate")
        assert len(served.batcher().lanes) == 2
        engines[0].release()
        assert data_of(served.ask(gate(3))) == [6]


def test_onnx_runtime(tmp_path: Path) -> None:
    path = models.write(tmp_path, models.pick(), "gate.onnx")
    model = ModelSettings(path=path, max_batch_size=4, instances=3)
    with serve(True, (model,)) as served, contextlib.ExitStack() as stack:
        assert threads() == ["cobatch-gate-0.0", "cobatch-gate-0.1", "cobatch-gate-0.2"]
        clients = [stack.enter_context(served.connect()) for _ in range(30)]
        for number, client in enumerate(clients):
            client.send(gate(number % 3))
        for number, client in enumerate(clients):
            assert data_of(client.answer()) == [10 * (number % 3 + 1)]
        workers = served.inference.models["gate"]._workers.values()
        assert len({id(worker.engine) for worker in workers}) == 3
