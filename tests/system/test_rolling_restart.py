"""A rolling restart under load, without retries: behind a balancer of this file, and behind haproxy.

`python -m benchmarks.rolling_restart` is a hundred times as long.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from typing import Self

import pytest

from benchmarks import rolling_restart
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import DEADLINE_S, Served, gate, gated, get

_REQUESTS = 3000
_CLIENTS = 8


class Balancer:
    """Tells clients which server to connect to: the ready ones in turn, by their health check."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ready: list[Served] = []
        self._turn = itertools.count()

    def pick(self) -> Served:
        with self._changed:
            assert self._changed.wait_for(lambda: self._ready, DEADLINE_S)
            return self._ready[next(self._turn) % len(self._ready)]

    def check(self, server: Served) -> None:
        """Ask a server whether it is ready, and remember its answer."""
        ready = server.ask(get("/v2/health/ready")).status == 200
        with self._changed:
            self._ready = [one for one in self._ready if one is not server] + [server] * ready
            self._changed.notify_all()


class Load:
    """Clients that each send one request after the other, and connect again where the server closes."""

    def __init__(self, balancer: Balancer) -> None:
        self.statuses: Counter[int] = Counter()
        self.errors: list[Exception] = []
        self.stop = threading.Event()
        self._balancer = balancer
        self._threads = [threading.Thread(target=self._run) for _ in range(_CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def _run(self) -> None:
        try:
            while not self.stop.is_set():
                with self._balancer.pick().connect() as client:
                    closed = False
                    while not closed and not self.stop.is_set():
                        answer = client.ask(gate(1))
                        self.statuses[answer.status] += 1
                        closed = answer.headers.get("connection") == "close"
        except Exception as error:  # noqa: BLE001 - whatever it is, a request has failed
            self.errors.append(error)

    def wait_for(self, more: int) -> None:
        """Wait for more answers."""
        end = self.statuses.total() + more
        while self.statuses.total() < end and not self.errors:
            pass


def leave(server: Served, balancer: Balancer) -> None:
    """Restart as an operator does, with a delay of 1000 s whose events come when the test says so."""
    server.stop()
    balancer.check(server)
    for ahead_s in (0, 600):
        server.call(lambda ahead_s=ahead_s: server.server._leave(time.monotonic() + ahead_s))  # type: ignore[misc]
    # Every client has been told by the last response on its connection.
    while server.call(server.connections):
        pass
    server.stop()
    server.join()
    assert server.server.status == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", WAYS)
def test_no_request_fails(path: str) -> None:
    balancer = Balancer()
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(gated(**way(path), drain_delay_s=1000))[0] for _ in range(2)]
        for server in servers:
            balancer.check(server)
        with Load(balancer) as load:
            for _ in range(4):
                load.wait_for(_REQUESTS // 8)
                leave(servers.pop(0), balancer)
                servers.append(stack.enter_context(gated(**way(path), drain_delay_s=1000))[0])
                balancer.check(servers[-1])
            load.wait_for(_REQUESTS // 2)
    assert load.errors == []
    assert load.statuses.keys() == {200}
    assert load.statuses.total() >= _REQUESTS


@pytest.mark.slow
@pytest.mark.parametrize("name", rolling_restart.BALANCERS)
def test_no_request_fails_behind_a_proxy(name: str) -> None:
    balancer = rolling_restart.BALANCERS[name]
    if not balancer.proxy.installed:
        pytest.skip(f"{name} is not installed")
    counts, restarts = rolling_restart.run(balancer, _REQUESTS, _CLIENTS, drain_delay_s=0.6)
    assert counts == {"200": _REQUESTS}
    assert restarts > 0
