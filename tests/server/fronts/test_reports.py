"""Figures, explanations and the live page's data of a server with fronts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cobatch import __version__
from cobatch.server.fronts.front import Uplinks
from cobatch.server.http import request_id
from cobatch.server.loadtest.messages import Address
from cobatch.server.loadtest.target import describe
from cobatch.server.observability.observer import FrontCounts
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import LinkedServer, linked
from tests.support.http.serving import GATE, GatedEngine, Served, data_of, gate, get, post

MODEL = ModelSettings(path="gate", max_batch_size=4, max_queue_rows=1000)


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "asgi"])
def module_served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with linked(request.param, (MODEL,), engines={"gate": GatedEngine()}, processes=3) as served:
        yield served


@pytest.fixture
def served(module_served: Served) -> Served:
    return module_served


@pytest.fixture
def server(served: Served) -> LinkedServer:
    assert isinstance(served.server, LinkedServer)
    return served.server


Samples = dict[tuple[str, tuple[str, ...]], float]


def metrics(served: Served) -> Samples:
    """Return the samples of /metrics by name and values of the labels, by label."""
    text = served.ask(get("/metrics")).body.decode()
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_have_the_requests_of_fronts(served: Served) -> None:
    before = metrics(served)
    for n in range(6):
        assert data_of(served.ask(gate(n))) == [2 * n]
        assert served.ask(post(GATE, {})).status == 400
    after = metrics(served)

    def more(name: str, *labels: str) -> float:
        return after[name, labels] - before.get((name, labels), 0)

    assert more("cobatch_requests_total", "200", "gate", "") == 6
    assert more("cobatch_requests_total", "400", "gate", "bad-request") == 6
    assert more("cobatch_request_duration_seconds_count", "gate") == 6
    assert more("cobatch_request_duration_seconds_sum", "gate") > 0
    route = "/v2/models/{name}/infer"
    assert more("cobatch_http_requests_total", "200", "POST", "", route) == 6
    assert more("cobatch_front_requests_total", "0") + more("cobatch_front_requests_total", "1") == 12
    assert more("cobatch_front_event_loop_cpu_seconds_total", "0") >= 0
    assert after["cobatch_front_connections", ("1",)] == 0


def test_no_count_falls_when_a_front_is_replaced(served: Served, server: LinkedServer) -> None:
    assert served.ask(gate(7)).status == served.ask(gate(7)).status == 200
    before = metrics(served)
    served.call(server.link_all)
    after = metrics(served)
    falling = {
        name: (value, after.get(name))
        for name, value in before.items()
        if name[0].endswith(("_total", "_count", "_bucket")) and after.get(name, -1) < value
    }
    assert not falling
    assert served.ask(gate(7)).status == 200
    assert (
        metrics(served)["cobatch_requests_total", ("200", "gate", "")]
        == before["cobatch_requests_total", ("200", "gate", "")] + 1
    )


def test_a_killed_front_takes_no_count_along_that_came_before_its_last_heartbeat(
    served: Served, server: LinkedServer
) -> None:
    """It reports what is new without being asked, and says nothing if nothing is."""
    before = metrics(served)
    assert all(served.ask(gate(n)).status == 200 for n in range(4))
    assert served.ask(post(GATE, {})).status == 400

    def heartbeat() -> list[bool]:
        for front in server.fronts:
            front.report_news()
        return [front._reporter.has_news() for front in server.fronts]

    def answer_questions(answer: Callable[[Uplinks, int], None]) -> None:
        for front in server.fronts:
            assert front.current is not None
            front.current.on_collect = partial(answer, front)

    assert served.call(heartbeat) == [False, False]
    served.call(lambda: answer_questions(lambda front, asked: None))  # as if it were killed
    after = metrics(served)
    served.call(lambda: answer_questions(Uplinks.report))
    counted = {key: after[key] - before.get(key, 0) for key in after if key[0] == "cobatch_requests_total"}
    assert counted == {
        ("cobatch_requests_total", ("200", "gate", "")): 4,
        ("cobatch_requests_total", ("400", "gate", "bad-request")): 1,
    }


@pytest.mark.parametrize("number", range(2))
def test_each_request_is_explained(served: Served, number: int) -> None:
    """By its place in a batch, by the client's own id, and one that was refused."""
    answer = served.ask(gate(7))
    explained = explain(served, answer.headers["x-request-id"])
    assert (explained["model"], explained["rows"], explained["status"]) == ("gate", 1, 200)
    assert explained["batches"][0]["rows"] == 1
    own = f"mine-{served.fast}-{number}"
    assert served.ask(gate(7, 8, headers={"X-Request-Id": own})).headers["x-request-id"] == own
    explained = explain(served, own)
    assert (explained["rows"], explained["path"], explained["batches"][0]["requests"]) == (2, GATE, 1)
    assert explained["times_us"]["total"] > 0
    refused = served.ask(post(GATE, {}))
    explained = explain(served, refused.headers["x-request-id"])
    assert (explained["status"], explained["problem"]) == (400, "bad-request")


def explain(served: Served, id_: str) -> dict[str, Any]:
    answer = served.ask(get(f"/v1/requests/{id_}"))
    assert answer.status == 200, answer
    result: dict[str, Any] = answer.json
    assert result["id"] == id_
    return result


def test_a_client_cannot_take_an_id_of_home_or_of_a_front(served: Served) -> None:
    ours = [served.ask(request).headers["x-request-id"] for request in (gate(7), post(GATE, {}), get("/v2"))]
    for one in ours:
        for request in (
            gate(7, headers={"X-Request-Id": one}),
            post(GATE, {}, {"X-Request-Id": one}),
        ):
            assert served.ask(request).headers["x-request-id"] != one


def test_the_live_page_has_a_row_for_each_front(served: Served) -> None:
    for n in range(4):
        assert served.ask(gate(n)).status == 200
    with served.connect() as client:
        client.send(get("/dashboard/events"))
        data = b""
        while data.count(b"event: ") < 3:
            data += client.socket.recv(1 << 20)
    ticks = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: ")]
    fronts = ticks[-1]["fronts"]
    assert set(fronts) == {"0", "1"}


def test_a_report_counts_many_answers_at_once(served: Served, server: LinkedServer) -> None:
    """More than are kept uncounted."""
    before = metrics(served)["cobatch_requests_total", ("200", "gate", "")]

    def add() -> None:
        for front in server.fronts:
            front.models[0].infer_traffic.count_alike(3000, 0.01)

    served.call(add)
    assert metrics(served)["cobatch_requests_total", ("200", "gate", "")] == before + 6000
    counts = served.inference.observer.fronts
    assert all(isinstance(one, FrontCounts) for one in counts.values())


def test_ids_of_a_front_belong_to_the_engines_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_ours", "_new_lead"):
        monkeypatch.setattr(request_id, name, getattr(request_id, name))
    before = request_id.new_id()
    request_id.join("0badc0de")
    after = request_id.new_id()
    assert after.startswith(f"0badc0de-{request_id.PROCESS}r")
    assert request_id.place_of(after) is None
    assert not any(request_id.sane(one.encode()) for one in (before, after, "0badc0de-1.0"))
    assert request_id.sane(b"mine") == "mine"


def test_the_server_names_its_processes(served: Served) -> None:
    """In its metadata, and so in reports of `cobatch bench`."""
    assert served.ask(get("/v2")).json["processes"] == 3
    model = describe(Address("127.0.0.1", served.server.port), None, None, {})
    assert model.server == f"cobatch {__version__}, 3 processes"
