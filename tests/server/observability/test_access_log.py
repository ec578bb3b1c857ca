"""The access log: a line for each request on both edges, its fields, and text that must not be in it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cobatch.engines.errors import EngineRunError
from cobatch.server.observability import output
from cobatch.server.observability.access_log import (
    AccessLog,
    as_json,
    as_text,
    level_of,
    line_of,
)
from cobatch.server.observability.output import LogStream
from cobatch.server.observability.record import RequestRecord
from tests.support.auth import protected as guarded
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import GATE, Client, Served, gate, gated, get, post, rows_of

ALL = pytest.mark.parametrize("path", WAYS)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def asked(path: str, *requests: bytes, **settings: Any) -> list[dict[str, Any]]:
    """Return the lines of these requests, sent in turn on one connection."""
    settings = {"access_log": "json", **settings}
    with (
        mock.patch("sys.stderr", io.StringIO()) as stream,
        gated(**way(path), **settings) as (served, _),
        served.connect() as client,
    ):
        for request in requests:
            client.ask(request)
    return lines_of(stream.getvalue())


# Fields


@ALL
def test_a_good_request(path: str) -> None:
    (line,) = asked(path, gate(1, 2, headers={"X-Request-Id": "abc-1"}))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    times = {name: line.pop(name) for name in ("queue_us", "compute_us", "total_us")}
    assert times["total_us"] >= times["queue_us"] > 0
    assert line.pop("batch") > 0
    assert line == {
        "level": "info",
        "request_id": "abc-1",
        "method": "POST",
        "path": GATE,
        "status": 200,
        "model": "gate",
        "rows": 2,
        "batch_rows": 2,
        "reason": "idle",
    }


@ALL
def test_refused_and_failed_ones(path: str) -> None:
    odd = rows_of(1) | {"inputs": []}
    lines = asked(path, post(GATE, b"{"), post(GATE, odd), get("/v2/models/none"), get("/v2/health/live"))
    said = [(line["level"], line["status"], line.get("problem"), line["path"]) for line in lines]
    # Each process writes lines of its own.
    assert sorted(said, key=str) == [
        ("info", 200, None, "/v2/health/live"),
        ("warning", 400, "missing-tensor", GATE),
        ("warning", 400, "not-json", GATE),
        ("warning", 404, "unknown-model", "/v2/models/none"),
    ]
    assert all(line["request_id"] for line in lines)
    assert len({line["request_id"] for line in lines}) == 4


@ALL
def test_the_engines_failure_is_an_error_and_says_in_which_batch(path: str) -> None:
    with (
        mock.patch("sys.stderr", io.StringIO()) as stream,
        gated(**way(path), access_log="json") as (served, engine),
    ):
        engine.fails = lambda x: EngineRunError("no")
        assert served.ask(gate(1)).status == 500
    (line,) = lines_of(stream.getvalue())
    assert (line["level"], line["status"], line["problem"], line["rows"]) == ("error", 500, "run-failed", 1)


@ALL
@pytest.mark.parametrize(("level", "statuses"), [("info", [200, 400]), ("warning", [400]), ("error", [])])
def test_which_lines_there_are(path: str, level: str, statuses: list[int]) -> None:
    lines = asked(path, gate(1), post(GATE, b"{"), access_log_level=level)
    assert [line["status"] for line in lines] == statuses


@ALL
def test_a_client_that_left(path: str) -> None:
    with (
        mock.patch("sys.stderr", io.StringIO()) as stream,
        gated(**way(path), access_log="json") as (served, engine),
    ):
        counters = served.batcher().counters
        engine.hold()
        client = served.connect()
        client.send(gate(1))
        served.until(lambda: counters.accepted > 0)
        client.close()
        served.until(lambda: counters.cancelled > 0)
        engine.release()
    (line,) = lines_of(stream.getvalue())
    assert (line["status"], line["problem"]) == (499, "client-left")


@ALL
def test_predictions_have_their_batch_and_their_ids_are_hidden(path: str) -> None:
    body = {"inputs": {"x": [[1], [2]]}}
    headers = {"Content-Type": "application/json"}
    lines = asked(path, post("/v1/models/gate/predictions", body, headers), get("/v1/predictions/secret"))
    assert (lines[0]["model"], lines[0]["rows"], lines[0]["batch_rows"]) == ("gate", 2, 2)
    assert lines[1]["path"] == "/v1/predictions/{id}"


@ALL
def test_off_says_nothing(path: str) -> None:
    assert asked(path, gate(1), post(GATE, b"{"), access_log="off") == []


# Secrets and forged lines


@ALL
def test_credentials_and_data_never(path: str, tmp_path: Path) -> None:
    token, forged = guarded.token(), guarded.token() + "x"
    settings = {"access_log": "json"}
    with (
        mock.patch("sys.stderr", io.StringIO()) as stream,
        guarded.protected(path, tmp_path, keys={"team": ("infer",)}, server=settings) as p,
    ):
        for credential in (token, token, forged):
            p.ask(post(f"{GATE}?secret=4711_4711", rows_of(815_815_815_815), guarded.bearer(credential)))
        key = p.keys["team"]
        p.ask(post(GATE, rows_of(815_815_815_815), {"X-API-Key": key}))
        p.ask(get(f"/v2?access_token={token}"))
    text = stream.getvalue()
    lines = lines_of(text)
    said = [(line["status"], line.get("tenant", "")) for line in lines]
    assert sorted(said) == [(200, "alice"), (200, "alice"), (200, "team"), (400, ""), (401, "")]
    for secret in (token, forged, key, "4711_4711", "815815815815", "1631631631630", token.split(".")[2]):
        assert secret not in text


def test_a_client_cannot_forge_lines() -> None:
    record = RequestRecord("id", "GET", '/a\n{"status": 200}\r "\x1b[2J', 0.0)
    record.status = 404
    for form in (as_json, as_text):
        line = form(line_of(record, "now"))
        assert line.count("\n") == 1
        assert line.endswith("\n")
        assert "\x1b" not in line
        assert "\r" not in line
    assert json.loads(as_json(line_of(record, "now")))["path"] == record.path


def test_a_long_path_is_cut() -> None:
    record = RequestRecord("id", "GET", "/" + "x" * 10_000, 0.0)
    assert len(line_of(record, "now").path) < 600


# Text lines


def test_lines_for_people() -> None:
    record = RequestRecord("id-1", "POST", GATE, 1.0)
    record.status, record.slug, record.model, record.answered_s = 429, "queue-full", "gate", 1.0005
    assert as_text(line_of(record, "now")) == (
        "now WARNING 429 POST /v2/models/gate/infer "
        "request_id=id-1 problem=queue-full model=gate total_us=500\n"
    )


@pytest.mark.parametrize(
    ("status", "level"),
    [(200, logging.INFO), (399, logging.INFO), (400, logging.WARNING), (499, logging.WARNING),
     (500, logging.ERROR)],
)  # fmt: skip
def test_levels(status: int, level: int) -> None:
    assert level_of(status) == level


@ALL
def test_the_client_s_trace(path: str) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = [{"traceparent": value} for value in (f"00-{trace}-b7ad6b7169203331-01", "x\ty", trace)]
    lines = asked(path, *[gate(1, headers=each) for each in headers])
    assert [line.get("trace_id") for line in lines] == [trace, None, None]


# Writing


def _done(status: int = 200) -> RequestRecord:
    record = RequestRecord("id", "GET", "/v2", 0.0)
    record.status = status
    return record


async def test_lines_are_written_without_being_asked_for() -> None:
    written = asyncio.Event()
    loop = asyncio.get_running_loop()
    text: list[str] = []

    def write(line: str) -> None:
        text.append(line)
        loop.call_soon_threadsafe(written.set)

    stream = LogStream(write)
    stream.start()
    log = AccessLog(logging.INFO, stream)
    log.start(loop)
    log.request_done(_done())
    await asyncio.wait_for(written.wait(), 60)
    await asyncio.to_thread(stream.stop)
    assert "".join(text).count("\n") == 1


def test_the_lines_of_a_while_are_dropped_and_counted_one_by_one() -> None:
    stream = LogStream(as_json=True)
    log = AccessLog(logging.INFO, stream)
    stream.put("x" * output._QUEUE_CHARACTERS)
    for _ in range(3):
        log.request_done(_done())
    log.stop()
    assert stream.dropped == 3


# The id


@ALL
def test_a_sane_id_is_taken_and_returned(path: str) -> None:
    with gated(**way(path)) as (served, _):
        for given in ("a", "0b5c9e0e-7b1c-4a7e", "Root=1-67a:b@c.d_e+f", "x" * 128):
            assert served.ask(gate(1, headers={"x-request-id": given})).headers["x-request-id"] == given
            assert served.ask(post(GATE, b"{", {"X-Request-ID": given})).headers["x-request-id"] == given


@ALL
def test_any_other_is_passed_over(path: str) -> None:
    with gated(**way(path)) as (served, _):
        for given in ("", " ", "a b", "x" * 129, "../x", "é", "<b>", '"', "a/b", "a\tb", "-a"):
            answer = served.ask(gate(1, headers={"X-Request-Id": given}))
            assert answer.status == 200
            assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]+\.0", answer.headers["x-request-id"]), given


@ALL
def test_each_answer_has_an_id_of_its_own(path: str) -> None:
    requests = [
        gate(1),
        gate(1),
        gate(2, 3),
        gate(1, 2, 3, 4, 5, 6),
        post(GATE, b"{"),
        get("/v2"),
        get("/none"),
    ]
    with gated(**way(path)) as (served, _), served.connect() as client:
        found = [_id(client, request) for request in requests]
        assert len(set(found)) == len(found)


def _id(client: Client, request: bytes) -> str:
    return client.ask(request).headers["x-request-id"]


def test_ids_on_a_known_header_block_are_each_requests_own() -> None:
    """The fast path caches header blocks, but none that identifies its request."""
    with gated(True) as (served, _), served.connect() as client:
        same = gate(1, headers={"X-Request-Id": "mine"})
        assert [_id(client, same) for _ in range(3)] == ["mine"] * 3
        assert _blocks(served) == 0
        plain = gate(1)
        found = [_id(client, plain) for _ in range(3)]
        assert len(set(found)) == 3
        assert _blocks(served) == 1


def _blocks(served: Served) -> int:
    (connection,) = served.call(served.connections)
    return len(connection.cache)
