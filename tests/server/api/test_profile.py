"""POST /v1/profile: the recorded file as trace viewers read it, limits and permissions; `cobatch trace`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cobatch.batcher.request import Batch
from cobatch.engines.errors import EngineRunError
from cobatch.server.api import profile as profiling
from cobatch.server.api.profile import RecordedBatch, Sample, trace_text
from cobatch.server.cli import app
from tests.support.auth import protected as guarded
from tests.support.fronts.linked import WAYS, way
from tests.support.http import in_process
from tests.support.http.serving import Client, Served, gate, gated, get, post

ALL = pytest.mark.parametrize("path", WAYS)
Event = dict[str, Any]


def trace(*batches: RecordedBatch, samples: list[Sample] | None = None, begin_s: float = 0.0) -> Any:
    return json.loads(b"".join(trace_text(batches, samples or [], begin_s, {"server": "x"})))


def batch(number: int, at_s: float = 0.0, **changed: Any) -> RecordedBatch:
    """Return a batch with stages of one millisecond."""
    stages = ("gathered_s", "dispatched_s", "started_s", "finished_s", "answering_s", "answered_s")
    model = changed.pop("model", "m")
    requests = changed.pop("requests", [(at_s, 1), (at_s + 0.0005, 2)])
    result = Batch([], 3, (), "idle", number=number, slot=number % 2)
    for name, value in ({name: at_s + n * 0.001 for n, name in enumerate(stages, 1)} | changed).items():
        setattr(result, name, value)
    return RecordedBatch(model, result, requests)


def tracks(document: Any) -> dict[tuple[int, int], str]:
    """Return the names of the tracks, with their groups in front."""
    names = {
        (one["pid"], one["tid"], one["name"]): one["args"]["name"]
        for one in document["traceEvents"]
        if one["ph"] == "M" and one["name"].endswith("_name")
    }
    groups = {pid: name for (pid, _, kind), name in names.items() if kind == "process_name"}
    return {
        (pid, tid): f"{groups[pid]}: {name}"
        for (pid, tid, kind), name in names.items()
        if kind == "thread_name"
    }


def slices(document: Any) -> dict[str, list[Event]]:
    by_track = defaultdict(list)
    named = tracks(document)
    for one in document["traceEvents"]:
        if one["ph"] == "X":
            by_track[named[one["pid"], one["tid"]]].append(one)
    return by_track


# The file


def test_loop_worker_and_slots_are_tracks() -> None:
    by_track = slices(trace(batch(1)))
    times = {
        track: [(one["name"], one["ts"], one["dur"]) for one in events] for track, events in by_track.items()
    }
    assert times == {
        "threads: event loop": [("pack", 1000, 1000), ("answer", 5000, 1000)],
        "threads: worker 0 of m": [("run 3 rows, idle", 3000, 1000)],
        "slots of m: engine 0, slot 1": [
            ("3 rows, idle", 1000, 5000),
            ("fill", 1000, 1000),
            ("wait for the engine", 2000, 1000),
            ("run", 3000, 1000),
            ("wait for the loop", 4000, 1000),
            ("answer", 5000, 1000),
        ],
    }
    args = {"model": "m", "batch": 1, "rows": 3, "requests": 2, "reason": "idle"}
    assert by_track["threads: worker 0 of m"][0]["args"] == args


def test_requests_have_waits_and_batches_have_arrows() -> None:
    events = trace(batch(1), batch(2, 0.01))["traceEvents"]
    waits = [(one["ph"], one["id2"]["local"], one["ts"]) for one in events if one.get("cat") == "request"]
    assert waits == [
        ("b", 1, 0), ("e", 1, 1000), ("b", 2, 500), ("e", 2, 1000),
        ("b", 3, 10_000), ("e", 3, 11_000), ("b", 4, 10_500), ("e", 4, 11_000),
    ]  # fmt: skip
    arrows = [(one["ph"], one["id"], one["ts"]) for one in events if one.get("cat") == "batch"]
    assert arrows == [
        ("s", 1, 1000), ("t", 1, 3000), ("f", 1, 5000), ("s", 2, 11_000), ("t", 2, 13_000), ("f", 2, 15_000),
    ]  # fmt: skip


def test_loop_lag_and_queues_are_curves() -> None:
    samples = [Sample(1.0, 0.0005, {"m": 4, "n": 0}), Sample(1.01, -0.0001, {"m": 5, "n": 1})]
    events = trace(samples=samples, begin_s=1.0)["traceEvents"]
    curves = [(one["name"], one["ts"], one["args"]) for one in events if one["ph"] == "C"]
    assert curves == [
        ("event loop lag", 0, {"ms": 0.5}),
        ("queued", 0, {"rows": 4}),
        ("queued", 0, {"rows": 0}),
        ("event loop lag", 10_000, {"ms": 0}),
        ("queued", 10_000, {"rows": 5}),
        ("queued", 10_000, {"rows": 1}),
    ]


def test_models_and_engines_have_tracks_of_their_own() -> None:
    document = trace(batch(1), batch(2, engine=1), batch(3, model="n"))
    assert sorted(tracks(document).values()) == [
        "slots of m: engine 0, slot 1",
        "slots of m: engine 1, slot 0",
        "slots of n: engine 0, slot 1",
        "threads: event loop",
        "threads: worker 0 of m",
        "threads: worker 0 of n",
        "threads: worker 1 of m",
    ]
    ids = [(one["pid"], one["tid"]) for one in document["traceEvents"] if one["name"] == "thread_name"]
    assert len(set(ids)) == len(ids)


def test_a_batch_that_was_not_packed_has_no_run() -> None:
    by_track = slices(trace(batch(1, dispatched_s=0.0, failed=True)))
    assert "threads: worker 0 of m" not in by_track
    assert by_track["slots of m: engine 0, slot 1"][0]["args"]["failed"] is True
    assert all(one["dur"] >= 0 for events in by_track.values() for one in events)


def test_time_zero_is_the_earliest_event() -> None:
    events = trace(batch(1, 4.5), samples=[Sample(5.0, 0.0, {})], begin_s=5.0)["traceEvents"]
    assert min(one["ts"] for one in events if "ts" in one) == 0
    assert [one["ts"] for one in events if one["ph"] == "C"] == [500_000]


@pytest.mark.parametrize(("count", "requests"), [(0, 0), (1, 2), (499, 2), (500, 2), (1000, 2), (3, 5000)])
def test_the_file_comes_in_small_pieces(count: int, requests: int) -> None:
    """Also for large batches: between two pieces the loop serves requests."""
    batches = [batch(number, requests=[(0.0, 1)] * requests) for number in range(count)]
    pieces = list(trace_text(batches, [Sample(0.0, 0.0, {})] * count, 0.0, {}))
    assert all(piece.count(b'"ph"') <= 500 for piece in pieces)
    document = json.loads(b"".join(pieces))
    assert len([one for one in document["traceEvents"] if one["name"] == "pack"]) == count
    assert len([one for one in document["traceEvents"] if one["ph"] == "b"]) == count * requests


# Recording


@contextlib.contextmanager
def recording(served: Served, seconds: float = 60.0) -> Iterator[Client]:
    """Yield a client whose profile is being recorded."""
    with served.connect() as client:
        client.send(post(f"/v1/profile?seconds={seconds}", b""))
        head = client._until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"content-disposition: attachment" in head
        yield client


def document_of(client: Client) -> Any:
    """Read the rest of the chunked body."""
    body = b""
    while size := int(client._until(b"\r\n")[:-2], 16):
        body += client._exactly(size)
        client._exactly(2)
    return json.loads(body)


@ALL
def test_a_recording_has_batches_and_failures(path: str) -> None:
    with gated(**way(path)) as (served, engine), recording(served) as client:
        assert served.ask(gate(1, 2)).status == 200
        engine.fails = lambda x: EngineRunError("no")
        assert served.ask(gate(3)).status == 500
        # A stopping server ends the recording and sends it.
        served.stop()
        document = document_of(client)
    by_track = slices(document)
    runs = by_track["threads: worker 0 of gate"]
    assert [(one["args"]["rows"], one["args"].get("failed")) for one in runs] == [(2, None), (1, True)]
    loop = sorted(by_track["threads: event loop"], key=lambda one: one["ts"])
    assert [one["name"] for one in loop] == ["pack", "answer", "pack", "answer"]
    for before, after in pairwise(loop):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.01
    assert document["otherData"]["batches"] == 2
    assert document["otherData"]["batches_left_out"] == 0
    curves = {one["name"] for one in document["traceEvents"] if one["ph"] == "C"}
    assert curves == {"event loop lag", "queued"}


def is_idle(served: Served) -> bool:
    return not served.call(
        lambda: [sink for sink in served.inference.observer._batches if "Recorder" in repr(sink)]
    )


@ALL
def test_a_second_recording_is_refused_and_a_disconnect_ends_the_first(path: str) -> None:
    with gated(**way(path)) as (served, _):
        assert is_idle(served)
        with recording(served):
            refused = served.ask(post("/v1/profile", b""))
            assert (refused.status, refused.slug) == (409, "profile-running")
            assert refused.headers["retry-after"] == "60"
            assert not is_idle(served)
        while not is_idle(served):
            pass
        with recording(served, 0.01) as client:
            assert document_of(client)["otherData"]["seconds"] == 0.01
        while not is_idle(served):
            pass


async def test_of_concurrent_requests_one_records() -> None:
    async with in_process.gated() as (running, _):
        first, *others = [
            asyncio.ensure_future(running.http.post("/v1/profile?seconds=60")) for _ in range(3)
        ]
        answers = await asyncio.gather(*others)
        assert [answer.status_code for answer in answers] == [409, 409]
        running.inference.draining = True  # ends the recording
        assert (await first).status_code == 200
        running.inference.draining = False
        assert (await running.http.post("/v1/profile?seconds=0.01")).status_code == 200


@ALL
def test_batches_beyond_the_limit_are_left_out_and_counted(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "_REQUEST_LIMIT", 2)
    with gated(**way(path)) as (served, _), recording(served) as client:
        for number in range(5):
            served.ask(gate(number))
        served.stop()
        about = document_of(client)["otherData"]
    assert (about["batches"], about["batches_left_out"]) == (2, 3)


@ALL
def test_seconds_outside_the_range_are_refused(path: str) -> None:
    with gated(**way(path)) as (served, _):
        for seconds in ("0", "-1", "60.1", "nan", "inf", "x", ""):
            answer = served.ask(post(f"/v1/profile?seconds={seconds}", b""))
            assert (answer.status, answer.slug) == (400, "bad-parameter"), seconds
        assert served.ask(get("/v1/profile")).status == 405


@ALL
def test_recording_needs_admin(path: str, tmp_path: Path) -> None:
    with guarded.protected(path, tmp_path) as p:
        target = "/v1/profile?seconds=0.01"
        assert p.ask(post(target, b"")).status == 401
        assert p.ask(post(target, b"", guarded.bearer(guarded.token("alice")))).status == 403


# The command


def command(served: Served, *words: str) -> Any:
    url = f"http://127.0.0.1:{served.server.port}"
    return CliRunner().invoke(app, ["trace", *words, "--url", url])


@ALL
def test_the_command_writes_a_file(path: str, tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    with gated(**way(path)) as (served, _):
        result = command(served, "--seconds", "0.02", "-o", str(file))
    assert result.exit_code == 0, result.output
    assert str(file) in result.stdout
    assert json.loads(file.read_bytes())["otherData"]["seconds"] == 0.02
    assert list(tmp_path.iterdir()) == [file]


@ALL
def test_a_refused_command_leaves_no_file(path: str, tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    with gated(**way(path)) as (served, _):
        result = command(served, "--seconds", "100", "-o", str(file))
        nowhere = command(served, "--seconds", "0.01", "-o", str(tmp_path / "none" / "x"))
    assert (result.exit_code, nowhere.exit_code) == (1, 1)
    assert "seconds must be a number above 0 and at most 60" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
@ALL
def test_the_command_refuses_impossible_seconds(path: str, seconds: str, tmp_path: Path) -> None:
    with gated(**way(path)) as (served, _):
        result = command(served, f"--seconds={seconds}", "-o", str(tmp_path / "x"))
    assert result.exit_code == 1
    assert f"--seconds: expected a number over 0, got {seconds}" in result.stderr
    assert list(tmp_path.iterdir()) == []
