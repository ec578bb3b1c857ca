"""The server's stderr and stdout: a reader that has stopped holds up nothing, and every line has one form."""

import contextlib
import fcntl
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.http.process import COBATCH, WAIT_S, Cobatch, Connection
from tests.support.models import models

pytestmark = pytest.mark.slow

_GARBAGE = b"\x00\x01 nonsense\r\n\r\n"
_UPGRADE = b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """Return the end of a full pipe without a reader, for a process to write to."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    yield writer
    os.close(writer)
    os.close(reader)


@pytest.fixture
def unread(tmp_path: Path, full_pipe: int) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Serve `pick` with stdout and stderr in that pipe; yield the process and its port."""
    model = models.write(tmp_path, models.pick(), "pick.onnx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(COBATCH), "serve", model, "--port", str(port), "--access-log", "text"]
    with subprocess.Popen(command, stdout=full_pipe, stderr=full_pipe) as process:
        yield process, port
        process.kill()


def until_ready(process: subprocess.Popen[bytes], port: int) -> Connection:
    """Connect as soon as the server listens; return the connection when it is ready."""
    while True:
        connection = Connection(port)
        try:
            while connection.get("/v2/health/ready").status != 200:
                pass
            return connection
        except ConnectionRefusedError:
            connection.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"the server ended with {process.wait(0.1)}") from None


def send(port: int, data: bytes) -> bytes:
    """Send bytes on a connection of their own; return the beginning of the answer."""
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as client:
        client.sendall(data)
        return client.recv(4096)


def test_a_full_pipe_holds_up_nothing(unread: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = unread
    with contextlib.closing(until_ready(process, port)) as connection:
        for _ in range(1200):
            assert send(port, _GARBAGE).startswith(b"HTTP/1.1 400 ")
        for _ in range(200):
            assert send(port, _UPGRADE).startswith(b"HTTP/1.1 200 ")
        for _ in range(120):
            assert connection.infer("pick", [[99]], "INT64").status == 422
        assert connection.infer("pick", [[2]], "INT64").rows == [[30]]
        assert connection.get("/v2/health/live").status == 200
        process.terminate()
        assert process.wait(WAIT_S) == 0


def test_the_log_of_failing_runs_is_limited_and_says_how_many_more(tmp_path: Path) -> None:
    model = models.write(tmp_path, models.pick(), "pick.onnx")
    with Cobatch(tmp_path, model, "--port", "0", "--log-format", "json") as server:
        caller = server.ready().connect()
        for _ in range(100):
            assert caller.infer("pick", [[99]], "INT64").status == 422
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.stderr.splitlines()]
    for logger in ("cobatch.batcher", "cobatch.onnxruntime"):
        messages = [line["message"] for line in lines if line["logger"] == logger]
        assert all("Gather" in message for message in messages)
        more = [
            int(message.split()[0]) for message in messages if " more in the last 10 s, the last: " in message
        ]
        said = len(messages) - len(more)
        assert more
        assert said + sum(more) == 100


def test_lines_that_do_not_come_from_the_log_are_json_too(tmp_path: Path) -> None:
    model = models.write(tmp_path, models.pick(), "pick.onnx")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = (model, "--port", port, "--access-log", "json", "--allow-anonymous")
        with Cobatch(tmp_path, *arguments) as server:
            assert server.wait() == 1
            said = [json.loads(line)["message"] for line in server.stderr.splitlines()]
    assert len(said) == 2
    assert said[0].startswith("--allow-anonymous: ")
    assert said[1] == f"cobatch: cannot listen on 127.0.0.1, port {port}: Address already in use"
