"""The whole server over the fake GPU: build on first use, concurrent callers, faults.

`gate` answers 10, 20 and 30 for 0, 1 and 2. Other values make the kernel read out of bounds, which on a GPU
makes the context unusable.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cobatch.engines.errors import EngineLoadError
from cobatch.server.inference.model import Model
from cobatch.server.settings.schema import ModelSettings
from tests.support.gpu.engine import cuda, plan_of
from tests.support.gpu.fakecuda.control import ILLEGAL_ADDRESS, FakeCuda
from tests.support.http.serving import Answer, Served, data_of, gate, get, opened_again, post, serve
from tests.support.models import models

__all__ = ["cuda"]  # the fixture

DEADLY = 99


@pytest.fixture(params=[True, False], ids=["graphs", "calls"])
def graphs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@contextlib.contextmanager
def served(folder: Path, *, gpus: int = 1, fast: bool = True, **settings: Any) -> Iterator[Served]:
    """Serve `gate` on the first GPU and, if wanted, `gate1` on the next."""
    entries = []
    for device in range(gpus):
        path = models.write(folder, models.pick(), f"gate{device or ''}.onnx")
        entries.append(
            ModelSettings(
                path=path,
                engine="tensorrt",
                devices=(device,),
                max_batch_size=8,
                plan_cache=str(folder / "plans"),
                **settings,
            )
        )
    with serve(fast, tuple(entries)) as running:
        yield running


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "asgi"])
@pytest.mark.parametrize("mode", ["lazy", "threaded"])
def test_callers_get_their_own_rows(
    cuda: FakeCuda, tmp_path: Path, fast: bool, mode: str, graphs: bool
) -> None:
    cuda.mode(mode)
    with served(tmp_path, fast=fast, cuda_graphs=graphs) as running, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(24)]
        for turn in range(5):
            for number, client in enumerate(clients):
                client.send(gate(*[(number + turn + row) % 3 for row in range(number % 3 + 1)]))
            for number, client in enumerate(clients):
                expected = [10 * ((number + turn + row) % 3 + 1) for row in range(number % 3 + 1)]
                assert data_of(client.answer()) == expected
        metadata = running.ask(get("/v2/models/gate")).json
        assert metadata["platform"] == "tensorrt_plan"
    cuda.mode("lazy")


def test_a_second_start_uses_the_cached_plan(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path) as running:
        assert data_of(running.ask(gate(0))) == [10]
    build = importlib.import_module("cobatch.engines.tensorrt.plans.build")
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("built again"))
    with served(tmp_path) as running:
        assert data_of(running.ask(gate(2))) == [30]


def test_a_sticky_error_is_503_and_the_model_is_opened_again_once(
    cuda: FakeCuda, tmp_path: Path, graphs: bool
) -> None:
    with served(tmp_path, cuda_graphs=graphs) as running:
        answer = running.ask(gate(DEADLY))
        assert (answer.status, answer.slug) == (503, "engine-dead")
        opened_again(running)
        assert live(running).status == 200
        assert [data_of(running.ask(gate(row))) for row in range(3)] == [[10], [20], [30]]
        assert running.ask(gate(DEADLY)).slug == "engine-dead"
        assert live(running).status == 503


def test_a_fault_does_not_affect_other_gpus(cuda: FakeCuda, tmp_path: Path) -> None:
    with served(tmp_path, gpus=2) as running:
        cuda.inject("exec:kernel", ILLEGAL_ADDRESS)
        assert running.ask(gate(1)).slug == "engine-dead"
        opened_again(running)
        assert running.ask(gate(DEADLY)).slug == "engine-dead"
        assert running.ask(gate(1)).slug == "engine-dead"
        other = gate(1, 2).replace(b"/gate/", b"/gate1/")
        assert data_of(running.ask(other)) == [20, 30]
        assert running.ask(get("/v2/models/gate1/ready")).status == 200


def test_one_model_on_two_gpus(cuda: FakeCuda, tmp_path: Path) -> None:
    """If one GPU fails the other one serves; the failed one gets a new engine once."""
    path = models.write(tmp_path, models.pick(), "gate.onnx")
    model = ModelSettings(
        path=path, engine="tensorrt", devices=(0, 1), max_batch_size=8, plan_cache=str(tmp_path / "plans")
    )
    with serve(True, (model,)) as running:
        batcher = running.batcher()
        assert len(batcher.lanes) == 2
        for lanes in (2, 2, 1):  # the first engine dies, the second, and the first again
            assert running.ask(gate(DEADLY)).slug == "engine-dead"
            assert data_of(running.ask(gate(1))) == [20]
            assert running.ask(get("/v2/models/gate/ready")).status == 200
            opened_again(running)
            assert len(batcher.lanes) == lanes
            assert live(running).status == 200
        assert running.ask(gate(DEADLY)).slug == "engine-dead"
        assert running.ask(gate(2)).slug == "engine-dead"
        assert live(running).status == 503


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "asgi"])
def test_rows_that_the_plan_refuses_are_a_client_error(cuda: FakeCuda, tmp_path: Path, fast: bool) -> None:
    plan = tmp_path / "gate.plan"
    plan.write_bytes(plan_of(models.negate(width="width"), "x:1x2/4x16/8x32"))
    with serve(fast, (ModelSettings(path=str(plan), max_batch_size=8),)) as running:
        for width, status in ((1, 422), (2, 200), (32, 200), (33, 422)):
            tensor = {"name": "x", "shape": [1, width], "datatype": "FP32", "data": [1.0] * width}
            answer = running.ask(post("/v2/models/gate/infer", {"inputs": [tensor]}))
            assert answer.status == status
            if status == 422:
                assert answer.slug == "wrong-shape"
                assert "the engine takes rows of [2] to [32]" in answer.json["detail"]
        headers = {"Content-Type": "application/json"}
        native = running.ask(post("/v1/models/gate/predictions", {"inputs": {"x": [[1.0]]}}, headers))
        assert (native.status, native.slug) == (422, "wrong-shape")


def test_callers_in_flight_when_the_gpu_faults_are_all_answered(cuda: FakeCuda, tmp_path: Path) -> None:
    with served(tmp_path) as running, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(30)]
        for number, client in enumerate(clients):
            client.send(gate(DEADLY if number == 10 else number % 3))
        answers = [client.answer() for client in clients]
        assert {answer.status for answer in answers} <= {200, 503}
        assert answers[10].slug == "engine-dead"
        for number, answer in enumerate(answers):
            if answer.status == 200:
                assert data_of(answer) == [10 * (number % 3 + 1)]
        opened_again(running)
        assert data_of(running.ask(gate(0))) == [10]


async def test_a_model_that_does_not_fit_is_a_clear_error(cuda: FakeCuda, tmp_path: Path) -> None:
    path = models.write(tmp_path, models.negate(width=1000), "wide.onnx")
    model = Model(
        ModelSettings(path=path, engine="tensorrt", max_batch_size=64, plan_cache=str(tmp_path / "plans"))
    )
    cuda.memory(400_000)
    with pytest.raises(EngineLoadError, match=r"GPU 0 is out of memory.*max_batch_size = \d+ would fit"):
        await model.load()
    assert model.unavailable().kind.slug == "load-failed"
    await model.stop(1)


def live(running: Served) -> Answer:
    return running.ask(get("/v2/health/live"))
