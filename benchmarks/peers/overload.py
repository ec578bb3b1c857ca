"""Overload: requests come at 1.5 times what a server manages, and an answer after the deadline is worth
nothing.

An open loop of random (Poisson) arrivals; latency counts from when a request should have left. A server's
capacity is its own, the better of two closed loops just before, in the same round; then it is started again
with the deadline, and a limit on its queue that fits it, told to it in the ways that its framework has.
Goodput is what it answers with 200 within the deadline, per second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import wire
from benchmarks.common.open_loop import Load, drive
from benchmarks.peers import bodies
from benchmarks.peers.catalogue import OURS, Body, Peer
from benchmarks.peers.servers import Running, started
from benchmarks.peers.turns import measured, warm_up
from cobatch.batcher.simulator.traffic import Poisson

MODEL = "wide"
FACTOR = 1.5
DEADLINE_MS = 100
_CAPACITY_CONNECTIONS = (64, 256)
_BODIES = 32
# As many requests are let in as a server answers in this part of the deadline, where it has such a limit.
_QUEUE_PART = 0.7
_LEAST_QUEUE = 16


@dataclass(frozen=True, slots=True)
class Overload:
    """Per second: what the server managed, what was offered, what was answered with 200, and in time."""

    model: str
    peer: str
    body: str
    round: int
    capacity: float
    offered: float
    answered: float
    goodput: float
    refused: float
    p50_ms: float
    p99_ms: float

    @property
    def share(self) -> float:
        """Goodput as a part of capacity."""
        return self.goodput / self.capacity


def body_of(peer: Peer) -> Body:
    """Bytes where the server takes them."""
    return min(peer.paths, key=lambda body: body.kind != "binary")


def measure(peer: Peer, python: Path, max_batch: int, seconds: int, number: int) -> Overload:
    """Raises MissingError where the server does not start."""
    body = body_of(peer)
    with started(peer, MODEL, python, max_batch) as running:
        warm_up(running, body)
        capacity = max(measured(running, body, many, 2, number).per_s for many in _CAPACITY_CONNECTIONS)
    max_queue = max(_LEAST_QUEUE, int(capacity * DEADLINE_MS / 1000 * _QUEUE_PART))
    with started(peer, MODEL, python, max_batch, DEADLINE_MS, max_queue) as running:
        warm_up(running, body)
        times_s = arrivals(FACTOR * capacity, seconds, number)
        requests = [_request(running, body, seed) for seed in range(_BODIES)]
        (all_,) = drive(running.address, Load(requests, times_s), deadline_s=DEADLINE_MS / 1000)
    span_s = times_s[-1]
    answered = all_.latency.count
    return Overload(
        MODEL,
        peer.name,
        body.value,
        number,
        capacity,
        len(times_s) / span_s,
        answered / span_s,
        all_.good / span_s,
        (len(times_s) - answered) / span_s,
        all_.latency.quantile_us(0.5) / 1000,
        all_.latency.quantile_us(0.99) / 1000,
    )


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson, from 0 s."""
    times_s: list[float] = []
    for time_s in Poisson(rate).times(np.random.default_rng([seed, 11])):
        if time_s >= seconds:
            break
        times_s.append(time_s)
    return times_s


def shown(one: Overload) -> str:
    return (
        f"overload {one.peer:10} capacity {one.capacity:7,.0f}/s offered {one.offered:7,.0f}/s "
        f"goodput {one.goodput:7,.0f}/s ({one.share:.0%} of capacity)  "
        f"p50 {one.p50_ms:,.0f} p99 {one.p99_ms:,.0f} ms"
    )


def _request(running: Running, body: Body, seed: int) -> bytes:
    message = bodies.encode(body, running.model, wire.rows_of(running.model, 1, seed))
    if running.peer is OURS:
        message = bodies.with_deadline(message, DEADLINE_MS)
    return bodies.on_the_wire(message, running.address, running.path(body))
