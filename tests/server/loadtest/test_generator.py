"""The loops of `cobatch bench` against servers that misbehave: every request is accounted for."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic
from typing import Any

import numpy as np
import pytest

from cobatch.batcher.simulator.traffic import Even
from cobatch.server.loadtest.drivers import Driver
from cobatch.server.loadtest.generator import ClosedLoop, OpenLoop
from cobatch.server.loadtest.messages import (
    COLUMNS,
    Address,
    Done,
    Expected,
    NewKind,
    Plan,
    Prepared,
    Samples,
    Trial,
)
from cobatch.server.loadtest.tally import Tally
from cobatch.server.loadtest.verdict import limits, notes

REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"
BODY = b'{"outputs":[{"name":"y","datatype":"INT64","shape":[1,1],"data":[1]}]}'
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)

Serve = Callable[[int], Awaitable[bytes | None]]


class Server:
    """Answers the n-th request with what `serve(n)` says; None closes the connection."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.requests = 0
        self.port = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        # A cancelled one ends as if its client had left: asyncio's streams log what is raised.
        ends = (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError)
        with contextlib.closing(writer), contextlib.suppress(*ends):
            while True:
                await reader.readexactly(len(REQUEST))
                self.requests += 1
                answer = await self.serve(self.requests)
                if answer is None:
                    return
                writer.write(answer)


@contextlib.asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[Server]:
    server = Server(serve)
    listening = await asyncio.start_server(server.talk, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        for task in server.tasks:
            task.cancel()
        await asyncio.gather(*server.tasks)


class Told:
    """What a driver tells, and its tally."""

    def __init__(self, trial: Trial) -> None:
        self.tally = Tally(trial, [None])
        self.rows: list[np.ndarray[Any, Any]] = []
        self.said: dict[str, str] = {}
        self.done: Done | None = None

    def __call__(self, message: object) -> None:
        self.tally.take(0, message)
        match message:
            case Samples(data):
                self.rows.append(np.frombuffer(data).reshape(-1, len(COLUMNS)))
            case NewKind(_, name, said):
                self.said[name] = said
            case Done():
                self.done = message

    def column(self, name: str) -> list[float]:
        number = COLUMNS.index(name)
        return [row[number] for rows in self.rows for row in rows.tolist()]

    @property
    def errors(self) -> Counter[str]:
        return self.tally.callers[0].errors


def planned(port: int, expected: Expected | None = None, timeout_s: float = 30.0) -> Plan:
    request = Prepared(REQUEST, 0, 0)
    address = Address("127.0.0.1", port)
    return Plan(address, {(0, 1): [request]}, ["all"], [1.0], [1], expected, timeout_s)


async def drive(driver: Driver, told: Told) -> None:
    await driver.prepare()
    start_s = monotonic()
    told.tally.begin(start_s)
    await driver.run(start_s)
    assert told.done is not None
    # Let closed connections end within the test.
    while driver._connections:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0)


async def run(
    plan: Plan, rate: float | None, seconds: float, connections: int, warmup_s: float = 0.0
) -> Told:
    trial = Trial(None if rate is None else Even(rate), connections, seconds, warmup_s)
    told = Told(trial)
    driver = (
        ClosedLoop(plan, trial, connections, told, 0)
        if rate is None
        else OpenLoop(plan, trial, connections, told, 0, 1)
    )
    await drive(driver, told)
    return told


async def test_a_stalled_server_is_charged_for_all_who_would_have_asked() -> None:
    """The server answers nobody before the 40th request is there: only an open loop gets there at all."""
    all_here = asyncio.Event()

    async def serve(number: int) -> bytes:
        if number == 40:
            all_here.set()
        await all_here.wait()
        return GOOD

    async with serving(serve) as server:
        told = await run(planned(server.port), 500.0, 0.1, 64)
    due, sent, done = told.column("due"), told.column("sent"), told.column("done")
    assert len(due) == 49
    assert sorted(due) == pytest.approx([told.tally._start_s + n / 500 for n in range(1, 50)], abs=1e-6)
    # Whoever came before the 40th waited at least until that one was due.
    moment = sorted(due)[39]
    early = [(one_due, one_done) for one_due, one_done in zip(due, done, strict=True) if one_due < moment]
    assert all(one_done >= moment for _, one_done in early)
    assert told.tally.total.latency.most_us >= 39 / 500 * 1e6
    assert told.tally.total.latency.quantile_us(0.5) >= 13 / 500 * 1e6
    assert all(one_sent >= one_due for one_due, one_sent in zip(due, sent, strict=True))


async def test_who_waits_for_a_connection_waits_on_the_servers_account() -> None:
    """Two connections, and a server that does not answer before five more are due."""
    driver: OpenLoop

    async def serve(number: int) -> bytes:
        while number <= 2 and len(driver._waiting) < 5:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
        return GOOD

    async with serving(serve) as server:
        trial = Trial(Even(200.0), 2, 0.1)
        told = Told(trial)
        driver = OpenLoop(planned(server.port), trial, 2, told, 0, 1)
        await drive(driver, told)
    assert told.tally.callers[0].due == 19
    assert told.tally.waited >= 4
    assert told.done is not None
    assert told.done.connections == 2
    assert not told.errors
    # The seventh was due 25 ms after the second, and by then nobody was answered.
    assert told.tally.total.latency.most_us >= 25_000
    assert any("waited for a connection" in note for note in notes(told.tally, local=False))


async def test_a_closed_loop_has_one_request_on_each_connection() -> None:
    under_way, most = 0, 0

    async def serve(number: int) -> bytes:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return GOOD

    async with serving(serve) as server:
        told = await run(planned(server.port), None, 0.15, 5)
    assert most == 5
    assert told.tally.callers[0].due == server.requests == told.tally.callers[0].latency.count
    assert told.column("due") == told.column("taken")


async def test_every_kind_of_failure_is_counted_once() -> None:
    other = BODY.replace(b"[1]}]", b"[2]}]")
    answers = [
        GOOD,
        b"HTTP/1.1 429 No\r\nContent-Length: 16\r\n\r\n" + b'{"error":"full"}',
        None,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\nConnection: close\r\n\r\n{}",
        b"hello\r\n\r\nhello\r\n\r\n",
        GOOD.replace(BODY, other),
        GOOD.replace(b"\r\n", b"\r\nConnection: close\r\n", 1),
    ]

    async def serve(number: int) -> bytes | None:
        answer = answers[number % len(answers)]
        if answer is not None and b"99" in answer:
            raise ConnectionError
        return answer

    expected = Expected([{"y": np.array([[1]])}])
    async with serving(serve) as server:
        for rate in (None, 300.0):
            server.requests = 0
            told = await run(planned(server.port, expected), rate, 0.2, 3)
            assert told.tally.callers[0].due == server.requests >= 20
            assert set(told.errors) == {
                "status 429", "connection closed", "malformed answer", "wrong answer"
            }  # fmt: skip
            assert told.said["status 429"] == "full"
            assert told.said["wrong answer"] == "output 'y' is not what is expected"
            assert sum(told.errors.values()) + told.tally.callers[0].latency.count == server.requests


async def test_an_answer_that_never_comes_is_given_up() -> None:
    async def serve(number: int) -> bytes:
        if number % 3 == 0:
            await asyncio.Event().wait()
        return GOOD

    async with serving(serve) as server:
        for rate in (None, 100.0):
            told = await run(planned(server.port, timeout_s=0.05), rate, 0.1, 3)
            assert set(told.errors) == {"no answer in time"}
            assert told.tally.callers[0].latency.count > 0


async def test_what_waits_too_long_for_a_connection_is_given_up() -> None:
    async def serve(number: int) -> bytes:
        return await asyncio.Event().wait() and GOOD

    async with serving(serve) as server:
        told = await run(planned(server.port, timeout_s=0.05), 100.0, 0.1, 1)
    assert set(told.errors) == {"no answer in time", "no connection was free in time"}
    assert sum(told.errors.values()) == told.tally.callers[0].due == 9


async def test_a_server_that_is_gone_is_an_error_for_each_request() -> None:
    async with serving(lambda _: asyncio.sleep(0, GOOD)) as server:
        trial = Trial(Even(200.0), 4, 0.1)
        told = Told(trial)
        driver = OpenLoop(planned(server.port), trial, 4, told, 0, 1)
        await driver.prepare()
    start_s = monotonic()
    told.tally.begin(start_s)
    await driver.run(start_s)
    assert sum(told.errors.values()) == 19
    assert "cannot connect" in told.errors
    with pytest.raises(OSError, match=r"\d"):
        await run(planned(server.port), None, 0.1, 1)


async def test_what_is_due_in_the_warm_up_is_not_counted() -> None:
    async with serving(lambda _: asyncio.sleep(0, GOOD)) as server:
        told = await run(planned(server.port), 200.0, 0.1, 4, warmup_s=0.1025)
    assert len(told.column("due")) == 40
    assert told.tally.callers[0].due == 20
    assert told.tally.intervals.sum(range(3)).due == 40


async def test_a_run_can_be_stopped() -> None:
    async with serving(lambda _: asyncio.Event().wait()) as server:  # type: ignore[arg-type,return-value]
        trial = Trial(None, 2, 1e6)
        told = Told(trial)
        driver = ClosedLoop(planned(server.port), trial, 2, told, 0)
        await driver.prepare()
        asyncio.get_running_loop().call_later(0.02, driver.stop)
        await driver.run(monotonic())
    assert told.done is not None
    # What the server owed is counted, or a stall would be hidden from whoever presses Ctrl-C.
    assert told.errors == {"stopped before its answer": 2}
    assert told.said["stopped before its answer"].startswith("the first had waited for 0.0")


async def test_what_waits_when_a_run_is_stopped_is_counted() -> None:
    async with serving(lambda _: asyncio.Event().wait()) as server:  # type: ignore[arg-type,return-value]
        trial = Trial(Even(500.0), 1, 1e6)
        told = Told(trial)
        driver = OpenLoop(planned(server.port), trial, 1, told, 0, 1)
        await driver.prepare()
        told.tally.begin(monotonic())
        running = asyncio.ensure_future(driver.run(told.tally._start_s))
        while len(driver._waiting) < 4:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
        driver.stop()
        await running
    assert told.errors["stopped before its answer"] == 1
    assert told.errors["stopped before it was sent"] >= 4


async def test_what_we_do_between_two_requests_is_none_of_the_servers() -> None:
    """In a closed loop a request is due when it is sent, not when the last answer came."""
    async with serving(lambda _: asyncio.sleep(0, GOOD)) as server:
        told = await run(planned(server.port), None, 0.05, 1)
    assert told.column("due") == told.column("sent")
    done = told.column("done")
    assert all(sent > before for sent, before in zip(told.column("sent")[1:], done, strict=False))


def test_a_generator_that_is_late_or_busy_says_so() -> None:
    tally = Tally(Trial(Even(1.0), 1, 1.0), [None])
    tally.callers[0].latency.add(np.array([20_000.0] * 200))
    tally.late.add(np.array([100.0] * 200))
    tally.done[0] = Done(0.5, 1.0, 1)
    assert limits(tally) == []
    tally.late.add(np.array([3000.0] * 9))
    assert limits(tally) == []  # nine of 209 that the machine woke late are no evidence
    tally.late.add(np.array([3000.0] * 11))
    (late,) = limits(tally)
    assert "it did not keep up" in late
    tally.done[0] = Done(0.2, 1.0, 1)
    (late,) = limits(tally)
    assert "the machine did not let it run in time (it used 20% of a core)" in late
    tally.done[1] = Done(0.95, 1.0, 1)
    late_and_busy = limits(tally)
    assert "95% of a core" in late_and_busy[0]
    assert "3.0" in late_and_busy[1]
    tally.machine_busy = 1.0
    assert any("all cores" in note for note in notes(tally, local=True))
    assert not any("all cores" in note for note in notes(tally, local=False))
