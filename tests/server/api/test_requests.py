"""GET /v1/requests/ID, and `cobatch explain`: timings and batches of recent requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cobatch.batcher.scheduling import policy
from cobatch.batcher.scheduling.policy import REASONS
from cobatch.engines.errors import EngineRunError
from cobatch.server.cli import app
from cobatch.server.http.request_id import place_of
from cobatch.server.observability import history
from tests.support.auth import protected as guarded
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import GATE, Answer, Client, GatedEngine, Served, gate, gated, get, post

ALL = pytest.mark.parametrize("path", WAYS)
STAGES = ("queue", "pack", "wait_for_engine", "compute", "answer")


def id_of(answer: Answer) -> str:
    return answer.headers["x-request-id"]


def explained(served: Served, request_id: str) -> Any:
    answer = served.ask(get(f"/v1/requests/{request_id}"))
    assert answer.status == 200, answer
    assert answer.headers["cache-control"] == "no-store"
    return answer.json


def held_then_together(served: Served, engine: GatedEngine, *requests: bytes) -> list[Answer]:
    """Hold the engine with the first request, and send the others, which then share a batch."""
    counters = served.batcher().counters
    engine.hold()
    clients: list[Client] = []
    for request in requests:
        before = counters.accepted
        clients.append(served.connect())
        clients[-1].send(request)
        served.until(lambda before=before: counters.accepted > before)  # type: ignore[misc]
        if len(clients) == 1:
            engine.began.get(timeout=60)
    engine.release()
    answers = [client.answer() for client in clients]
    for client in clients:
        client.close()
    return answers


@ALL
def test_explanation_has_batch_and_earlier_runs(path: str) -> None:
    with gated(**way(path)) as (served, engine):
        answers = held_then_together(served, engine, gate(7), gate(1), gate(2, 3))
        first, second, third = (explained(served, id_of(answer)) for answer in answers)
    assert [one["rows"] for one in (first, second, third)] == [1, 1, 2]
    (alone,), (shared,) = first["batches"], second["batches"]
    assert (alone["rows"], alone["requests"], alone["reason"]) == (1, 1, "idle")
    assert (shared["rows"], shared["requests"]) == (3, 2)
    assert third["batches"] == second["batches"]
    assert shared["why"] == REASONS[shared["reason"]]
    assert first["waited_for"] == []
    for one in (second, third):
        (wait,) = one["waited_for"]
        assert (wait["batch"], wait["rows"]) == (alone["number"], 1)
        assert 0 < wait["us"] <= one["times_us"]["queue"]
    for one in (first, second, third):
        times = one["times_us"]
        assert abs(sum(times[stage] for stage in STAGES) - times["total"]) <= len(STAGES)
    assert f"It ran in batch {shared['number']} with 3 rows of 2 requests" in " ".join(second["in_words"])
    assert f"for the run of batch {alone['number']} (1 row)" in " ".join(second["in_words"])


@ALL
def test_by_the_clients_own_id(path: str) -> None:
    with gated(**way(path)) as (served, _):
        served.ask(gate(1, headers={"X-Request-Id": "mine"}))
        served.ask(gate(1, 2, headers={"X-Request-Id": "mine"}))
        result = explained(served, "mine")
    # The newest request with this id.
    assert (result["id"], result["status"], result["rows"], result["model"]) == ("mine", 200, 2, "gate")
    assert result["batches"][0]["rows"] == 2


@ALL
def test_a_request_in_several_batches(path: str) -> None:
    with gated(**way(path)) as (served, _):
        result = explained(served, id_of(served.ask(gate(*range(6)))))
    assert [one["rows"] for one in result["batches"]] == [4, 2]
    assert result["rows"] == 6
    assert set(result["times_us"]) == {*STAGES, "total"}


@ALL
def test_refused_and_failed_requests(path: str) -> None:
    with gated(**way(path)) as (served, engine):
        refused = explained(served, id_of(served.ask(post(GATE, b"{"))))
        engine.fails = lambda x: EngineRunError("no")
        failed = explained(served, id_of(served.ask(gate(1))))
    assert (refused["status"], refused["problem"]) == (400, "not-json")
    assert "batches" not in refused
    assert "It ran in no batch; it was answered with 400" in refused["in_words"][0]
    assert (failed["status"], failed["problem"], failed["rows"]) == (500, "run-failed", 1)


@ALL
def test_predictions_are_explained(path: str) -> None:
    with gated(**way(path)) as (served, _):
        headers = {"Content-Type": "application/json"}
        answer = served.ask(post("/v1/models/gate/predictions", {"inputs": {"x": [[1], [2]]}}, headers))
        result = explained(served, id_of(answer))
    assert (result["model"], result["rows"], result["batches"][0]["rows"]) == ("gate", 2, 2)


@ALL
def test_a_retried_part_of_a_batch_has_its_reason(path: str) -> None:
    with gated(**way(path)) as (served, engine):
        engine.fails = lambda x: EngineRunError("no") if 13 in x[:, 0] else None
        answers = held_then_together(served, engine, gate(7), gate(1), gate(13))
        result = explained(served, id_of(answers[1]))
    assert [answer.status for answer in answers] == [200, 200, 422]
    assert result["batches"][0]["reason"] == policy.RETRY
    assert result["batches"][0]["requests"] == 1


@ALL
def test_explanation_has_tenants_and_needs_admin(path: str, tmp_path: Path) -> None:
    with guarded.protected(path, tmp_path) as p:
        answer = p.infer(guarded.token("alice"), 1, 2)
        target = f"/v1/requests/{id_of(answer)}"
        assert p.ask(guarded.get_as(guarded.token("alice"), target)).status == 403
        result = p.ask(guarded.get_as(guarded.token("root", scope="admin"), target)).json
        assert p.ask(get(target)).status == 401
    assert result["tenant"] == "alice"
    assert result["batches"][0]["tenants"] == {"alice": 2}


@ALL
def test_unknown_ids(path: str) -> None:
    with gated(**way(path)) as (served, _):
        given = id_of(served.ask(gate(1, 2)))
        start, row = given.split(".")
        assert place_of(given) is not None
        for unknown in ("none", f"{start}.1", f"{start}0.{row}", f"00000000-1.{row}", "%20", "a%2Fb"):
            answer = served.ask(get(f"/v1/requests/{unknown}"))
            assert answer.status == 404, unknown
        assert served.ask(get("/v1/requests/none")).slug == "unknown-request"


@ALL
def test_old_batches_and_records_are_dropped(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_RECORDS", 2)
    monkeypatch.setattr(history, "_BATCHES", 2)
    with gated(**way(path)) as (served, _):
        ids = [id_of(served.ask(gate(1))) for _ in range(3)]
        refused = [id_of(served.ask(post(GATE, b"{"))) for _ in range(3)]
        statuses = [served.ask(get(f"/v1/requests/{one}")).status for one in ids]
        assert statuses == [404, 200, 200]
        # The requests above are records too, and displaced this one.
        assert served.ask(get(f"/v1/requests/{refused[0]}")).status == 404


@ALL
def test_a_client_cannot_reuse_an_id_of_the_server(path: str) -> None:
    with gated(**way(path)) as (served, _):
        for request in (gate(1), get("/none")):
            first = id_of(served.ask(request))
            before = explained(served, first)
            again = id_of(served.ask(post(GATE, b"{", {"X-Request-Id": first})))
            assert again != first
            after = explained(served, first)
            assert (after["status"], after["time"]) == (before["status"], before["time"])


@ALL
def test_long_headers_and_paths_are_cut(path: str) -> None:
    with gated(**way(path)) as (served, _):
        long = {"traceparent": "0" * 9000, "tracestate": "a=b," * 4000}
        given = id_of(served.ask(get("/none/" + "x" * 20_000).replace(b"\r\n\r\n", lines(long))))
        result = explained(served, given)
        kept = [
            sink.__self__.record(given)  # type: ignore[attr-defined]  # a bound method
            for sink in served.inference.observer._requests
        ]
    assert result["path"] == "/none/" + "x" * 494
    for record in kept:
        assert len(record.path) + len(record.traceparent) + len(record.tracestate) < 1000


def lines(headers: dict[str, str]) -> bytes:
    """Return further header lines and the end of the headers."""
    return "".join(f"\r\n{name}: {value}" for name, value in headers.items()).encode() + b"\r\n\r\n"


def test_every_reason_is_explained() -> None:
    reasons = {value for name, value in vars(policy).items() if name.isupper() and isinstance(value, str)}
    assert set(REASONS) == reasons


# The command


def command(served: Served, *words: str, **variables: str) -> Any:
    url = f"http://127.0.0.1:{served.server.port}"
    return CliRunner().invoke(app, [*words, "--url", url], env=variables)


@ALL
def test_command_prints_sentences_or_json(path: str) -> None:
    with gated(**way(path)) as (served, _):
        given = id_of(served.ask(gate(1)))
        result = command(served, "explain", given)
        as_json = command(served, "explain", given, "--json")
        unknown = command(served, "explain", "none")
    assert result.exit_code == 0
    assert result.stdout.startswith("It took ")
    assert "(idle)" in result.stdout
    assert json.loads(as_json.stdout)["id"] == given
    assert unknown.exit_code == 1
    assert "answered 404: request 'none' is unknown" in unknown.stderr


@ALL
def test_command_with_credentials(path: str, tmp_path: Path) -> None:
    with guarded.protected(path, tmp_path, keys={"ops": ("admin",)}) as p:
        given = id_of(p.infer(guarded.token(), 1))
        file = tmp_path / "token"
        file.write_text(guarded.token("root", scope="admin") + "\n")
        assert command(p.served, "explain", given).exit_code == 1
        assert command(p.served, "explain", given, "--token-file", str(file)).exit_code == 0
        assert command(p.served, "explain", given, COBATCH_TOKEN=p.keys["ops"]).exit_code == 0
        missing = command(p.served, "explain", given, "--token-file", str(tmp_path / "none"))
    assert missing.exit_code == 1
    assert "--token-file: cannot read" in missing.stderr


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://here", "expected an address with http:// or https://"),
        ("http://127.0.0.1:1", "cannot reach"),
    ],
)
def test_command_with_unreachable_server(url: str, why: str) -> None:
    result = CliRunner().invoke(app, ["explain", "x", "--url", url])
    assert result.exit_code == 1
    assert why in result.stderr
