"""Event loops of fronts and home on the cores of a machine, in virtual time.

An iteration of a loop takes all that has come, and has a core to itself until it is done. Its parts cost the
CPU time that was measured (`benchmarks.scaling.process_costs`). Fronts and home wait for further requests as
the real ones do, so sizes of datagrams and batches come out of the simulation. Cores are given first come,
first served. Times are microseconds.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from itertools import count
from typing import NamedTuple

from msgspec import Struct

_NETWORK_US = 100.0  # from an answer to the client's next request, on average
# An engine with cores of its own, or a GPU.
_BATCH_ROWS, _BATCH_US = 64, 20.0
_WAKE_US = 5.0  # of a process that slept: switches, and the interrupt of its core
_SETTLE_ITERATIONS = 6
_BUSY = 0.9  # part of the time: it limits the rate
_SEED = 17


class Costs(Struct, frozen=True, kw_only=True):
    """CPU time. A pair is a front's datagram and the one with its answers.

    `..._apart`: of each request in a real process where all share two cores: sockets, switches of threads,
    colder caches. `client`: of `wrk`. `at_once`: requests that an iteration takes at most; long ones come
    from the thread that decodes them, one by one.
    """

    one_request: float
    one_batch: float
    front_request: float
    front_pair: float
    home_request: float
    home_pair: float
    home_batch: float
    one_apart: float = 0.0
    front_apart: float = 0.0
    home_apart: float = 0.0
    client: float = 0.0
    at_once: int | None = None


# CPU time, and then an item for another process.
Part = tuple[float, "Process | Engine | None", object]
Parts = Generator[Part, None, None]
# A client's request or its answer, by the client's number; each client has one.
Requests = list[int]


class Machine:
    """Cores, and the processes that run on them, first come, first served. Times in microseconds."""

    def __init__(self, cores: int) -> None:
        self.now_us = 0.0
        self.busy_us: defaultdict[str, float] = defaultdict(float)
        self.answered = 0
        self.cores = self._free = cores
        self._woken: deque[tuple[Process, Parts]] = deque()
        self._ready: deque[tuple[Process, Parts]] = deque()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def later(self, after_us: float, act: Callable[[], None]) -> None:
        """Do something after a time."""
        heapq.heappush(self._events, (self.now_us + after_us, next(self._order), act))

    def run(self, requests: int) -> None:
        """Go on until this number of requests is answered."""
        while self.answered < requests:
            self.now_us, _, act = heapq.heappop(self._events)
            act()

    def wake(self, process: Process) -> None:
        """Run a process that slept as soon as a core is free, or a part of another iteration ends."""
        self._woken.append((process, process.iteration(_WAKE_US)))
        self._start()

    def _start(self) -> None:
        while self._free and (self._woken or self._ready):
            self._free -= 1
            self._go_on(*(self._woken or self._ready).popleft())

    def _go_on(self, process: Process, parts: Parts) -> None:
        part = next(parts, None)
        if part is None:
            self._free += 1
            if process.inbox:
                self._ready.append((process, process.iteration(0.0)))
            else:
                process.sleeps = True
            self._start()
            return
        us, other, item = part
        self.busy_us[process.name] += us

        def end() -> None:
            if other is not None:
                other.take(item)
            if self._woken:
                self._free += 1
                self._ready.append((process, parts))
                self._start()
            else:
                self._go_on(process, parts)

        self.later(us, end)


class Process:
    """An event loop. An iteration takes all that has come."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.name = name
        self.inbox: list[object] = []
        self.at_once: int | None = None  # items of an iteration
        self.sleeps = True

    def take(self, item: object) -> None:
        """Get an item from another process."""
        self.inbox.append(item)
        if self.sleeps:
            self.sleeps = False
            self.machine.wake(self)

    def items(self) -> list[object]:
        """Take the items of an iteration."""
        number = self.at_once or len(self.inbox)
        items, self.inbox = self.inbox[:number], self.inbox[number:]
        return items

    def iteration(self, wake_us: float) -> Parts:
        """Yield the parts of an iteration."""
        raise NotImplementedError


class Engine:
    """Runs batches, one after another, and gives them back."""

    name = "engine"

    def __init__(self, machine: Machine, row_us: float) -> None:
        self.machine = machine
        self.row_us = row_us
        self.free_us = 0.0
        self.home: Process

    def take(self, batch: object) -> None:
        """Run a batch."""
        assert isinstance(batch, Batch)
        took_us = _BATCH_US + len(batch.requests) * self.row_us
        self.machine.busy_us[self.name] += took_us
        self.free_us = max(self.free_us, self.machine.now_us) + took_us
        self.machine.later(self.free_us - self.machine.now_us, lambda: self.home.take(batch))


class Batch(NamedTuple):
    """Requests with their fronts, None where one process does all."""

    requests: list[tuple[Front | None, int]]


class Clients(Process):
    """Send the next request after an answer: `wrk`, on the same machine, or many beyond a network."""

    def __init__(self, machine: Machine, client_us: float | None) -> None:
        super().__init__(machine, "clients")
        self.client_us = client_us
        self.servers: list[Process] = []
        self.random = random.Random(_SEED)

    def begin(self, connections: int) -> None:
        """Send all first requests."""
        for client in range(connections):
            self.take(client)

    def take(self, item: object) -> None:
        self.machine.answered += 1
        if self.client_us is not None:
            super().take(item)
            return
        assert isinstance(item, int)
        server = self.servers[item % len(self.servers)]
        self.machine.later(_NETWORK_US * self.random.uniform(0.5, 1.5), lambda: server.take(item))

    def iteration(self, wake_us: float) -> Parts:
        yield wake_us, None, None
        for item in self.items():
            assert isinstance(item, int)
            assert self.client_us is not None
            yield self.client_us, self.servers[item % len(self.servers)], item


class Home(Process):
    """Forms batches of requests: all of them, or those that fronts send."""

    def __init__(self, machine: Machine, costs: Costs, engine: Engine, clients: Clients) -> None:
        super().__init__(machine, "home")
        self.costs, self.engine, self.clients = costs, engine, clients
        self.queue: list[tuple[Front | None, int]] = []
        self.running = self.iterations = self.batches = 0
        engine.home = self

    def iteration(self, wake_us: float) -> Parts:
        costs = self.costs
        request_us = (costs.home_request + costs.home_apart) / 2
        yield wake_us, None, None
        for item in self.items():
            match item:
                case int():
                    yield (costs.one_request + costs.one_apart) / 2, None, None
                    self.queue.append((None, item))
                case (Front() as front, list() as requests):
                    yield costs.home_pair / 2 + len(requests) * request_us, None, None
                    self.queue += [(front, request) for request in requests]
                case Batch():
                    self.running -= 1
                    yield from self.dispatch()  # the next one leaves first
                    yield from self.answer(item)
        self.iterations += 1
        if not self.inbox or self.at_once or self.iterations > _SETTLE_ITERATIONS:
            self.iterations = 0
            yield from self.dispatch()

    def dispatch(self) -> Parts:
        """Send batches to the engine: one while it is idle, a full one ahead."""
        while self.queue and (not self.running or (self.running == 1 and len(self.queue) >= _BATCH_ROWS)):
            batch, self.queue = Batch(self.queue[:_BATCH_ROWS]), self.queue[_BATCH_ROWS:]
            self.running += 1
            alone = batch.requests[0][0] is None
            self.batches += 1
            yield self.costs.one_batch if alone else self.costs.home_batch, self.engine, batch

    def answer(self, batch: Batch) -> Parts:
        """Answer clients, or send their rows to fronts."""
        costs = self.costs
        request_us = (costs.home_request + costs.home_apart) / 2
        by_front: dict[Front | None, Requests] = {}
        for front, request in batch.requests:
            by_front.setdefault(front, []).append(request)
        for front, requests in by_front.items():
            if front is not None:
                yield costs.home_pair / 2 + len(requests) * request_us, front, requests
                continue
            for request in requests:
                yield (costs.one_request + costs.one_apart) / 2, self.clients, request


class Front(Process):
    """Reads requests and sends them to home, in one datagram once no new ones come; writes answers."""

    def __init__(self, machine: Machine, name: str, costs: Costs, home: Home, clients: Clients) -> None:
        super().__init__(machine, name)
        self.costs, self.home, self.clients = costs, home, clients
        self.at_once = costs.at_once
        self.pending: Requests = []
        self.iterations = 0

    def iteration(self, wake_us: float) -> Parts:
        costs = self.costs
        request_us = (costs.front_request + costs.front_apart) / 2
        yield wake_us, None, None
        for item in self.items():
            if isinstance(item, int):
                yield request_us, None, None
                self.pending.append(item)
                continue
            assert isinstance(item, list)
            yield costs.front_pair / 2, None, None
            for request in item:
                yield request_us, self.clients, request
        self.iterations += 1
        more = not self.at_once and any(isinstance(item, int) for item in self.inbox)
        if self.pending and (not more or self.iterations > _SETTLE_ITERATIONS):
            requests, self.pending, self.iterations = self.pending, [], 0
            yield costs.front_pair / 2, self.home, (self, requests)


class Result(NamedTuple):
    """What a machine came to. CPU in microseconds per request; `busy`: the part of the time, by process."""

    per_s: float
    all_us: float
    home_us: float
    batch_rows: float
    busy: dict[str, float]

    @property
    def limit(self) -> str:
        """Name what limits the rate."""
        name = max(self.busy, key=lambda name: self.busy[name])
        return name.split()[0] if self.busy[name] > _BUSY else "clients"


def simulate(
    costs: Costs,
    cores: int,
    number: int,
    connections: int,
    row_us: float,
    requests: int,
    *,
    wrk: bool = False,
) -> Result:
    """Serve with this number of processes."""
    machine = Machine(cores)
    clients = Clients(machine, costs.client if wrk else None)
    home = Home(machine, costs, Engine(machine, row_us), clients)
    fronts = [Front(machine, f"front {index}", costs, home, clients) for index in range(number - 1)]
    if not fronts:
        home.at_once = costs.at_once
    clients.servers = list(fronts) or [home]
    clients.begin(connections)
    machine.run(requests + connections)
    busy_us = machine.busy_us
    servers_us = sum(us for name, us in busy_us.items() if name not in ("clients", "engine"))
    busy = {name: us / machine.now_us for name, us in busy_us.items() if name != "clients"}
    busy["cores"] = (servers_us + busy_us["clients"]) / machine.now_us / cores
    return Result(
        requests / machine.now_us * 1e6,
        servers_us / requests,
        busy_us["home"] / requests,
        requests / home.batches,
        busy,
    )
