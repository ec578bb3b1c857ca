"""The policies of other servers, on a few requests: each as its original's documentation says."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.scheduling.baselines import Baseline, Clipper, FixedWindow, SizeOrTimeout, TritonLike
from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.engine import RunTimeSampler
from cobatch.batcher.simulator.nodes import ANSWERED, EXPIRED, Records, SimulatedRequest
from tests.support.virtual.profiles import linear

RUN_MS = 10.0


class Bench:
    """One baseline over an engine that takes 10 ms and 1 ms a row."""

    def __init__(self, kind: Any, **settings: Any) -> None:
        self.loop = VirtualLoop()
        profile = linear("linear", RUN_MS * 1000, 1000, 64)
        self.node: Baseline = kind(self.loop, RunTimeSampler(profile, 1), **settings)
        self.records = Records(self.loop)
        self.began: list[tuple[float, int]] = []
        run = self.node._run

        def watched(requests: list[SimulatedRequest], reason: str) -> None:
            self.began.append((round(self.loop.now_s * 1000, 6), len(requests)))
            run(requests, reason)

        self.node.__dict__["_run"] = watched

    def __call__(self, *at_ms: float, timeout_ms: float | None = None) -> list[tuple[float, int]]:
        """When which batches began, in ms."""

        def arrive() -> None:
            request = SimulatedRequest(0, 1, self.records)
            request.node = self.node
            request.timeout_s = None if timeout_ms is None else timeout_ms / 1000
            refusal = self.node.submit(request)
            if refusal:
                self.records.refuse(request, refusal)

        self.loop.run(iter([ms / 1000 for ms in at_ms]), arrive)
        return self.began

    def ends(self, outcome: int) -> list[float]:
        records = self.records.array()
        return [round(1000 * end, 6) for end in records["end_s"][records["outcome"] == outcome].tolist()]


def test_a_window_opens_with_a_request_and_is_dispatched_at_its_end() -> None:
    bench = Bench(FixedWindow, max_batch_size=2, window_ms=5)
    # Three in the first window, in batches of two; the next one waits for the engine.
    assert bench(0, 1, 4, 6) == [(5, 2), (17, 1), (28, 1)]


def test_a_window_ignores_deadlines() -> None:
    bench = Bench(FixedWindow, max_batch_size=8, window_ms=50)
    assert bench(0, timeout_ms=1) == [(50, 1)]
    assert bench.ends(ANSWERED) == [61]


@pytest.mark.parametrize(
    ("arrivals", "batches"), [((0, 1, 2), [(2, 3)]), ((0, 1), [(5, 2)]), ((0, 6), [(5, 1), (16, 1)])]
)
def test_size_or_timeout(arrivals: tuple[float, ...], batches: list[tuple[float, int]]) -> None:
    assert Bench(SizeOrTimeout, max_batch_size=3, max_queue_rows=9, timeout_ms=5)(*arrivals) == batches


@pytest.mark.parametrize("drops", [False, True])
def test_size_or_timeout_drops_expired_requests_only_if_configured(drops: bool) -> None:
    bench = Bench(SizeOrTimeout, max_batch_size=1, max_queue_rows=9, timeout_ms=0, drops=drops)
    bench(0, 1, timeout_ms=8)
    assert len(bench.ends(EXPIRED)) == drops
    assert len(bench.ends(ANSWERED)) == 2 - drops


def test_a_full_queue_refuses() -> None:
    bench = Bench(SizeOrTimeout, max_batch_size=1, max_queue_rows=2, timeout_ms=0)
    bench(0, 1, 2, 3, 4)
    assert bench.records.refusals == {"queue": 2}


def test_triton_dispatches_preferred_sizes_at_once_and_less_after_the_delay() -> None:
    bench = Bench(TritonLike, max_batch_size=8, max_queue_rows=99, preferred=(2, 4), delay_ms=3)
    # Two at 1 ms; five are queued when the engine is free at 13 ms: four leave, and the last after its delay.
    assert bench(0, 1, 2, 3, 4, 5, 6) == [(1, 2), (13, 4), (27, 1)]


def test_triton_without_a_delay_dispatches_all_that_is_queued() -> None:
    assert Bench(TritonLike, max_batch_size=8, max_queue_rows=99)(0, 1, 2) == [(0, 1), (11, 2)]


def test_triton_rejects_expired_requests_and_runs_those_about_to_expire() -> None:
    bench = Bench(TritonLike, max_batch_size=8, max_queue_rows=99)
    bench(0, 0.5, 2, timeout_ms=10)
    # At 11 ms the second has expired; the third will have when it is answered.
    assert bench.ends(EXPIRED) == [11]
    assert bench.ends(ANSWERED) == [11, 22]


def test_triton_rejects_requests_after_the_queue_timeout() -> None:
    bench = Bench(TritonLike, max_batch_size=8, max_queue_rows=99, queue_timeout_ms=9)
    bench(0, 1, 3)
    assert bench.ends(EXPIRED) == [11]


def test_clipper_grows_by_one_and_shrinks_by_a_tenth() -> None:
    bench = Bench(Clipper, max_batch_size=64, max_queue_rows=999, objective_ms=30)
    bench(*[0.0] * 300)
    sizes = [size for _, size in bench.began]
    # A run of 20 rows takes 30 ms: 21 is too long, and nine tenths of it are 18.
    assert sizes[:21] == list(range(1, 22))
    assert sizes[21:24] == [18, 19, 20]


def test_clipper_takes_the_earliest_deadline_first_and_drops_expired_requests() -> None:
    bench = Bench(Clipper, max_batch_size=64, max_queue_rows=999, objective_ms=None)
    timeouts = iter([50.0, 40.0, 30.0, 5.0])

    def arrive() -> None:
        request = SimulatedRequest(0, 1, bench.records)
        request.node = bench.node
        request.timeout_s = next(timeouts) / 1000
        request.rows = 1
        bench.node.submit(request)

    bench.loop.run(iter([0.0, 0.001, 0.002, 0.003]), arrive)
    assert bench.ends(EXPIRED) == [11]
    assert bench.began == [(0, 1), (11, 2)]
