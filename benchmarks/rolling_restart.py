"""Restarts two servers in turn, under load, behind haproxy, which never retries: no request may fail.

`python -m benchmarks.rolling_restart [--requests N] [--drain-delay-s S]` needs haproxy. It prints the number
of requests by outcome and of restarts, and exits with 1 if a request failed.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.processes import ROOT, StartError, free_ports

_PATH = "/v2/models/tiny/infer"
_TIMEOUT_S = 60.0
_POLL_S = 0.02
# As in docs/operations.md, with shorter times.
_HAPROXY = """
global
    maxconn 4096
defaults
    mode http
    retries 0
    timeout connect 5s
    timeout check 5s
    timeout client 60s
    timeout server 60s
frontend infer
    bind 127.0.0.1:{front}
    default_backend servers
frontend state
    bind 127.0.0.1:{state}
    stats enable
    stats uri /
backend servers
    balance roundrobin
    option httpchk GET /v2/health/ready
    default-server check inter 100ms fall 2 rise 2
{servers}
"""


class Process:
    """A `cobatch serve` that can be started again at the same port."""

    def __init__(self, port: int, drain_delay_s: float, folder: Path) -> None:
        flags = ["--port", str(port), "--drain-delay-s", str(drain_delay_s), "--keep-alive-s", "75"]
        self._command = [sys.executable, "-m", "cobatch", "serve", str(model_path("tiny")), *flags]
        self._log = folder / f"{port}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=log, stderr=log)

    def stop(self) -> None:
        """Send SIGTERM and wait for the end. Raises StartError for another exit status than 0."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(_TIMEOUT_S)
        if status != 0:
            raise StartError(f"a server ended with {status}: {self._log.read_text()[-2000:]}")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def _haproxy(folder: Path, front: int, state: int, servers: list[Process]) -> Iterator[None]:
    lines = "\n".join(f"    server s{one.port} 127.0.0.1:{one.port}" for one in servers)
    config = folder / "haproxy.cfg"
    config.write_text(_HAPROXY.format(front=front, state=state, servers=lines))
    with subprocess.Popen(["haproxy", "-q", "-db", "-f", str(config)]) as process:
        try:
            yield
        finally:
            process.terminate()


def wait_until_up(state: int, server: Process) -> None:
    """Wait until haproxy sends requests to the server. Raises StartError."""
    give_up_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < give_up_s:
        _, page = wire.get(f"127.0.0.1:{state}", "/;csv")
        if any(f"s{server.port}," in line and ",UP," in line for line in page.decode().splitlines()):
            return
        time.sleep(_POLL_S)
    raise StartError(f"haproxy does not reach port {server.port}")


class Load:
    """Closed-loop clients on keep-alive connections, until `requests` are answered; outcomes in `counts`."""

    def __init__(self, port: int, requests: int) -> None:
        self.counts: Counter[str] = Counter()
        self._port = port
        self._left = requests
        message = wire.encode("tiny", wire.rows_of("tiny", 1, 0), binary=False)
        self._request = wire.raw_request(message, f"127.0.0.1:{port}", _PATH)

    @property
    def done(self) -> bool:
        return self._left <= 0

    async def run(self, clients: int) -> None:
        await asyncio.gather(*[self._client() for _ in range(clients)])

    async def _client(self) -> None:
        while not self.done:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError as error:
                self._left -= 1
                self.counts[type(error).__name__] += 1
                continue
            with contextlib.closing(writer):
                while not self.done and await self._ask(reader, writer):
                    pass

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Send a request; return True if the connection can be used again."""
        self._left -= 1
        try:
            writer.write(self._request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            await reader.readexactly(int(head.partition("content-length: ")[2].split("\r\n", 1)[0]))
        except (OSError, EOFError, ValueError) as error:
            self.counts[type(error).__name__] += 1
            return False
        self.counts[head.split(" ", 2)[1]] += 1
        return "connection: close" not in head


def restart_in_turn(servers: list[Process], state: int, load: Load) -> int:
    """Restart one server after the other until the load is done; return how often."""
    restarts = 0
    while not load.done:
        server = servers[restarts % len(servers)]
        server.stop()
        server.start()
        wait_until_up(state, server)
        restarts += 1
    return restarts


def run(requests: int, clients: int, drain_delay_s: float) -> tuple[Counter[str], int]:
    """Return the outcomes of the requests and the number of restarts."""
    front, state, *ports = free_ports(4)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [Process(port, drain_delay_s, folder) for port in ports]
        for server in servers:
            stack.callback(server.kill)
            server.start()
        stack.enter_context(_haproxy(folder, front, state, servers))
        for server in servers:
            wait_until_up(state, server)
        load = Load(front, requests)

        async def both() -> int:
            restarting = asyncio.create_task(asyncio.to_thread(restart_in_turn, servers, state, load))
            await load.run(clients)
            return await restarting

        return load.counts, asyncio.run(both())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--drain-delay-s", type=float, default=1.0)
    options = parser.parse_args()
    if shutil.which("haproxy") is None:
        print("haproxy is not installed", file=sys.stderr)
        return 2
    for name in [name for name in os.environ if name.startswith("COBATCH_")]:
        del os.environ[name]
    counts, restarts = run(options.requests, options.clients, options.drain_delay_s)
    outcomes = ", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items()))
    failed = counts.total() - counts["200"]
    print(f"{counts.total():,} requests, {restarts} restarts, {failed:,} failed ({outcomes})")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
