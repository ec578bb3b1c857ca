"""The requests of `cobatch bench`: inputs, encoding, callers, addresses, schedules."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.simulator.traffic import Constant, Poisson, read_trace
from cobatch.engines.base import DATATYPES
from cobatch.server.loadtest.codec import decode, difference, encode, request_bytes
from cobatch.server.loadtest.generator import choices, schedule
from cobatch.server.loadtest.messages import Address, Expected, Plan, PreparedRequest, Trial
from cobatch.server.loadtest.options import BenchError, Caller, UsageError, parse_callers
from cobatch.server.loadtest.requests import FileInputs, RandomInputs
from cobatch.server.loadtest.target import Reply, Tensor, describe, parse_url
from tests.support.examples import examples


def values(datatype: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    shape = [-1, 2]
    return RandomInputs([Tensor("x", datatype, tuple(shape))], {}, {}, int(rng.integers(99))).example(1, 3)[
        "x"
    ]


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("binary", [False, True])
def test_tensors_survive_encoding_and_decoding(datatype: str, binary: bool) -> None:
    array = values(datatype, np.random.default_rng(1))
    assert array.shape == (3, 2)
    body, headers = encode({"x": array}, {"x": datatype}, binary, {"priority": 1})
    # A request becomes an answer by renaming "inputs".
    message = body.replace(b'"inputs"', b'"outputs"')
    length = headers.get("Inference-Header-Content-Length")
    more = len(message) - len(body)
    head = f"\r\ninference-header-content-length: {int(length) + more}\r\n".encode() if length else b""
    assert difference(decode(head, message), {"x": array}, 0, 0) is None
    assert b'"priority":1' in body


def test_difference_names_the_first_wrong_output() -> None:
    right = {"y": np.array([[1.0, 2.0]]), "z": np.array(["a"], object)}
    assert difference({"z": right["z"], "y": np.array([[1.0, 2.0009]], np.float32)}, right, 1e-3, 0) is None
    assert "differs" in str(difference({**right, "y": np.array([[1.0, 2.1]])}, right, 1e-3, 0))
    assert "missing" in str(difference({"y": right["y"]}, right, 1e-3, 0))
    assert "shape" in str(difference({**right, "y": right["y"][0]}, right, 1e-3, 0))
    assert "'z'" in str(difference({**right, "z": np.array(["b"], object)}, right, 1e-3, 0))
    with pytest.raises(ValueError, match="protocol"):
        decode(b"", b'{"predictions": []}')


def test_a_request_has_one_host_header() -> None:
    address = Address("h", 80)
    assert (
        request_bytes(address, "/x", {}, b"") == b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
    )
    named = request_bytes(address, "/x", {"host": "other"}, b"")
    assert named == b"POST /x HTTP/1.1\r\nhost: other\r\nContent-Length: 0\r\n\r\n"


IDS = Tensor("ids", "INT64", (-1, -1))
IMAGE = Tensor("image", "FP32", (-1, -1, -1))


def test_random_inputs_have_the_sizes_and_values_of_the_options() -> None:
    drawn = RandomInputs([IDS, Tensor("x", "FP32", (1, 4))], {"ids": [(3, 9)]}, {"ids": (7, 8)}, 1)
    examples = [drawn.example(number, 1) for number in range(40)]
    assert {one["ids"].shape[1] for one in examples} == set(range(3, 10))
    assert {int(value) for one in examples for value in one["ids"].flat} == {7, 8}
    assert examples[0]["x"].shape == (1, 4)
    assert np.array_equal(drawn.example(5, 1)["x"], examples[5]["x"])
    with pytest.raises(UsageError, match="no batch axis"):
        drawn.example(0, 2)


def test_inputs_with_equal_ranges_have_equal_sizes() -> None:
    tensors = [Tensor("ids", "INT64", (-1, -1)), Tensor("mask", "INT64", (-1, -1)), IMAGE]
    spans: dict[str, Any] = {"ids": [(3, 99)], "mask": [(3, 99)], "image": [(3, 99), (3, 99)]}
    drawn = RandomInputs(tensors, spans, {}, 1)
    shapes = [{name: array.shape for name, array in drawn.example(n, 2).items()} for n in range(40)]
    assert all(one["ids"] == one["mask"] == one["image"][:2] for one in shapes)
    assert len({one["ids"] for one in shapes}) > 20
    assert any(one["image"][1] != one["image"][2] for one in shapes)
    apart = RandomInputs(tensors[:2], {"ids": [(3, 99)], "mask": [(3, 98)]}, {}, 1)
    assert any(apart.example(n, 2)["ids"].shape != apart.example(n, 2)["mask"].shape for n in range(9))


@pytest.mark.parametrize(
    ("shapes", "spans", "message"),
    [
        ({}, {}, "--shape ids=SIZE"),
        ({"ids": [(1, 2), (1, 2)]}, {}, "--shape ids=SIZE"),
        ({"id": [(1, 2)]}, {}, "--shape: no input 'id'; the model has ids"),
        ({"ids": [(1, 2)]}, {"id": (1, 2)}, "--values: no input 'id'; the model has ids"),
    ],
)
def test_random_inputs_refuse_options_that_do_not_fit(shapes: Any, spans: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RandomInputs([IDS], shapes, spans, 1).example(0, 1)


def test_inputs_from_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(10).reshape(5, 2))
    (tmp_path / "b.jsonl").write_text('{"b": [1]}\n\n{"b": [2]}\n{"b": [3]}\n{"b": [4]}\n{"b": [5]}\n')
    tensors = [Tensor("a", "FP32", (-1, 2)), Tensor("b", "INT32", (-1, 1))]
    files = [f"a={tmp_path / 'a.npy'}", str(tmp_path / "b.jsonl")]
    read = FileInputs("--input", files, tensors, "inputs")
    assert read.count == 5
    second = read.example(1, 2)
    assert second["a"].dtype == np.float32
    assert second["a"].tolist() == [[4, 5], [6, 7]]
    assert second["b"].tolist() == [[3], [4]]
    assert read.example(2, 2)["b"].tolist() == [[5], [1]]


def test_whole_messages_from_a_file(tmp_path: Path) -> None:
    tensor = {"name": "x", "shape": [2, 1], "datatype": "BF16", "data": [1.5, 2]}
    (tmp_path / "all.jsonl").write_text(json.dumps({"inputs": [tensor]}) + "\n")
    read = FileInputs("--input", [str(tmp_path / "all.jsonl")], [], "inputs")
    assert read.datatypes == {"x": "BF16"}
    assert read.example(7, 1)["x"].tolist() == [[0x3FC0], [0x4000]]
    with pytest.raises(UsageError, match="leave out --rows"):
        read.example(0, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"x": [1]}\n{"y": [1]}\n{"y": [1]}', "equally many"),
        ("x.jsonl", '{"x": [1]}\n[1]', "line 2: expected an object"),
        ("x.jsonl", '{"x": ["one"]}', "line 1: 'x' .INT64."),
        ("x.jsonl", '{"x": [1.5]}', "line 1: 'x' .INT64."),
        ("x.jsonl", '{"inputs": [{"name": "x"}]}', "line 1: not a message"),
        ("x.jsonl", "", "equally many"),
        ("x.npy", "text", "x.npy"),
        ("gone", None, "No such file"),
    ],
)
def test_unreadable_input_files_are_refused(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        FileInputs("--input", [f"x={path}"], [Tensor("x", "INT64", (-1, 1))], "inputs")


def test_callers_have_their_own_options_and_credentials(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc\n")
    default = Caller(rows=2, priority=3, deadline_ms=9.0, headers={"X-API-Key": "k", "Via": "me"})
    found = parse_callers(
        [f"name=a,share=3,token_file={tmp_path / 'token'}", "deadline_ms=0.5,priority=1"], default
    )
    assert [one.name for one in found] == ["a", "tenant 2"]
    assert found[0].headers == {"Via": "me", "Authorization": "Bearer abc"}
    assert found[1].headers == default.headers
    assert found[0].parameters == {"priority": 3, "timeout": 9000}
    assert found[1].parameters == {"priority": 1, "timeout": 500}
    assert parse_callers([], default) == [default]
    for wrong in ("a", "share=0", "share=x", "colour=red", "token_file=/gone", "rows=0", "deadline_ms=0"):
        with pytest.raises(UsageError):
            parse_callers([wrong], default)
    with pytest.raises(UsageError, match="same name"):
        parse_callers(["name=a", "name=a"], default)


@pytest.mark.parametrize(
    ("text", "address", "model", "version"),
    [
        ("localhost:8000", Address("localhost", 8000), None, None),
        ("http://h/", Address("h", 80), None, None),
        ("https://h/v2", Address("h", 443, tls=True), None, None),
        ("http://h/at/v2/models/m/infer", Address("h", 80, base="/at"), "m", None),
        ("http://[::1]:9/v2/models/m/versions/3", Address("::1", 9), "m", "3"),
    ],
)
def test_urls_are_parsed(text: str, address: Address, model: str | None, version: str | None) -> None:
    assert parse_url(text, None, False) == (address, model, version)


def test_invalid_urls_are_refused() -> None:
    # Credentials in the URL would not be sent, and would be printed.
    for text in (
        "ftp://h",
        "http://",
        "http://h:port",
        "http://h:0",
        "http://me:secret@h",
        "http://h/?key=1",
    ):
        with pytest.raises(UsageError):
            parse_url(text, None, False)
    assert Address("::1", 9).authority == "[::1]:9"
    assert Address("h", 443, tls=True).authority == "h"


def plan_of(shares: list[float], rows: int = 1, examples: int = 3) -> Plan:
    requests = {
        (caller, size): [PreparedRequest(f"{caller} {size} {n}".encode(), caller, n) for n in range(examples)]
        for caller in range(len(shares))
        for size in range(1, rows + 1)
    }
    callers = [Caller(f"t{number}", share) for number, share in enumerate(shares)]
    return Plan(Address("h", 1), requests, callers, Expected([]))


@examples(20)
@given(st.integers(1, 5), st.integers(0, 9), st.booleans())
def test_several_processes_send_the_same_load_as_one(processes: int, seed: int, poisson: bool) -> None:
    plan = plan_of([1.0, 2.0])
    trial = Trial(Poisson(700.0) if poisson else Constant(700.0), 4, seconds=0.5, warmup_s=0.2, seed=seed)
    alone = list(schedule(plan, trial, 0, 1))
    dealt = [list(schedule(plan, trial, number, processes)) for number in range(processes)]
    assert sorted((due for part in dealt for due in part), key=lambda due: due[0]) == alone
    assert max(len(part) for part in dealt) - min(len(part) for part in dealt) <= 1
    assert all(0 < due < 0.7 for due, _ in alone)


def test_callers_follow_their_shares_and_examples_rotate() -> None:
    found = list(islice(choices(plan_of([1.0, 3.0]), Trial(None, 1, 1.0)), 8000))
    assert sum(one.caller == 1 for one in found) == pytest.approx(6000, abs=200)
    mine = [one.example for one in found if one.caller == 0]
    assert mine[:7] == [0, 1, 2, 0, 1, 2, 0]
    # Each process starts with another example.
    assert next(choices(plan_of([1.0]), Trial(None, 1, 1.0), 2)).example == 2


def test_a_trace_sets_the_tenant_and_rows_of_each_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("seconds,rows,tenant\n10.0,2,t1\n10.5,1,\n11.0,1,t0\n")
    trial = Trial(read_trace(path, speed=2.0), 4, seconds=0.6)
    due = list(schedule(plan_of([1.0, 1.0], rows=2), trial, 0, 1))
    assert [(time, one.data) for time, one in due] == [(0.0, b"1 2 0"), (0.25, b"0 1 0"), (0.5, b"0 1 1")]


def test_metadata_that_is_not_utf_8_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = Reply(200, b"", b'{"name": "\xff"}')
    monkeypatch.setattr("cobatch.server.loadtest.target.fetch", lambda *request: reply)
    with pytest.raises(BenchError, match="the metadata does not follow the protocol"):
        describe(Address("h", 1), "m", None, {})
    with pytest.raises(UsageError, match="the server does not list its models"):
        describe(Address("h", 1), None, None, {})
