"""The server as a process of its own: start, health, signals, shutdown, failures."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import TensorProto

from tests.support.http.process import Answer, Cobatch, Connection
from tests.support.models import models
from tests.support.models.gate import HOLD

pytestmark = pytest.mark.slow

FAST = pytest.mark.parametrize("path", ["--fast-path", "--no-fast-path"])
HELD_ROW = [float(HOLD)] * 3


@pytest.fixture(autouse=True, params=[1, 3], ids=["one", "three"])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with one process and with three."""
    monkeypatch.setattr(Cobatch, "processes", request.param)


@pytest.fixture
def negate(tmp_path: Path) -> str:
    """Return a model with y = -x, FP32 [batch, 3]; its name is `negate`."""
    return models.write(tmp_path, models.negate(), "negate.onnx")


@pytest.fixture
def gated(tmp_path: Path, negate: str) -> Iterator[Cobatch]:
    """Start a server whose runs with HOLD in their input block."""
    with Cobatch(tmp_path, negate, "--port", "0", gate=True) as server:
        yield server.ready()


def check_refused_for_good(answer: Answer) -> None:
    """Assert that a request was refused because the server is about to stop."""
    assert answer.status == 503
    assert answer.json["type"] == "/problems/draining"
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["connection"] == "close"


def check_read_by_now(*probes: Connection) -> None:
    """Wait until the fronts of these connections have read the bytes sent before, on other ones."""
    for probe in probes:
        assert probe.infer("negate", [["no number"]]).status == 422


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_start_serve_and_stop(tmp_path: Path, negate: str, sent: signal.Signals) -> None:
    with Cobatch(tmp_path, negate, "--port", "0") as server:
        assert server.port != 0
        assert server.line("cobatch: ready: ") == "negate"
        caller = server.connect()
        assert caller.get("/v2/health/ready").status == 200
        assert caller.infer("negate", [[1, 2, 3], [4, 5, 6]]).rows == [[-1, -2, -3], [-4, -5, -6]]
        server.signal(sent)
        assert server.wait() == 0
        url = f"http://127.0.0.1:{server.port}"
        assert server.stdout == [
            f"cobatch: listening on {url}",
            f"cobatch: live page {url}/dashboard, API {url}/docs",
            "cobatch: ready: negate",
        ]
        assert "Traceback" not in server.stderr
        assert "ran 2 rows in 1 batches" in server.stderr


def test_health_follows_the_model(tmp_path: Path, negate: str) -> None:
    with Cobatch(tmp_path, negate, "--port", "0", gate=True, opening=True) as server:
        server.held()
        caller = server.connect()
        assert caller.get("/v2/health/ready").status == 503
        assert caller.get("/v2/models/negate/ready").status == 503
        early = caller.infer("negate", [[1, 2, 3]])
        assert early.status == 503
        assert early.json["type"] == "/problems/starting"
        assert int(early.headers["retry-after"]) >= 1
        server.release()
        server.ready()
        caller = server.connect()
        assert caller.get("/v2/health/ready").status == 200
        assert caller.get("/v2/models/negate/ready").status == 200
        assert server.stop() == 0


def test_a_signal_during_loading_ends_the_process_cleanly(tmp_path: Path, negate: str) -> None:
    with Cobatch(tmp_path, negate, "--port", "0", gate=True, opening=True) as server:
        server.held()
        caller = server.connect()
        server.signal()
        for _ in range(100_000):
            answer = caller.infer("negate", [[1, 2, 3]])
            if answer.json["type"] != "/problems/starting":  # until all processes know of the signal
                break
        check_refused_for_good(answer)
        server.release()
        assert server.wait() == 0
        assert "Traceback" not in server.stderr
        assert not any(line.startswith("cobatch: ready") for line in server.stdout)


@FAST
def test_accepted_requests_are_answered_after_the_signal(tmp_path: Path, negate: str, path: str) -> None:
    with Cobatch(tmp_path, negate, "--port", "0", path, gate=True) as server:
        server.ready()
        running, first, second, half, late, new = (server.connect() for _ in range(6))
        running.send_infer("negate", [HELD_ROW])
        server.held()
        first.send_infer("negate", [[1, 2, 3]])
        second.send_infer("negate", [[4, 5, 6], [7, 8, 9]])
        rest = half.send_half("negate", [[1, 2, 3]])
        check_read_by_now(late, new)
        server.signal()
        server.not_ready(late)
        assert late.get("/v2/health/live").status == 200
        half.send_rest(rest)
        check_refused_for_good(half.answer())
        for connection in (late, new, Connection(server.port)):
            check_refused_for_good(connection.infer("negate", [[1, 2, 3]]))
            connection.close()
        server.release()
        assert running.answer().rows == [[-value for value in HELD_ROW]]
        assert first.answer().rows == [[-1, -2, -3]]
        assert second.answer().rows == [[-4, -5, -6], [-7, -8, -9]]
        assert server.wait() == 0
        assert "ran 4 rows in 2 batches" in server.stderr


def test_a_second_signal_ends_the_process_at_once(gated: Cobatch) -> None:
    running, probe = gated.connect(), gated.connect()
    running.send_infer("negate", [HELD_ROW])
    gated.held()
    gated.signal()
    gated.not_ready(probe)
    gated.signal()
    assert gated.wait() == 128 + signal.SIGTERM


@FAST
def test_requests_beyond_the_drain_limit_are_refused(tmp_path: Path, negate: str, path: str) -> None:
    arguments = (negate, "--port", "0", path, "--drain-timeout-s", "0.5")
    with Cobatch(tmp_path, *arguments, gate=True) as server:
        server.ready()
        running, queued, probe, other = (server.connect() for _ in range(4))
        running.send_infer("negate", [HELD_ROW])
        server.held()
        queued.send_infer("negate", [[1, 2, 3]])
        check_read_by_now(probe, other)
        server.signal()
        for caller in (running, queued):
            answer = caller.answer()
            assert answer.status == 503
            assert answer.json["type"] == "/problems/abandoned"
            assert answer.headers["connection"] == "close"
        # The gate stays closed: the run never ends, but the process does.
        assert server.wait() == 0
        assert "model negate: 2 requests were not done within 0.5 s" in server.stderr


def test_a_model_that_cannot_be_loaded_ends_the_process_with_one_line(tmp_path: Path) -> None:
    bad = models.write(tmp_path, models.identity(TensorProto.BFLOAT16), "bad.onnx")
    with Cobatch(tmp_path, bad, "--port", "0", "--log-level", "warning") as server:
        assert server.wait() == 1
        (line,) = server.stderr.splitlines()
        assert line.startswith("cobatch: model bad cannot be loaded: ")
        assert "'x'" in line


def test_an_invalid_model_file_ends_the_process_with_one_line(tmp_path: Path, negate: str) -> None:
    garbage = models.write(tmp_path, b"not a model\n" * 40, "garbage.onnx")
    config = tmp_path / "cobatch.toml"
    config.write_text(f'[[models]]\npath = "{negate}"\n\n[[models]]\npath = "{garbage}"\n')
    with Cobatch(tmp_path, "--config", config, "--port", "0", "--log-level", "warning") as server:
        assert server.wait() == 1
        (line,) = server.stderr.splitlines()
        assert line.startswith("cobatch: model garbage cannot be loaded: ")
        assert garbage in line


def test_a_port_in_use_ends_the_process_with_one_line(tmp_path: Path, negate: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Cobatch(tmp_path, negate, "--port", str(port)) as server:
            assert server.wait() == 1
            assert server.stdout == []
            assert (
                server.stderr == f"cobatch: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
            )


def test_an_unusable_host_ends_the_process_with_one_line(tmp_path: Path, negate: str) -> None:
    with Cobatch(tmp_path, negate, "--host", "127.0.0.1.2", "--allow-anonymous", "--port", "0") as server:
        assert server.wait() == 1
        assert "cobatch: cannot listen on 127.0.0.1.2, port 0: " in server.stderr
        assert "Traceback" not in server.stderr


def test_models_do_not_wait_for_each_other(tmp_path: Path, negate: str) -> None:
    other = models.write(tmp_path, models.sum_rows(), "sum.onnx")
    config = tmp_path / "cobatch.toml"
    config.write_text(f'[[models]]\npath = "{negate}"\n\n[[models]]\nname = "sum"\npath = "{other}"\n')
    with Cobatch(tmp_path, "--config", config, "--port", "0", gate=True) as server:
        assert server.line("cobatch: ready: ") == "negate, sum"
        running, queued, free = server.connect(), server.connect(), server.connect()
        running.send_infer("negate", [HELD_ROW])
        server.held()
        queued.send_infer("negate", [[1, 2, 3]])
        for width in range(1, 20):
            assert free.infer("sum", [[1.0] * width]).rows == [[width]]
        server.release()
        assert running.answer().rows == [[-value for value in HELD_ROW]]
        assert queued.answer().rows == [[-1, -2, -3]]
        assert server.stop() == 0


@FAST
def test_an_engine_error_affects_one_caller_and_is_logged(tmp_path: Path, path: str) -> None:
    pick = models.write(tmp_path, models.pick(), "pick.onnx")
    with Cobatch(tmp_path, pick, "--port", "0", path, gate=True) as server:
        server.ready()
        running, probe, *callers = (server.connect() for _ in range(10))
        running.send_infer("pick", [[HOLD]], "INT64")
        server.held()
        for number, caller in enumerate(callers):
            caller.send_infer("pick", [[number % 3 if number != 5 else 99]], "INT64")
        probe.get("/v2/health/live")
        server.release()
        assert running.answer().rows == [[10]]
        for number, caller in enumerate(callers):
            answer = caller.answer()
            if number != 5:
                assert answer.rows == [[10 * (number % 3 + 1)]]
                continue
            assert answer.status == 422
            problem = answer.json
            assert problem["model"] == "pick"
            reference = problem["reference"]
            assert reference in problem["error"]
            assert "Gather" not in problem["error"], "the engine's words stay in the log"
        assert callers[5].infer("pick", [[2]], "INT64").rows == [[30]]
        assert server.stop() == 0
        (line,) = [line for line in server.stderr.splitlines() if reference in line]
        assert "model pick" in line
        assert "Gather" in line
        ran = re.search(r"ran (\d+) rows in (\d+) batches", server.stderr)
        assert ran is not None
        assert int(ran[1]) == 9
        assert int(ran[2]) <= 2 + 2 * 3, "one batch, and the halves of it that were needed"


def test_modules_in_the_working_directory_do_not_shadow_ours(tmp_path: Path, negate: str) -> None:
    for name in ("server", "batcher", "engines"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the user\\'s own {name}.py')\n")
    with Cobatch(tmp_path, negate, "--port", "0", cwd=tmp_path) as server:
        assert server.ready().connect().infer("negate", [[1, 2, 3]]).rows == [[-1, -2, -3]]
        assert server.stop() == 0


def test_a_model_whose_first_axis_is_fixed_is_served_padded(tmp_path: Path) -> None:
    fixed = models.write(tmp_path, models.negate(batch=4), "fixed.onnx")
    with Cobatch(tmp_path, fixed, "--port", "0", gate=True) as server:
        server.ready()
        running, probe, *callers = (server.connect() for _ in range(8))
        assert running.infer("fixed", [[1, 2, 3]]).rows == [[-1, -2, -3]]
        eleven = [[float(row), 0.5, 1] for row in range(11)]
        assert running.infer("fixed", eleven).rows == [[-value for value in row] for row in eleven]
        running.send_infer("fixed", [HELD_ROW])
        server.held()
        for number, caller in enumerate(callers):
            caller.send_infer("fixed", [[number, 1, 2]])
        probe.get("/v2/health/live")
        server.release()
        assert running.answer().rows == [[-value for value in HELD_ROW]]
        for number, caller in enumerate(callers):
            assert caller.answer().rows == [[-number, -1, -2]]
        assert server.stop() == 0
        assert "batches of up to 4 rows" in server.stderr


def test_variables_of_the_environment_reach_the_server(tmp_path: Path, negate: str) -> None:
    with Cobatch(
        tmp_path, env={"COBATCH_MODEL": negate, "COBATCH_PORT": "0", "COBATCH_NAME": "minus"}
    ) as server:
        assert server.line("cobatch: ready: ") == "minus"
        assert server.connect().infer("minus", [[1, 2, 3]]).rows == [[-1, -2, -3]]
        assert server.stop() == 0
