"""`cobatch bench` against real servers: reports, checks, credentials, refused options."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from cobatch.server.cli.bench import bench
from cobatch.server.settings.schema import ModelSettings
from tests.support.auth.protected import protected, token
from tests.support.http.serving import GatedEngine, Served, gated, serve
from tests.support.http.wire import serve_models
from tests.support.models import axis_models, models

APP = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
APP.command("bench")(bench)
# As short as possible: the figures do not matter.
SHORT = ("--seconds", "0.3", "--warmup-s", "0", "--quiet")


@pytest.fixture(scope="module")
def node() -> Iterator[tuple[Served, GatedEngine]]:
    with gated(fast=True) as found:
        yield found


def url_of(served: Served) -> str:
    return f"http://127.0.0.1:{served.server.port}"


def command(served: Served, *arguments: str | Path) -> Result:
    return CliRunner().invoke(APP, [url_of(served), *SHORT, *(str(argument) for argument in arguments)])


def done(served: Served, tmp_path: Path, *arguments: str | Path, status: int = 0) -> Any:
    """Run the command, check its exit status, and return its JSON report."""
    file = tmp_path / "figures.json"
    result = command(served, "--json", file, *arguments)
    assert result.exit_code == status, result.output
    document = json.loads(file.read_text())
    for run in document["runs"]:
        total = run["total"]
        assert total["requests"] == total["answered"] + sum(total["errors"].values())
    return document


def refused(served: Served, *arguments: str | Path, status: int = 2) -> str:
    result = command(served, *arguments)
    assert result.exit_code == status, result.output
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("more", [(), ("--binary", "--rows", "3", "--processes", "2")])
def test_a_closed_loop(node: Any, tmp_path: Path, more: tuple[str, ...]) -> None:
    served, engine = node
    before = len(engine.ran)
    document = done(served, tmp_path, "--connections", "4", "--shape", "x=1", *more)
    (run,) = document["runs"]
    assert document["target"]["model"] == "gate"
    assert run["rate"] is None
    assert run["total"]["answered"] > 0
    assert not run["total"]["errors"]
    assert run["generator"]["processes"] == (2 if more else 1)
    assert run["generator"]["connections"] == 4
    assert (
        run["server"]["executions"] == len(engine.ran) - before - 1
    )  # the first request is not part of the load
    # Batches have 3 rows, or 1 to 4, and each answer tells the number.
    assert set(run["batches"]) <= ({"3"} if more else {"1", "2", "3", "4"})
    assert sum(run["batches"].values()) == run["total"]["answered"]


def test_several_rates_give_a_table_and_a_page(node: Any, tmp_path: Path) -> None:
    served, _ = node
    page = tmp_path / "page.html"
    document = done(
        served, tmp_path, "--rate", "50,200", "--shape", "x=1", "--arrivals", "constant", "--html", page,
        "--tenant", "name=<a>,priority=1", "--tenant", "name=b,deadline_ms=20000,share=3",
    )  # fmt: skip
    slow, fast = document["runs"]
    assert (slow["total"]["requests"], fast["total"]["requests"]) == (14, 59)
    assert [one["name"] for one in fast["callers"]] == ["<a>", "b"]
    assert sum(one["requests"] for one in fast["callers"]) == 59
    assert fast["total"]["good_rate"] == pytest.approx(59 / 0.3, rel=0.01)
    assert sum(count for _, count in fast["buckets"]) == 59
    text = page.read_text()
    assert "<script" not in text
    assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace(url_of(served), "")
    root = ET.fromstring(text.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', "")
                         .replace('initial-scale=1">', 'initial-scale=1"/>'))  # fmt: skip
    boxes = {one.get("viewBox") for one in root.iter("{http://www.w3.org/2000/svg}svg")}
    assert len(boxes) == 1, "charts of one size"
    titles = {one.text for one in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {
        "Latency distribution", "Latency by due time", "Throughput by offered rate",
        "Batch sizes (0: no answers)", "Throughput and offered rate",
    } <= titles  # fmt: skip
    assert any(cell.text == "<a>" for cell in root.iter("td"))
    # Answers count by arrival time, for each tenant as for the total.
    for one in document["runs"]:
        assert one["total"]["answered_rate"] == pytest.approx(
            sum(caller["answered_rate"] for caller in one["callers"]), abs=1e-3
        )
    assert fast["callers"][0]["good_rate"] is None  # it has no deadline


def test_the_report_on_the_terminal(node: Any) -> None:
    served, _ = node
    result = command(served, "--rate", "100", "--shape", "x=1")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"gate at {url_of(served)} (cobatch")
    assert lines[0].endswith("JSON, open loop, poisson arrivals, answers not checked")
    assert lines[1].split()[:3] == ["load", "offered/s", "answered/s"]
    assert lines[2].startswith("100/s ")
    assert any(line.startswith("server: ") for line in lines)
    assert any("answers are few" in line for line in lines)
    assert not result.stderr


def test_answers_are_checked(node: Any, tmp_path: Path) -> None:
    """The model doubles. Expected answers are right, then one is wrong, then answers are wrong under load."""
    served, engine = node
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(x, np.arange(6).reshape(6, 1))
    np.save(y, 2 * np.arange(6).reshape(6, 1))
    good = done(served, tmp_path, "--input", f"x={x}", "--expect", f"y={y}", "--connections", "2", "--binary")
    assert not good["runs"][0]["total"]["errors"]
    lines = tmp_path / "y.jsonl"
    lines.write_text("".join(f'{{"y": [{2 * n + (n == 5)}]}}\n' for n in range(6)))
    message = refused(served, "--input", f"x={x}", "--expect", lines, status=1)
    assert "the answer to input 5 is wrong: output 'y' differs from the expected values" in message

    def wait(slot: int) -> tuple[np.ndarray[Any, Any], ...]:
        """Answer right for the six requests tried first, wrong under load."""
        wrong = len(engine.ran) >= 6
        return tuple(part + wrong for part in GatedEngine.wait(engine, slot))

    engine.ran.clear()
    engine.__dict__["wait"] = wait
    try:
        bad = done(served, tmp_path, "--input", f"x={x}", "--expect", f"y={y}", status=1)
        assert bad["runs"][0]["total"]["errors"].keys() == {"wrong answer"}
    finally:
        del engine.__dict__["wait"]


def test_another_server_can_give_the_expected_answers(node: Any, tmp_path: Path) -> None:
    served, _ = node
    document = done(served, tmp_path, "--shape", "x=1", "--rows", "2", "--expect", url_of(served))
    assert document["load"]["expect"] == [url_of(served)]
    assert not document["runs"][0]["total"]["errors"]


def test_a_trace_is_replayed(node: Any, tmp_path: Path) -> None:
    served, engine = node
    trace = tmp_path / "trace.csv"
    trace.write_text("0,1,a\n0.01,4,b\n0.02,2\n")
    engine.ran.clear()
    document = done(
        served, tmp_path, "--arrivals", trace, "--shape", "x=1", "--values", "x=3:3", "--seconds", "9",
        "--tenant", "name=a", "--tenant", "name=b",
    )  # fmt: skip
    assert [one["requests"] for one in document["runs"][0]["callers"]] == [2, 1]
    # The trace, and a first request of each tenant.
    assert sum(map(len, engine.ran)) == 1 + 1 + 7
    assert "tenant 'b' that no --tenant" in refused(served, "--arrivals", trace, "--tenant", "name=a")


def test_capacity_is_searched(node: Any, tmp_path: Path) -> None:
    """No answer arrives within a nanosecond: the search stops at the lowest rate worth measuring."""
    served, _ = node
    page = tmp_path / "page.html"
    limit = ("--find-capacity", "--slo-ms", "0.000001", "--html", str(page))
    document = done(served, tmp_path, "--shape", "x=1", *limit, "--rate", "250", "--seconds", "0.1")
    found = document["capacity"]
    assert [one["rate"] for one in found["trials"]] == [250, 250, 200, 200]
    assert [run["rate"] for run in document["runs"]] == [250, 250, 200, 200]
    assert not any(one["held"] for one in found["trials"])
    assert all(run["total"]["good_rate"] == 0 for run in document["runs"])  # the limit is a deadline
    assert ">held</th>" in page.read_text()
    assert found["sentence"].startswith("No rate was found with p99 within 1e-06 ms: at 200.0 per second")


def test_tokens_of_tenants(tmp_path: Path) -> None:
    with protected(True, tmp_path) as node:
        file = tmp_path / "token"
        file.write_text(token("alice"))
        document = done(node.served, tmp_path, "--shape", "x=1", "--model", "gate", "--token-file", file)
        assert not document["runs"][0]["total"]["errors"]
        assert token("alice") not in json.dumps(document)
        message = refused(node.served, "--shape", "x=1", "--token-file", str(file), status=1)
        assert "these credentials may not list the models: give --model (403: " in message
        message = refused(node.served, "--shape", "x=1", status=1)
        assert "the server asks for credentials, with --token-file or --api-key (401: " in message
        message = refused(node.served, "--shape", "x=1", "--model", "gate", status=1)
        assert "401" in message
        both = ("--shape", "x=1", "--tenant", f"name=a,token_file={file}", "--tenant", "name=guest")
        assert "guest: the first request was answered with 401" in refused(
            node.served, *both, "--model", "gate", status=1
        )


def test_models_are_found_and_described(tmp_path: Path) -> None:
    with serve_models(True, tmp_path) as served:
        assert "which model? The server has " in refused(served)
        assert "404" in refused(served, "--model", "missing", status=1)
        document = done(served, tmp_path, "--model", "negate", "--connections", "1")
        assert document["runs"][0]["total"]["answered"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--find-capacity",), "--find-capacity and --slo-ms go together"),
        (("--slo-ms", "5"), "--find-capacity and --slo-ms go together"),
        (("--rate", "fast"), "numbers separated by commas"),
        (("--rate", "0"), "more than 0"),
        (("--arrivals", "bursty"), "give --rate"),
        (("--json", "/no/such/folder/x.json"), "/no/such/folder: no such folder"),
        (("--arrivals", "sometimes"), "poisson, constant, bursty, diurnal or a trace file"),
        (("--shape", "x"), "NAME="),
        (("--shape", "x=0"), "whole numbers from 1"),
        (("--values", "x=9:1"), "LOW must not be more than HIGH"),
        (("--values", "x=1:2,3:4"), "one LOW:HIGH"),
        (("--header", "none"), "NAME: VALUE"),
        (("--deadline-ms", "0"), "more than 0"),
        (("--expect", "y.npy"), "--expect FILE needs --input FILE"),
        ((), "give --shape x=SIZE"),
    ],
)
def test_invalid_options_are_refused(node: Any, arguments: tuple[str, ...], message: str) -> None:
    served, _ = node
    more = () if not arguments or arguments[0] == "--shape" else ("--shape", "x=1")
    assert message in refused(served, *arguments, *more)


@pytest.mark.slow
def test_an_interrupted_run_reports_its_results(node: Any, tmp_path: Path) -> None:
    served, _ = node
    file = tmp_path / "figures.json"
    # With a line of progress every 0.1 s, not 5 s.
    code = "from cobatch.server import cli; from cobatch.server.loadtest import report; "
    command = [
        sys.executable,
        "-c",
        code + "report._LINE_S = 0.1; cli.main()",
        "bench",
        url_of(served),
        "--shape",
        "x=1",
        "--json",
        str(file),
    ]
    with subprocess.Popen(
        [*command, "--seconds", "1000", "--processes", "2", "--warmup-s", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        # A line tells of the last second; from 1.5 s on no part of that is the warm-up.
        told = ((line, re.search(r" ([0-9.]+) s: ", line)) for line in process.stderr)
        line = next(
            line
            for line, time in told
            if time is not None and float(time[1]) >= 1.5 and " 0/s answered" not in line
        )
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert line.startswith("16 connections ")
    assert "Traceback" not in errors
    assert process.returncode == 0, errors + printed
    assert "(interrupted)" in printed
    document = json.loads(file.read_text())
    assert document["interrupted"]
    (run,) = document["runs"]
    assert 0 < run["measured_s"] < 1000
    assert run["total"]["answered_rate"] > 0
    # Requests in flight are reported.
    assert set(run["total"]["errors"]) <= {"stopped before its answer"}


@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_interruption_in_the_middle_of_a_message(
    node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: str
) -> None:
    served, _ = node
    read = Pipe._recv  # type: ignore[attr-defined]
    samples_bytes = 1000
    interrupted: list[int] = []

    def interrupt(pipe: Pipe, size: int, *arguments: Any) -> Any:
        data = read(pipe, size, *arguments)
        length = int.from_bytes(data.getvalue(), "big") if size == 4 else 0
        if length > samples_bytes and not interrupted:
            interrupted.append(length)
            signal.raise_signal(signal.SIGINT)
        return data

    monkeypatch.setattr(Pipe, "_recv", interrupt)
    document = done(served, tmp_path, "--shape", "x=1", "--seconds", "1000", "--processes", processes)
    assert interrupted
    assert document["interrupted"]
    assert document["runs"][0]["total"]["answered"] > 0


def test_the_report_is_printed_if_a_file_cannot_be_written(node: Any, tmp_path: Path) -> None:
    served, _ = node
    result = command(served, "--shape", "x=1", "--json", tmp_path)
    assert result.exit_code == 1
    assert "Is a directory" in result.stderr
    assert "16 connections" in result.stdout


def test_a_port_without_server_is_an_error() -> None:
    result = CliRunner().invoke(APP, ["http://127.0.0.1:1", *SHORT])
    assert result.exit_code == 1
    assert result.stderr.startswith("cobatch: 127.0.0.1:1: ")


def test_a_model_without_a_batch_axis(tmp_path: Path) -> None:
    model = ModelSettings(path=models.write(tmp_path, axis_models.cumulative()), name="gate", threads=1)
    with serve(True, (model,)) as served:
        assert "give --shape x=SIZE for its variable axes" in refused(served)
        (run,) = done(served, tmp_path, "--shape", "x=7")["runs"]
        assert run["total"]["answered"] > 0
        assert "has no batch axis: requests can have one row only" in refused(served, "--rows", "2")
        np.save(tmp_path / "x.npy", np.ones((3, 5), np.float32))  # three requests
        (run,) = done(served, tmp_path, "--input", f"x={tmp_path / 'x.npy'}")["runs"]
        assert run["total"]["answered"] > 0
