"""`cobatch serve` as a child process, started by its console script, and connections to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.models.gate import HELD
from tests.support.paths import ROOT

COBATCH = Path(sys.executable).with_name("cobatch")
# Reached only by a bug; the server's longest wait is 30 s by default.
WAIT_S = 60.0


def eventually(condition: Callable[[], object]) -> None:
    """Look again and again until a condition holds, of which no event tells."""
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, f"it does not hold after {WAIT_S:g} s"


class Answer:
    """A complete response."""

    def __init__(self, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def rows(self) -> Any:
        """The only output of an infer answer, as a list of rows."""
        assert self.status == 200, self.body
        (output,) = self.json["outputs"]
        rows, *row_shape = output["shape"]
        assert len(row_shape) == 1
        width = row_shape[0]
        return [output["data"][row * width : (row + 1) * width] for row in range(rows)]


class Connection:
    """A keep-alive connection; `send_*` only writes, `answer` reads."""

    def __init__(self, port: int) -> None:
        self._http = HTTPConnection("127.0.0.1", port, timeout=WAIT_S)

    def get(self, path: str) -> Answer:
        """Send a GET; return its answer."""
        self._http.request("GET", path)
        return self.answer()

    def post(self, path: str, content: object) -> Answer:
        """Send a POST with JSON; return its answer."""
        self._http.request("POST", path, json.dumps(content))
        return self.answer()

    def post_text(self, path: str, text: str) -> None:
        """Write a POST with text."""
        self._http.request("POST", path, text, {"content-type": "text/plain"})

    def send_infer(self, model: str, rows: list[list[Any]], datatype: str = "FP32") -> None:
        """Write an infer request for a model with one input `x`."""
        self._http.request("POST", f"/v2/models/{model}/infer", _body(rows, datatype))

    def send_half(self, model: str, rows: list[list[Any]]) -> bytes:
        """Write an infer request's headers and the first half of its body; return the second half."""
        body = _body(rows, "FP32")
        self._http.putrequest("POST", f"/v2/models/{model}/infer")
        self._http.putheader("Content-Length", str(len(body)))
        self._http.endheaders(body[: len(body) // 2])
        return body[len(body) // 2 :]

    def send_rest(self, body: bytes) -> None:
        """Write the half that `send_half` returned."""
        self._http.send(body)

    def answer(self) -> Answer:
        """Read the next answer."""
        return Answer(self._http.getresponse())

    def infer(self, model: str, rows: list[list[Any]], datatype: str = "FP32") -> Answer:
        """Send an infer request; return its answer."""
        self.send_infer(model, rows, datatype)
        return self.answer()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()


def _body(rows: list[list[Any]], datatype: str) -> bytes:
    x = {"name": "x", "datatype": datatype, "shape": [len(rows), len(rows[0])], "data": rows}
    return json.dumps({"inputs": [x]}).encode()


class Cobatch:
    """A running `cobatch serve`; as a context manager it leaves no process behind.

    `gate`: hold runs with `tests.support.models.gate`, with `opening` also the opening of models. The process
    writes its files to `folder`. It inherits the environment without COBATCH_*, updated with `env`.
    """

    processes = 1

    def __init__(
        self,
        folder: Path,
        *arguments: str | Path,
        command: Sequence[str | Path] = (COBATCH,),
        gate: bool = False,
        opening: bool = False,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.stderr_path = folder / "stderr.txt"
        self.stdout: list[str] = []
        self._connections: list[Connection] = []
        self._changed = threading.Condition()
        self._ended = False
        self._gate = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._gate.bind("")  # an address in the abstract namespace
        self._gate.settimeout(WAIT_S)
        self._held: Any = None  # the address of the run that is held
        environ = {name: value for name, value in os.environ.items() if not name.startswith("COBATCH_")}
        environ |= {"PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
        environ["COBATCH_KEEP_ALIVE_S"] = str(WAIT_S)  # a busy machine may leave a connection idle for long
        if self.processes > 1:
            environ["COBATCH_PROCESSES"] = str(self.processes)
        if gate:
            site = folder / "site"
            site.mkdir()
            (site / "sitecustomize.py").write_text(
                "import tests.support.models.gate\n\ntests.support.models.gate.install()\n"
            )
            environ |= {"PYTHONPATH": f"{site}:{ROOT}", "GATE": self._gate.getsockname().hex()}
            environ |= {"GATE_OPEN": "1"} if opening else {}
        with self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=cwd,
                env=environ | dict(env or {}),
                # A process group of its own, to detect processes left behind.
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, name="cobatch-stdout", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self._changed:
                    self.stdout.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # Output

    def line(self, start: str) -> str:
        """Wait for the line on stdout with this start; return its rest."""

        (rest,) = self.lines(start, 1)
        return rest

    def lines(self, start: str, count: int) -> list[str]:
        """Wait for this many lines on stdout with this start; return their rests."""

        def rests() -> list[str]:
            return [line.removeprefix(start) for line in self.stdout if line.startswith(start)]

        with self._changed:
            self._changed.wait_for(lambda: len(rests()) >= count or self._ended, WAIT_S)
            lines = rests()
        text = f"{start!r} expected {count} times in {self.stdout}; stderr:\n{self.stderr}"
        assert len(lines) == count, text
        return lines

    @property
    def stderr(self) -> str:
        """Its stderr so far."""
        return self.stderr_path.read_text()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.line("cobatch: listening on http://127.0.0.1:"))

    def ready(self) -> Self:
        """Wait until all models are loaded."""
        self.line("cobatch: ready: ")
        return self

    # Control

    def connect(self) -> Connection:
        """Open a connection and wait until the server has answered on it."""
        connection = Connection(self.port)
        self._connections.append(connection)
        assert connection.get("/v2/health/live").status == 200
        return connection

    def held(self) -> None:
        """Wait until a run, or the opening of a model, is held at the gate."""
        data, self._held = self._gate.recvfrom(1)
        assert data == HELD, self.stderr

    def release(self) -> None:
        """Release the held run or opening."""
        self._gate.sendto(b"g", self._held)

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def not_ready(self, connection: Connection) -> None:
        """Poll over this connection until the server is not ready."""
        for _ in range(100_000):
            if connection.get("/v2/health/ready").status == 503:
                return
        raise AssertionError("still ready")

    def wait(self) -> int:
        """Wait for the exit; return the status. Checks that its process group is empty."""
        status = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 0)
            raise AssertionError("a process was left behind")
        return status

    def stop(self) -> int:
        """Send SIGTERM; wait for the exit and return its status."""
        self.signal()
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()
        self._gate.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(WAIT_S)
