"""Overload: an open loop at 1.5 times a server's capacity, where answers after the deadline do not count.

Arrivals are random (Poisson); latency counts from the time that a request is due. The capacity of each server
is the better of two closed loops just before, in the same round; then it is restarted with the deadline and a
suitable limit of its queue, set in the way of its framework. Goodput is the number of answers with 200 within
the deadline per second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import wire
from benchmarks.common.open_loop import Load, drive, poisson
from benchmarks.peers.catalogue import Body, Peer
from benchmarks.peers.servers import Running, started
from benchmarks.peers.turns import measured, warm_up

MODEL = "wide"
FACTOR = 1.5
DEADLINE_MS = 100
_CAPACITY_CONNECTIONS = (64, 256)
_BODIES = 32
# The queue limit: the requests that a server answers in this part of the deadline.
_QUEUE_PART = 0.7
_MIN_QUEUE = 16


@dataclass(frozen=True, slots=True)
class Overload:
    """Requests per second: capacity, offered, answered with 200, answered in time, refused."""

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
    """Return the binary body if the server accepts one."""
    return min(peer.paths, key=lambda body: body.kind != "binary")


def measure(peer: Peer, python: Path, max_batch: int, seconds: int, number: int) -> Overload:
    """Measure one server. Raises MissingError if it does not start."""
    body = body_of(peer)
    with started(peer, MODEL, python, max_batch) as running:
        warm_up(running, body)
        capacity = max(measured(running, body, count, 2, number).per_s for count in _CAPACITY_CONNECTIONS)
    max_queue = max(_MIN_QUEUE, int(capacity * DEADLINE_MS / 1000 * _QUEUE_PART))
    with started(peer, MODEL, python, max_batch, DEADLINE_MS, max_queue) as running:
        warm_up(running, body)
        times_s = arrivals(FACTOR * capacity, seconds, number)
        requests = [_request(running, body, seed) for seed in range(_BODIES)]
        (counts,) = drive(running.address, Load(requests, times_s), deadline_s=DEADLINE_MS / 1000)
    span_s = times_s[-1]
    answered = counts.latency.count
    return Overload(
        MODEL,
        peer.name,
        body.value,
        number,
        capacity,
        len(times_s) / span_s,
        answered / span_s,
        counts.good / span_s,
        (len(times_s) - answered) / span_s,
        counts.latency.quantile_us(0.5) / 1000,
        counts.latency.quantile_us(0.99) / 1000,
    )


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the times of a Poisson process."""
    return poisson(rate, seconds, [seed, 11])


def shown(one: Overload) -> str:
    return (
        f"overload {one.peer:10} capacity {one.capacity:7,.0f}/s offered {one.offered:7,.0f}/s "
        f"goodput {one.goodput:7,.0f}/s ({one.share:.0%} of capacity)  "
        f"p50 {one.p50_ms:,.0f} p99 {one.p99_ms:,.0f} ms"
    )


def _request(running: Running, body: Body, seed: int) -> bytes:
    message = body.make_request(running.model, wire.rows_of(running.model, 1, seed))
    if running.peer.is_ours:
        message = wire.with_deadline(message, DEADLINE_MS)
    return wire.raw_request(message, running.address, running.path(body))
