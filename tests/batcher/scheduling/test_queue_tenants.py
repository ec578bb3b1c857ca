"""The queue with tenants, priorities and deadlines against a model of it.

No loss, no duplicate, sums that add up, the number of tombstones is bounded; each tenant's part of
the service differs from its share by no more than start-time fair queueing allows; and a request waits
for no more than that.
"""

from __future__ import annotations

from collections import Counter
from math import inf

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.fair_queueing import Group
from cobatch.batcher.scheduling.formation import StartPlan, form
from cobatch.batcher.scheduling.queue import FormedBatch, RequestQueue
from cobatch.batcher.scheduling.run_times import RunTimeModel
from cobatch.batcher.scheduling.tuning import AGEING_S
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import RowShapes
from tests.support.examples import examples

SHAPES: list[RowShapes] = [((),), ((2,),), ((3,), (1, 4))]
WEIGHTS = (1.0, 1.0, 3.0, 0.5)
FULL_ROWS = 8
MOST_ROWS = 9  # of one request
ROW_S = 0.001
RUN_US = {1: 1_000.0, 8: 8_000.0}


class Queued(Request):
    """Knows the requests that had been served, and those before it, when it was queued."""

    __slots__ = ("before", "served")

    before: int
    served: int


class Queues(RuleBasedStateMachine):
    """The steps of both machines. `waiting` has all requests that should be queued."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue(FULL_ROWS, ROW_S, ages=True)
        self.tenants = [None, *(Tenant(f"t{n}", weight=weight) for n, weight in enumerate(WEIGHTS))]
        self.waiting: list[Queued] = []
        self.left: list[tuple[Queued, State]] = []
        self.now_s = 0.0
        self.latency = RunTimeModel(FULL_ROWS, RUN_US)
        self.served = 0  # rows
        self.most = 0  # were queued at once
        self.was_short = False

    def form(self, group: Group, plan: StartPlan | None = None) -> FormedBatch:
        formed = self.queue.take_plain(group, FULL_ROWS) or form(
            self.queue, group, FULL_ROWS, plan, was_short=self.was_short
        )
        self.was_short = formed.was_short
        return formed

    def push(self, tenant: int, shape: int, rows: int, priority: int = 0, timeout_s: float = inf) -> None:
        request = Queued(rows, SHAPES[shape], [b"payload"] * len(SHAPES[shape]))
        request.tenant = self.tenants[tenant]
        request.priority = priority
        request.deadline_s = self.now_s + timeout_s
        request.enqueued_s = self.now_s
        request.before = sum(one.rows for one in self.waiting if one.tenant is request.tenant)
        request.served = self.served
        self.queue.push(request)
        self.waiting.append(request)

    def cancel_one(self, number: int) -> None:
        request = self.waiting.pop(number % len(self.waiting))
        self.queue.cancel(request)
        assert request.payloads == ()
        self.left.append((request, State.CANCELLED))

    def took(self, taken: FormedBatch) -> int:
        """Check what any batch is, and count it; its rows."""
        requests = taken.requests
        for request in (*requests, *taken.late):
            assert isinstance(request, Queued)
            self.waiting.remove(request)
            self.left.append((request, State.RUNNING))
        rows = sum(request.rows for request in requests)
        assert rows <= FULL_ROWS or len(requests) == 1
        assert len({request.row_shapes for request in requests}) <= 1
        by_tenant = Counter[Tenant | None]()
        for request in requests:
            by_tenant[request.tenant] += request.rows
        assert taken.shares == by_tenant
        self.served += rows
        return rows

    @rule(tenant=st.integers(0, 4), shape=st.integers(0, 2))
    def one_comes_and_goes_many_times(self, tenant: int, shape: int) -> None:
        for n in range(80):
            self.push((tenant + n % 2) % 5, shape, 1, timeout_s=1.0)
            self.cancel_one(-1)

    @rule(passed_s=st.sampled_from([0.001, 0.5, 1.5]))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s

    @invariant()
    def sums_add_up(self) -> None:
        queue = self.queue
        assert queue.rows == sum(one.rows for one in self.waiting)
        assert queue.deadlines == sum(one.deadline_s < inf for one in self.waiting)
        shapes = {one.row_shapes for one in self.waiting}
        assert set(queue.groups) == shapes
        assert len(queue.groups) == len(shapes)
        for row_shapes, group in queue.groups.items():
            alike = [one for one in self.waiting if one.row_shapes == row_shapes]
            assert group.rows == sum(one.rows for one in alike)
            for share, flow in group.flows.items():
                assert flow.rows == sum(one.rows for one in alike if one.tenant is share.tenant) > 0
            assert {share.tenant for share in group.flows} == {one.tenant for one in alike}
        for tenant in self.tenants:
            rows = sum(one.rows for one in self.waiting if one.tenant is tenant)
            if tenant is not None:
                assert tenant.queued_rows == rows == queue.shares.of(tenant).rows
        if not self.waiting:
            # The last one to leave an empty queue may still count: it is kept aside.
            assert queue.shares.active == int(queue._parked)
            return
        assert queue.shares.active == len({one.tenant for one in self.waiting})
        weights = {one.tenant: 1.0 if one.tenant is None else one.tenant.weight for one in self.waiting}
        assert queue.shares.active_weight == pytest.approx(sum(weights.values()))

    @invariant()
    def what_the_policy_sees(self) -> None:
        queue = self.queue
        if not self.waiting:
            assert queue.full_group is None
            return
        assert queue.extremes.oldest_s == min(one.enqueued_s for one in self.waiting)
        assert queue.extremes.urgent_s == min(one.deadline_s for one in self.waiting)
        assert queue.next_group in queue.groups.values()
        full = [group for group in queue.groups.values() if group.rows >= FULL_ROWS]
        assert (queue.full_group in full) if full else queue.full_group is None

    @invariant()
    def states_are_right(self) -> None:
        assert all(one.state is State.QUEUED and one.entry is not None for one in self.waiting)
        assert all(one.state is state and one.entry is None for one, state in self.left)

    @invariant()
    def what_left_is_forgotten(self) -> None:
        """Whatever comes and goes without being taken."""
        queue, live = self.queue, len(self.waiting)
        self.most = max(self.most, live)
        assert len(queue._turns._heap) <= 2 * 5 + 64 + 1
        assert len(queue.extremes) <= 2 * 2 * (self.most + 1) + 64
        for group in queue.groups.values():
            assert len(group.turns._heap) <= 2 * 5 + 64 + 1
            for flow in group.flows.values():
                assert flow.order._waiting <= 2 * live + 65


class Anything(Queues):
    """Priorities, deadlines, batches of any group, runs that cost anything."""

    @rule(
        tenant=st.integers(0, 4),
        shape=st.integers(0, 2),
        rows=st.integers(1, MOST_ROWS),
        priority=st.sampled_from([0, 0, 1, 4, 8]),
        timeout_s=st.sampled_from([inf, inf, 0.002, 0.006, 0.02, 2.0]),
    )
    def comes(self, tenant: int, shape: int, rows: int, priority: int, timeout_s: float) -> None:
        self.now_s += 1e-4
        self.push(tenant, shape, rows, priority, timeout_s)

    @rule()
    def take_all(self) -> None:
        taken = self.queue.take_all()
        assert sorted(map(id, taken)) == sorted(map(id, self.waiting))
        for request in self.waiting:
            self.left.append((request, State.RUNNING))
        self.waiting.clear()

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 100))
    def leaves(self, number: int) -> None:
        self.cancel_one(number)

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 2), factor=st.sampled_from([0.1, 1.0, 7.0]))
    def a_batch_of_any_group(self, number: int, factor: float) -> None:
        groups = list(self.queue.groups.values())
        group = groups[number % len(groups)]
        heads = self.heads(group.row_shapes)
        taken = self.form(group)
        assert taken.requests
        assert taken.requests[0] in heads
        self.took(taken)
        self.queue.shares.settle(taken.shares, (factor - 1) * ROW_S)

    def heads(self, row_shapes: RowShapes) -> list[Queued]:
        """Return each tenant's next request, by priority and age."""
        heads: dict[Tenant | None, Queued] = {}
        for one in self.waiting:
            if one.row_shapes == row_shapes:
                best = heads.get(one.tenant)
                if best is None or self.rank(one) < self.rank(best):
                    heads[one.tenant] = one
        return list(heads.values())

    @staticmethod
    def rank(one: Queued) -> float:
        return one.enqueued_s + one.level * AGEING_S

    @precondition(lambda self: self.waiting)
    @rule(ahead_s=st.sampled_from([0.0, 0.002, 0.010]))
    def a_batch_in_time(self, ahead_s: float) -> None:
        plan = StartPlan(self.now_s + ahead_s, self.latency)
        queued = {id(one) for one in self.waiting}
        taken = self.form(self.queue.next_group, plan)
        assert taken.requests or taken.late
        rows = self.took(taken)
        requests = taken.requests
        if len(requests) > 1:
            end_s = plan.start_s + self.latency.planned_s(rows)
            assert end_s <= min(one.deadline_s for one in requests)
        for one in requests:
            assert plan.start_s + self.latency.expected_s(one.rows) <= one.deadline_s
        full_s = plan.start_s + self.latency.planned_s(FULL_ROWS)
        for one in taken.late:
            assert id(one) in queued
            # Not in time by itself, or not in a full batch while others can make one.
            alone_s = plan.start_s + self.latency.expected_s(one.rows)
            assert alone_s > one.deadline_s or full_s > one.deadline_s
        assert not taken.capped or any(one.deadline_s < inf for one in (*requests, *self.waiting))


class Fair(Queues):
    """Batches of whose turn it is, where a row costs the same in all of them: shares and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.rows_of: Counter[Tenant | None] = Counter()
        # The rows that two tenants had been served when both began to wait.
        self.both: dict[tuple[int, int], tuple[int, int]] = {}

    @rule(tenant=st.integers(0, 4), shape=st.integers(0, 2), rows=st.integers(1, MOST_ROWS))
    def comes(self, tenant: int, shape: int, rows: int) -> None:
        self.now_s += 1e-4
        self.push(tenant, shape, rows)

    @rule(tenant=st.integers(0, 4), shape=st.integers(0, 2), rows=st.integers(1, MOST_ROWS))
    def a_flood_comes(self, tenant: int, shape: int, rows: int) -> None:
        for _ in range(30):
            self.comes(tenant, shape, rows)

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 100))
    def leaves(self, number: int) -> None:
        self.cancel_one(number)

    @precondition(lambda self: self.waiting)
    @rule(times=st.integers(1, 20))
    def batches(self, times: int) -> None:
        for _ in range(times):
            if self.waiting:
                taken = self.form(self.queue.next_group)
                for tenant, its_rows in taken.shares.items():
                    self.rows_of[tenant] += its_rows
                self.took(taken)
                self.queue.shares.settle(taken.shares, 0.0)
                self.no_request_waits_longer_than_its_share_takes(taken)
                self.shares_are_kept()

    def no_request_waits_longer_than_its_share_takes(self, taken: FormedBatch) -> None:
        weights = [1.0, *WEIGHTS]
        for request in taken.requests:
            assert isinstance(request, Queued)
            weight = 1.0 if request.tenant is None else request.tenant.weight
            # Its own tenant's rows before it, at its share; and of each tenant one batch that was early.
            bound = (request.before + request.rows) * sum(weights) / weight
            slack = sum(2 * (MOST_ROWS + FULL_ROWS) * (1 + other / weight) for other in weights)
            assert self.served - request.served <= bound + slack

    @invariant()
    def shares_are_kept(self) -> None:
        """Theorem 1 of Goyal, Vin and Cheng: while both wait, what two tenants get, divided by their weights,
        differs by at most the largest request of each; here, of a batch that is filled up from one shape."""
        waiting = {one.tenant for one in self.waiting}
        for one in range(5):
            for other in range(one):
                pair = (self.tenants[one], self.tenants[other])
                if not waiting >= set(pair):
                    self.both.pop((one, other), None)
                    continue
                now = (self.rows_of[pair[0]], self.rows_of[pair[1]])
                since = self.both.setdefault((one, other), now)
                weights = [1.0 if tenant is None else tenant.weight for tenant in pair]
                parts = [(now[n] - since[n]) / weights[n] for n in (0, 1)]
                most = (MOST_ROWS + FULL_ROWS) * sum(1 / weight for weight in weights)
                assert abs(parts[0] - parts[1]) <= most


def test_a_request_does_not_starve_behind_newer_ones_of_another_shape() -> None:
    """The newer ones ride in every batch that the other tenant leads."""
    queues = Fair()
    queues.push(1, 0, 4)
    queues.push(2, 1, 4)
    oldest = queues.waiting[1]
    for _ in range(50):
        queues.push(1, 0, 4)
        queues.push(2, 0, 4)
    queues.batches(times=3)
    assert oldest not in queues.waiting


Anything.TestCase.settings = examples(30, stateful_step_count=50)
Fair.TestCase.settings = examples(30, stateful_step_count=50)
TestAnything = Anything.TestCase
TestFair = Fair.TestCase


def test_a_tenants_requests_move_to_batches_of_another_size_without_being_touched() -> None:
    """Their number must not count: a tenant that fails in turns moves them after each run."""
    queue = RequestQueue(FULL_ROWS, ROW_S, ages=False)
    tenants = [Tenant("moves"), Tenant("stays")]
    requests = [Request(1, SHAPES[n % 2], [b""], tenant=tenants[n % 3 == 2]) for n in range(24)]
    for request in requests:
        queue.push_apart([request], (request.row_shapes, 2), 2)
    entries = [request.entry for request in requests]
    for most_rows in (1, 2, 4):
        queue.regroup(tenants[0], most_rows)
        assert [request.entry for request in requests] == entries
        for tenant, rows in zip(tenants, (most_rows, 2), strict=True):
            groups = [group for group in queue.groups.values() if group.most_rows == rows]
            shares = [share for group in groups for share in group.flows]
            assert {share.tenant for share in shares} == ({tenant} if most_rows != 2 else set(tenants))
            assert sum(group.rows for group in groups) == sum(share.rows for share in set(shares))
    formed = []
    while queue.rows:
        group = queue.next_group
        batch = form(queue, group, group.most_rows)
        assert {request.row_shapes for request in batch.requests} == {group.row_shapes}
        formed.append([requests.index(request) for request in batch.requests])
    assert formed[0] == [0, 4, 6, 10], "the oldest four of its shape, of the tenant that moved"
    assert sorted(number for batch in formed for number in batch) == list(range(24))
    assert queue.groups == {}


def test_requests_that_are_queued_elsewhere_leave_no_trace() -> None:
    """Their tenant has parts of failed batches here, which stand in one order with them."""
    tenant = Tenant("t")
    here, elsewhere = (RequestQueue(FULL_ROWS, ROW_S, ages=True) for _ in range(2))
    moved = [Request(1, SHAPES[0], [b""], tenant=tenant, priority=1) for _ in range(2)]
    failed = [Request(1, SHAPES[0], [b""], tenant=tenant, priority=priority) for priority in (1, 3, 3)]
    for request in moved:
        here.push(request)
    for request in failed:
        here.push_apart([request], object(), 1, again=True)
    assert here.take_tenant(tenant) == moved
    for request in moved:
        elsewhere.push(request)
    assert (here.rows, elsewhere.rows) == (3, 2)
    assert [form(here, here.next_group, 1).requests for _ in failed] == [[request] for request in failed]
    assert form(elsewhere, elsewhere.next_group, FULL_ROWS).requests == moved
    assert (here.rows, elsewhere.rows) == (0, 0)
