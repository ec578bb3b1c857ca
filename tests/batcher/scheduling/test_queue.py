"""The queue against a model of it: rows add up, nothing is lost or doubled, each shape keeps its order."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.fair_queueing import Group
from cobatch.batcher.scheduling.formation import form
from cobatch.batcher.scheduling.queue import RequestQueue
from cobatch.engines.base import RowShapes
from tests.support.examples import examples

SHAPES: list[RowShapes] = [((),), ((2,),), ((3,), (1, 4))]


class Queued(RuleBasedStateMachine):
    """`lines` is the expected content of the queue: for each shape the requests in order of arrival."""

    requests: Bundle[Request] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue(8, 0.001, ages=True)
        self.lines: dict[RowShapes, list[Request]] = {shapes: [] for shapes in SHAPES}
        self.gone: list[tuple[Request, State]] = []
        self.now_s = 0.0

    def waiting(self) -> list[Group]:
        return list(self.queue.groups.values())

    @rule(target=requests, shapes=st.sampled_from(SHAPES), rows=st.integers(1, 9))
    def push(self, shapes: RowShapes, rows: int) -> Request:
        request = Request(rows, shapes, [b"payload"] * len(shapes))
        self.now_s += 1.0
        request.enqueued_s = self.now_s
        group = self.queue.push(request)
        assert request.state is State.QUEUED
        assert group is self.queue.groups[shapes]
        self.lines[shapes].append(request)
        return request

    @rule(request=consumes(requests))
    def cancel(self, request: Request) -> None:
        if request.state is not State.QUEUED:
            return
        self.queue.cancel(request)
        assert request.payloads == (), "the memory of a cancelled request is freed at once"
        self.lines[request.row_shapes].remove(request)
        self.gone.append((request, State.CANCELLED))

    @rule(shapes=st.sampled_from(SHAPES), each=st.integers(1, 3))
    def many_come_and_go(self, shapes: RowShapes, each: int) -> None:
        """Enough cancelled ones to be swept out of the line."""
        for _ in range(70):
            self.cancel(self.push(shapes, each))

    @precondition(lambda self: self.queue.groups)
    @rule(data=st.data(), most_rows=st.integers(1, 12))
    def take(self, data: st.DataObject, most_rows: int) -> None:
        group = data.draw(st.sampled_from(self.waiting()), label="group")
        line = self.lines[group.row_shapes]
        formed = self.queue.take_plain(group, most_rows) or form(self.queue, group, most_rows)
        taken = formed.requests
        assert taken, "a group with rows gives at least one request"
        assert taken == line[: len(taken)], "from the head, whole and in order"
        del line[: len(taken)]
        rows = sum(request.rows for request in taken)
        assert rows <= most_rows or len(taken) == 1
        if line:
            assert rows + line[0].rows > most_rows or rows >= most_rows, "one more would have fitted"
        self.gone += [(request, State.RUNNING) for request in taken]

    @rule()
    def take_all(self) -> None:
        taken = self.queue.take_all()
        expected = [request for line in self.lines.values() for request in line]
        assert sorted(map(id, taken)) == sorted(map(id, expected))
        for line in self.lines.values():
            assert [request for request in taken if request in line] == line
            line.clear()
        self.gone += [(request, State.RUNNING) for request in taken]

    @invariant()
    def rows_add_up(self) -> None:
        rows = {shapes: sum(r.rows for r in line) for shapes, line in self.lines.items() if line}
        assert {shapes: group.rows for shapes, group in self.queue.groups.items()} == rows
        assert self.queue.rows == sum(rows.values())

    @invariant()
    def the_oldest_is_next(self) -> None:
        waiting = [request for line in self.lines.values() for request in line]
        if waiting:
            oldest = min(waiting, key=lambda request: request.enqueued_s)
            assert self.queue.extremes.oldest_s == oldest.enqueued_s
            assert self.queue.next_group.row_shapes == oldest.row_shapes
            full = [group for group in self.queue.groups.values() if group.rows >= self.queue.full_rows]
            assert (self.queue.full_group in full) if full else self.queue.full_group is None

    @invariant()
    def states_are_right(self) -> None:
        for line in self.lines.values():
            assert all(request.state is State.QUEUED for request in line)
        for request, state in self.gone:
            assert request.state is state

    @invariant()
    def tombstones_are_few(self) -> None:
        for group in self.queue.groups.values():
            live = len(self.lines[group.row_shapes])
            (flow,) = group.flows.values()
            assert flow.order.queued == live
            assert flow.order._waiting <= 2 * live + 65


Queued.TestCase.settings = examples(40, stateful_step_count=40)
TestQueue = Queued.TestCase
