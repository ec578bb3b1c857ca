"""`cobatch serve` as a process of its own, by its real console script, and connections to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.models.gate import HELD
from tests.support.paths import ROOT

COBATCH = Path(sys.executable).with_name("cobatch")
# Only bounds a test that would otherwise hang; the server's own longest wait by default is 30 s.
WAIT_S = 60.0


class Answer:
    """A response, read to its end."""

    def __init__(self, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def rows(self) -> Any:
        """The one output of an infer answer, nested as its shape says."""
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
        """GET and its answer."""
        self._http.request("GET", path)
        return self.answer()

    def send_infer(self, model: str, rows: list[list[Any]], datatype: str = "FP32") -> None:
        """Write an infer request for a model with one input `x`."""
        self._http.request("POST", f"/v2/models/{model}/infer", _body(rows, datatype))

    def send_half(self, model: str, rows: list[list[Any]]) -> bytes:
        """Write an infer request's headers and the first half of its body; the other half."""
        body = _body(rows, "FP32")
        self._http.putrequest("POST", f"/v2/models/{model}/infer")
        self._http.putheader("Content-Length", str(len(body)))
        self._http.endheaders(body[: len(body) // 2])
        return body[len(body) // 2 :]

    def send_rest(self, body: bytes) -> None:
        """Write what `send_half` left."""
        self._http.send(body)

    def answer(self) -> Answer:
        """Read the answer to what was sent."""
        return Answer(self._http.getresponse())

    def infer(self, model: str, rows: list[list[Any]], datatype: str = "FP32") -> Answer:
        """An infer request and its answer."""
        self.send_infer(model, rows, datatype)
        return self.answer()

    def close(self) -> None:
        """Leave."""
        self._http.close()


def _body(rows: list[list[Any]], datatype: str) -> bytes:
    x = {"name": "x", "datatype": datatype, "shape": [len(rows), len(rows[0])], "data": rows}
    return json.dumps({"inputs": [x]}).encode()


class Cobatch:
    """A running `cobatch serve`. As a context manager it leaves no process behind.

    `gate`: run under `tests.support.models.gate`; `opening`: hold models at their opening too. `folder` is
    where the process's files go. The environment is this process's without COBATCH_* and with `env`.
    """

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
        self._said = threading.Condition()
        self._ended = False
        self._gate, theirs = socket.socketpair()
        self._gate.settimeout(WAIT_S)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("COBATCH_")}
        environ |= {"PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
        if gate:
            site = folder / "site"
            site.mkdir()
            (site / "sitecustomize.py").write_text(
                "import tests.support.models.gate\n\ntests.support.models.gate.install()\n"
            )
            environ |= {"PYTHONPATH": f"{site}:{ROOT}", "GATE_FD": str(theirs.fileno())}
            environ |= {"GATE_OPEN": "1"} if opening else {}
        with self.stderr_path.open("wb") as stderr, theirs:
            self.process = subprocess.Popen(
                [*command, "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=cwd,
                env=environ | dict(env or {}),
                pass_fds=[theirs.fileno()],
                # A process group of its own, so that what it leaves behind can be seen.
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, name="cobatch-stdout", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self._said:
                    self.stdout.append(line.rstrip("\n"))
                    self._said.notify_all()
        with self._said:
            self._ended = True
            self._said.notify_all()

    # What it says

    def line(self, start: str) -> str:
        """The rest of the line on stdout that starts so, waited for."""

        def said() -> list[str]:
            return [line.removeprefix(start) for line in self.stdout if line.startswith(start)]

        with self._said:
            self._said.wait_for(lambda: said() or self._ended, WAIT_S)
            lines = said()
        assert len(lines) == 1, f"{start!r} expected once in {self.stdout}; stderr:\n{self.stderr}"
        return lines[0]

    @property
    def stderr(self) -> str:
        """What it wrote to stderr so far."""
        return self.stderr_path.read_text()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.line("cobatch: listening on http://127.0.0.1:"))

    def ready(self) -> Self:
        """Wait until all models are loaded."""
        self.line("cobatch: ready: ")
        return self

    # What it is told

    def connect(self) -> Connection:
        """A connection that the server has accepted and answered on."""
        connection = Connection(self.port)
        self._connections.append(connection)
        assert connection.get("/v2/health/live").status == 200
        return connection

    def held(self) -> None:
        """Wait until a run, or an opening, stands at the gate."""
        assert self._gate.recv(1) == HELD, self.stderr

    def release(self) -> None:
        """Let it go on."""
        self._gate.sendall(b"g")

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def not_ready(self, connection: Connection) -> None:
        """Ask over this connection until the server says that it is not ready."""
        for _ in range(100_000):
            if connection.get("/v2/health/ready").status == 503:
                return
        raise AssertionError("still ready")

    def wait(self) -> int:
        """Wait for the end; the exit status. Nothing of its process group is left then."""
        status = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 0)
            raise AssertionError("a process was left behind")
        return status

    def stop(self) -> int:
        """SIGTERM and the end."""
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
