"""The waiting room: who is served when there is room, and what looking for it costs. In virtual time."""

from __future__ import annotations

import asyncio
from unittest import mock

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.tenant import Tenant
from cobatch.server.links.waiting import Waiting, WaitingRoom
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, make_batcher, run


class Step(Call, Waiting):
    """A step that is submitted when there is room. `admitted`: all that were."""

    __slots__ = ("admitted", "batcher")

    def __init__(self, batcher: Batcher, tenant: Tenant, admitted: list[Step], rows: int = 1) -> None:
        super().__init__([[len(admitted)]] * rows)
        self.batcher = batcher
        self.tenant = tenant
        self.admitted = admitted

    def admit(self) -> None:
        self.admitted.append(self)
        self.batcher.submit(self)

    def refuse(self, error: Exception) -> None:
        raise AssertionError(error)


def full(max_queue_rows: int = 2) -> tuple[Batcher, WaitingRoom]:
    """Return a batcher whose queue is full behind a batch that runs, and an empty room."""
    batcher = make_batcher(FakeWorker(FakeEngine(max_batch_size=1, slots=1)), max_queue_rows=max_queue_rows)
    for _ in range(max_queue_rows + 1):
        batcher.submit(Call([[0]]))
        batcher.decide()
    return batcher, WaitingRoom()


async def served(batcher: Batcher, room: WaitingRoom) -> None:
    """Serve the room until it is empty."""
    while room.waiting:
        room.serve(batcher)
        await asyncio.sleep(0.001)


def test_tenants_take_turns() -> None:
    async def main() -> None:
        batcher, room = full()
        admitted: list[Step] = []
        first, second = Tenant("first"), Tenant("second")
        for tenant in [first] * 6 + [second] * 2:
            assert room.takes(batcher, Step(batcher, tenant, admitted))
        await served(batcher, room)
        assert [step.tenant for step in admitted] == [first, second] * 2 + [first] * 4

    run(main())


def test_a_large_step_keeps_its_turn() -> None:
    async def main() -> None:
        batcher, room = full()
        admitted: list[Step] = []
        first, second = Tenant("first"), Tenant("second")
        large = Step(batcher, first, admitted, rows=2)
        assert room.takes(batcher, large)
        for _ in range(3):
            assert room.takes(batcher, Step(batcher, second, admitted))
        await served(batcher, room)
        assert admitted[0] is large

    run(main())


def test_only_the_first_of_a_tenant_is_looked_at() -> None:
    """While the tenant is over its limit, and the queue has room."""

    async def main() -> None:
        batcher, room = full(max_queue_rows=50)
        await asyncio.sleep(0.1)  # some of them have run
        tenant = Tenant("one", max_queue_rows=1)
        batcher.submit(Step(batcher, tenant, []))
        for _ in range(100):
            assert room.takes(batcher, Step(batcher, tenant, []))
        with mock.patch.object(batcher, "refusal", wraps=batcher.refusal) as looked:
            assert not room.serve(batcher)
        assert looked.call_count == 1
        assert room.waiting == 100

    run(main())
