"""The loops of `cobatch bench` against misbehaving servers: each request is recorded exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic
from typing import Any

import numpy as np
import pytest

from cobatch.batcher.simulator.traffic import Constant
from cobatch.server.loadtest.driver import Driver
from cobatch.server.loadtest.generator import ClosedLoop, OpenLoop
from cobatch.server.loadtest.messages import (
    COLUMNS,
    Address,
    Done,
    Expected,
    NewKind,
    Plan,
    PreparedRequest,
    Samples,
    Trial,
)
from cobatch.server.loadtest.options import Caller
from cobatch.server.loadtest.results import notes
from cobatch.server.loadtest.statistics import Tally

REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"
BODY = b'{"outputs":[{"name":"y","datatype":"INT64","shape":[1,1],"data":[1]}]}'
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)

Serve = Callable[[int], Awaitable[bytes | None]]


class Server:
    """Answers the n-th request with the bytes of `serve(n)`; None closes the connection."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.requests = 0
        self.last = 0  # number of the request at which `on_last` is called
        self.on_last: Callable[[], None] = lambda: None
        self.port = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        # Cancellation ends like a client that left: asyncio's streams log exceptions of a handler.
        ends = (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError)
        with contextlib.closing(writer), contextlib.suppress(*ends):
            while True:
                await reader.readexactly(len(REQUEST))
                self.requests += 1
                if self.requests == self.last:
                    self.on_last()
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


class Recorder:
    """Receives a driver's messages, and tallies them."""

    def __init__(self, trial: Trial) -> None:
        self.tally = Tally(trial, [None])
        self.rows: list[np.ndarray[Any, Any]] = []
        self.messages: dict[str, str] = {}
        self.done: Done | None = None

    def __call__(self, message: object) -> None:
        self.tally.take(0, message)
        match message:
            case Samples(data):
                self.rows.append(np.frombuffer(data).reshape(-1, len(COLUMNS)))
            case NewKind(_, name, message):
                self.messages[name] = message
            case Done():
                self.done = message

    def column(self, name: str) -> list[float]:
        number = COLUMNS.index(name)
        return [row[number] for rows in self.rows for row in rows.tolist()]

    @property
    def errors(self) -> Counter[str]:
        return self.tally.callers[0].errors


def planned(port: int, expected: Expected | None = None, timeout_s: float = 30.0) -> Plan:
    request = PreparedRequest(REQUEST, 0, 0)
    address = Address("127.0.0.1", port)
    return Plan(address, {(0, 1): [request]}, [Caller()], expected, timeout_s)


async def drive(driver: Driver, recorder: Recorder) -> None:
    await driver.prepare()
    start_s = monotonic()
    recorder.tally.begin(start_s)
    await driver.run(start_s)
    assert recorder.done is not None
    # Let closed connections end within the test.
    while driver._connections:  # noqa: ASYNC110 - no event to wait for
        await asyncio.sleep(0)


async def run_open(
    plan: Plan, rate: float, seconds: float, connections: int, warmup_s: float = 0.0
) -> Recorder:
    trial = Trial(Constant(rate), connections, seconds, warmup_s)
    recorder = Recorder(trial)
    await drive(OpenLoop(plan, trial, connections, recorder, 0, 1), recorder)
    return recorder


async def run_closed(server: Server, plan: Plan, connections: int, requests: int) -> Recorder:
    """Run until the server has received this many requests, which does not depend on the machine's speed."""
    trial = Trial(None, connections, 1e6)
    recorder = Recorder(trial)
    driver = ClosedLoop(plan, trial, connections, recorder, 0)
    server.requests, server.last = 0, requests
    server.on_last = lambda: setattr(driver, "_end_s", 0.0)
    await drive(driver, recorder)
    return recorder


async def test_a_stall_delays_every_request_due_in_it() -> None:
    """The server answers only after 40 requests have arrived, which only an open loop reaches."""
    all_here = asyncio.Event()

    async def serve(number: int) -> bytes:
        if number == 40:
            all_here.set()
        await all_here.wait()
        return GOOD

    async with serving(serve) as server:
        recorder = await run_open(planned(server.port), 500.0, 0.1, 64)
    due, sent, done = recorder.column("due"), recorder.column("sent"), recorder.column("done")
    assert len(due) == 49
    assert sorted(due) == pytest.approx([recorder.tally._start_s + n / 500 for n in range(1, 50)], abs=1e-6)
    # Requests before the 40th waited at least until it was due.
    moment = sorted(due)[39]
    early = [(one_due, one_done) for one_due, one_done in zip(due, done, strict=True) if one_due < moment]
    assert all(one_done >= moment for _, one_done in early)
    assert recorder.tally.total.latency.max_us >= 39 / 500 * 1e6
    assert recorder.tally.total.latency.quantile_us(0.5) >= 13 / 500 * 1e6
    assert all(one_sent >= one_due for one_due, one_sent in zip(due, sent, strict=True))


async def test_waiting_for_a_connection_is_part_of_the_latency() -> None:
    """Two connections, and a server that answers only after five more requests are due."""
    driver: OpenLoop

    async def serve(number: int) -> bytes:
        while number <= 2 and len(driver._waiting) < 5:  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0)
        return GOOD

    async with serving(serve) as server:
        trial = Trial(Constant(200.0), 2, 0.1)
        recorder = Recorder(trial)
        driver = OpenLoop(planned(server.port), trial, 2, recorder, 0, 1)
        await drive(driver, recorder)
    assert recorder.tally.callers[0].due == 19
    assert recorder.tally.waited >= 4
    assert recorder.done is not None
    assert recorder.done.connections == 2
    assert not recorder.errors
    # The seventh was due 25 ms after the second, before any answer.
    assert recorder.tally.total.latency.max_us >= 25_000
    assert any("waited for a connection" in note for note in notes(recorder.tally, local=False))


async def test_a_closed_loop_has_one_request_per_connection() -> None:
    in_flight, most, all_here = 0, 0, asyncio.Event()

    async def serve(number: int) -> bytes:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        if number == 5:
            all_here.set()
        await all_here.wait()
        await asyncio.sleep(0)
        in_flight -= 1
        return GOOD

    async with serving(serve) as server:
        recorder = await run_closed(server, planned(server.port), 5, 100)
    assert most == 5
    assert recorder.tally.callers[0].due == server.requests == recorder.tally.callers[0].latency.count
    assert recorder.column("due") == recorder.column("taken")


async def test_each_kind_of_failure_is_counted_once() -> None:
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
        for closed in (True, False):
            server.requests = 0
            plan = planned(server.port, expected)
            if closed:
                recorder = await run_closed(server, plan, 3, 60)
            else:
                recorder = await run_open(plan, 300.0, 0.2, 3)
            assert recorder.tally.callers[0].due == server.requests >= 20
            assert set(recorder.errors) == {
                "status 429", "connection closed", "malformed answer", "wrong answer"
            }  # fmt: skip
            assert recorder.messages["status 429"] == "full"
            assert recorder.messages["wrong answer"] == "output 'y' differs from the expected values"
            assert sum(recorder.errors.values()) + recorder.tally.callers[0].latency.count == server.requests


async def test_a_missing_answer_times_out() -> None:
    async def serve(number: int) -> bytes:
        if number % 3 == 0:
            await asyncio.Event().wait()
        return GOOD

    async with serving(serve) as server:
        plan = planned(server.port, timeout_s=0.2)
        # In the open loop each of the nine requests has a connection, so none waits for one.
        for recorder in (await run_closed(server, plan, 3, 5), await run_open(plan, 100.0, 0.1, 9)):
            assert set(recorder.errors) == {"no answer in time"}
            assert recorder.tally.callers[0].latency.count > 0


async def test_waiting_for_a_connection_times_out() -> None:
    async def serve(number: int) -> bytes:
        return await asyncio.Event().wait() and GOOD

    async with serving(serve) as server:
        recorder = await run_open(planned(server.port, timeout_s=0.05), 100.0, 0.1, 1)
    assert set(recorder.errors) == {"no answer in time", "no connection was free in time"}
    assert sum(recorder.errors.values()) == recorder.tally.callers[0].due == 9


async def test_a_stopped_server_fails_each_request() -> None:
    async with serving(lambda _: asyncio.sleep(0, GOOD)) as server:
        trial = Trial(Constant(200.0), 4, 0.1)
        recorder = Recorder(trial)
        driver = OpenLoop(planned(server.port), trial, 4, recorder, 0, 1)
        await driver.prepare()
    start_s = monotonic()
    recorder.tally.begin(start_s)
    await driver.run(start_s)
    assert sum(recorder.errors.values()) == 19
    assert "cannot connect" in recorder.errors
    with pytest.raises(OSError, match=r"\d"):
        await run_closed(server, planned(server.port), 1, 1)


async def test_requests_due_in_the_warm_up_are_not_counted() -> None:
    async with serving(lambda _: asyncio.sleep(0, GOOD)) as server:
        recorder = await run_open(planned(server.port), 200.0, 0.1, 4, warmup_s=0.1025)
    assert len(recorder.column("due")) == 40
    assert recorder.tally.callers[0].due == 20
    assert sum(recorder.tally.intervals[number].due for number in range(3)) == 40


async def test_a_stopped_closed_loop_reports_its_requests_in_flight() -> None:
    async with serving(lambda _: asyncio.Event().wait()) as server:  # type: ignore[arg-type,return-value]
        trial = Trial(None, 2, 1e6)
        recorder = Recorder(trial)
        driver = ClosedLoop(planned(server.port), trial, 2, recorder, 0)
        await driver.prepare()
        asyncio.get_running_loop().call_later(0.02, driver.stop)
        await driver.run(monotonic())
    assert recorder.done is not None
    # Missing answers are counted, or Ctrl-C would hide a stall.
    assert recorder.errors == {"stopped before its answer": 2}
    message = recorder.messages["stopped before its answer"]
    assert re.fullmatch(r"the first had waited for \d+\.\d{3} s", message)


async def test_a_stopped_open_loop_reports_its_waiting_requests() -> None:
    async with serving(lambda _: asyncio.Event().wait()) as server:  # type: ignore[arg-type,return-value]
        trial = Trial(Constant(500.0), 1, 1e6)
        recorder = Recorder(trial)
        driver = OpenLoop(planned(server.port), trial, 1, recorder, 0, 1)
        await driver.prepare()
        recorder.tally.begin(monotonic())
        running = asyncio.ensure_future(driver.run(recorder.tally._start_s))
        while len(driver._waiting) < 4:  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0)
        driver.stop()
        await running
    assert recorder.errors["stopped before its answer"] == 1
    assert recorder.errors["stopped before it was sent"] >= 4


async def test_the_generators_own_work_is_not_in_the_latency() -> None:
    """In a closed loop a request is due when it is sent, not when the last answer came."""
    async with serving(lambda _: asyncio.sleep(0, GOOD)) as server:
        recorder = await run_closed(server, planned(server.port), 1, 20)
    assert recorder.column("due") == recorder.column("sent")
    done = recorder.column("done")
    assert all(sent > before for sent, before in zip(recorder.column("sent")[1:], done, strict=False))
