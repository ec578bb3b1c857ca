"""Closed loops: the servers take turns in each round, with the same number of connections.

All servers of a model are started beforehand and stopped (SIGSTOP) between their turns, so that idle ones use
no CPU; each round begins with another server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.procstat import cpu_us
from benchmarks.common.turns import wait_until_idle
from benchmarks.common.wrk import run_wrk
from benchmarks.peers.catalogue import Body
from benchmarks.peers.servers import Running
from benchmarks.request_cost import answers

# LitServe polls, which takes a seventh of a core; a server with requests left takes all of one.
_IDLE_SHARE = 0.35
_SEED = 5


@dataclass(frozen=True, slots=True)
class Turn:
    """The figures of one server in one turn. `per_s` counts answers with 200, `failures` all others.

    `batch` is the mean number of rows in a run.
    """

    model: str
    peer: str
    body: str
    kind: str
    connections: int
    round: int
    per_s: float
    p50_us: float
    p99_us: float
    cpu_us: float
    batch: float
    memory: int
    failures: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The rounds of a model; `seconds` is the length of a turn."""

    model: str
    connections: tuple[int, ...]
    rounds: int
    seconds: int


def check(running: Running) -> None:
    """Check the answers to each body. Raises WrongAnswerError, RefusedError."""
    for body in running.peer.paths:

        def ask(rows: wire.Array, body: Body = body) -> wire.Array:
            message = body.make_request(running.model, rows)
            return body.read_output(wire.post(running.address, running.path(body), message)).reshape(1, -1)

        answers.compare(ask, running.model, model_path(running.model), most_rows=1)


def warm_up(running: Running, *some: Body) -> None:
    """Warm up with these bodies, or with all that it accepts."""
    for body in some or running.peer.paths:
        _load(running, body, 64, 1)


def rounds(plan: Plan, servers: Sequence[Running]) -> list[Turn]:
    """Measure all turns. Servers are paused before and after."""
    turns: list[Turn] = []
    for number in range(plan.rounds):
        for connections in plan.connections:
            for place in range(len(servers)):
                running = servers[(place + number) % len(servers)]
                running.resume()
                for body in running.peer.paths:
                    turn = measured(running, body, connections, plan.seconds, number)
                    turns.append(turn)
                    print(f"  {shown(turn)}", flush=True)
                running.pause()
    return turns


def measured(running: Running, body: Body, connections: int, seconds: int, number: int) -> Turn:
    """Measure one server under load, once it is idle."""
    wait_until_idle(running.pid, _IDLE_SHARE)
    before, counts = cpu_us(running.pid), running.counts()
    requests, good, duration_us, p50_us, p99_us, errors = _load(running, body, connections, seconds)
    used, after = cpu_us(running.pid) - before, running.counts()
    runs = after.runs - counts.runs
    return Turn(
        model=running.model,
        peer=running.peer.name,
        body=body.value,
        kind=body.kind,
        connections=connections,
        round=number,
        per_s=good / duration_us * 1e6,
        p50_us=p50_us,
        p99_us=p99_us,
        cpu_us=used / max(1, requests),
        batch=(after.rows - counts.rows) / runs if runs else 0.0,
        memory=running.memory(),
        failures=requests - good + errors,
    )


def _load(
    running: Running, body: Body, connections: int, seconds: int
) -> tuple[int, int, int, float, float, int]:
    """Return requests, those with 200, duration in microseconds, p50, p99, socket errors."""
    message = body.make_request(running.model, wire.rows_of(running.model, 1, _SEED))
    load = run_wrk(running.url(body), message.body, message.headers, connections, seconds, strict=False)
    good = load.requests - load.not_2xx
    return load.requests, good, load.duration_us, load.p50_us, load.p99_us, load.socket_errors


def shown(turn: Turn) -> str:
    """Return a line of progress."""
    return (
        f"{turn.model:6} c={turn.connections:<4} {turn.peer:10} {turn.body:12} {turn.per_s:9,.0f}/s "
        f"p50 {turn.p50_us / 1000:8.2f} p99 {turn.p99_us / 1000:8.2f} ms  CPU {turn.cpu_us:8,.1f} us  "
        f"batch {turn.batch:4.1f}  {turn.memory / 1e6:6,.0f} MB"
        + (f"  {turn.failures} FAILED" if turn.failures else "")
    )
