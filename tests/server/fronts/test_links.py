"""Requests over a link, without HTTP: bundles, failures, cancellation, shared memory, and the link's end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.errors import QueueFullError, TenantLimitError
from cobatch.batcher.scheduling.policy import SUSPECT
from cobatch.batcher.scheduling.tuning import LONE_BATCHES
from cobatch.engines.base import Signature, TensorSpec
from cobatch.engines.errors import EngineDeadError, EngineRunError
from cobatch.engines.link.messages import BUNDLE_IDS, INLINE_BYTES, FromFront, Release, Submit
from cobatch.engines.link.messages import Tenant as TenantMessage
from cobatch.server.fronts.front import Uplinks
from cobatch.server.http.problem import Problem
from cobatch.server.links import downlink, hub, uplink
from cobatch.server.links import rows as rows_of_links
from cobatch.server.links.uplink import STALLED_LOOKS
from cobatch.server.settings.auth import TenantRule
from cobatch.server.settings.schema import Settings
from tests.support.auth.protected import settings_in
from tests.support.examples import examples
from tests.support.fronts.linked import LinkMaker
from tests.support.fronts.pair import SLAB_BYTES, FrontEnd, Probe, pair
from tests.support.http.serving import DEADLINE_S, GatedEngine

BAD = 13
LONG = 4096  # elements of a row that is not sent in a message


def fixed(width: int = 2) -> GatedEngine:
    """Return an engine whose rows are all alike, so that they are bundled."""
    engine = GatedEngine(16)
    engine.signature = Signature((TensorSpec("x", "INT64", (width,)),), (TensorSpec("y", "INT64", (width,)),))
    return engine


async def answers(probes: list[Probe]) -> list[object]:
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.gather(*[probe.answer for probe in probes], return_exceptions=True)


def slugs(results: list[object]) -> list[object]:
    return [one.kind.slug if isinstance(one, Problem) else one for one in results]


async def test_a_front_without_models_is_ready_once_it_is_linked() -> None:
    """There are pipelines only."""
    uplinks, maker, ready = Uplinks(Settings(), 1), LinkMaker(1 << 20), asyncio.Event()
    uplinks.make_inference(Settings(), None).on_ready = ready.set
    home, front = maker.make()
    assert not ready.is_set()
    uplinks.use(front)
    assert ready.is_set()
    assert uplinks.current is not None
    uplinks.current.end("the test ends")
    for end in (home.messages, home.handover, front.handover):
        end.close()
    os.close(home.slab_in)
    os.close(home.slab_out)
    maker.close()


async def test_single_rows_of_an_iteration_are_one_request_in_home() -> None:
    async with pair(engine=fixed()) as both:
        both.engine.hold()
        probes = [both.fronts[0].submit([n, n]) for n in range(7)]
        await both.until(lambda: both.link(0).open)
        assert [request.callers for request in both.link(0).open.values()] == [7]
        both.engine.release()
        assert await answers(probes) == [[[2 * n, 2 * n]] for n in range(7)]
        assert both.batcher.counters.accepted == 7
        assert {probe.batch for probe in probes} == {probes[0].batch}
        assert [probe.entry for probe in probes] == list(range(7))  # their rows in home's batch


@pytest.mark.parametrize(("rows", "queued", "bundles"), [(15, 0, [15]), (20, 0, [8, 8, 4]), (15, 2, [8, 7])])
async def test_rows_for_several_batches_are_bundles_that_pack(
    rows: int, queued: int, bundles: list[int]
) -> None:
    async with pair(engine=fixed()) as both:
        assert both.batcher.queue.full_rows == 16
        both.engine.hold()
        first = both.fronts[0].submit([0, 0])
        await both.until(lambda: both.batcher.running_batches)
        others = [both.fronts[0].submit([n, n]) for n in range(queued)]
        await both.until(lambda: both.fronts[0].batcher.queue.rows == queued)
        before = set(both.link(0).open)
        probes = [both.fronts[0].submit([n, n]) for n in range(rows)]
        await both.until(lambda: set(both.link(0).open) - before)
        link = both.link(0)
        assert [one.callers for id_, one in link.open.items() if id_ not in before] == bundles
        both.engine.release()
        assert await answers([*probes, first, *others])


async def test_a_request_that_is_probably_alone_leaves_at_once() -> None:
    async with pair() as both:
        uplink = both.fronts[0].uplink
        for number in range(LONE_BATCHES):
            probe = both.fronts[0].submit([number])
            assert not uplink._flights.open
            await answers([probe])
        probes = [both.fronts[0].submit([number]) for number in range(3)]
        assert len(uplink._flights.open) == 1  # the others leave together
        assert await answers(probes) == [[[0]], [[2]], [[4]]]
        probes = [both.fronts[0].submit([number]) for number in range(2)]
        assert not uplink._flights.open
        await answers(probes)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let home wait for fronts without a limit."""
    monkeypatch.setattr(hub, "_LONGEST_WAIT_S", 3600.0)


@pytest.mark.usefixtures("patient")
async def test_an_idle_engine_waits_for_requests_that_a_front_reads() -> None:
    async with pair(3) as both:
        for front in both.fronts[1:]:
            front.uplink._slab_out.announce(front.uplink._next + 1)
        probes = [both.fronts[0].submit([0])]
        await both.until(lambda: both.link(0).open)
        probes.append(both.fronts[1].submit([1]))
        await both.until(lambda: both.link(1).open)
        probes.append(both.fronts[0].submit([2]))
        await both.until(lambda: len(both.link(0).open) == 2)
        assert not both.engine.ran
        probes.append(both.fronts[2].submit([3]))
        assert await answers(probes) == [[[0]], [[2]], [[4]], [[6]]]
        assert [len(ran) for ran in both.engine.ran] == [4]


@pytest.mark.usefixtures("patient")
async def test_a_full_batch_waits_for_no_front() -> None:
    async with pair(2) as both:
        both.fronts[1].uplink._slab_out.announce(1)
        rows = [[n] for n in range(16)]
        assert await answers([both.fronts[0].submit(*rows)]) == [[[2 * n] for n in range(16)]]


@pytest.mark.usefixtures("patient")
async def test_a_batch_that_becomes_full_waits_no_longer() -> None:
    async with pair(2) as both:
        both.fronts[1].uplink._slab_out.announce(1)
        probes = [both.fronts[0].submit([0])]
        await both.until(lambda: both.link(0).open)
        probes.append(both.fronts[0].submit(*[[n] for n in range(15)]))
        await answers(probes)
        assert [len(ran) for ran in both.engine.ran] == [16]


@pytest.mark.usefixtures("patient")
async def test_a_front_that_has_ended_is_not_waited_for() -> None:
    async with pair(2) as both:
        both.fronts[1].uplink._slab_out.announce(1)
        probe = both.fronts[0].submit([1])
        await both.until(lambda: both.link(0).open)
        both.fronts[1].uplink.end("it is killed")
        assert await answers([probe]) == [[[2]]]


async def test_a_front_that_does_not_send_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(2) as both:
        both.fronts[1].uplink._slab_out.announce(1)
        assert await answers([both.fronts[0].submit([1])]) == [[[2]]]
        monkeypatch.setattr(hub, "_LONGEST_WAIT_S", 3600.0)
        assert await answers([both.fronts[0].submit([1])]) == [[[2]]]


async def test_requests_before_a_bad_message_hold_up_no_other() -> None:
    async with pair() as both:
        uplink = both.fronts[0].uplink
        uplink.send(Submit(BUNDLE_IDS, 0, 1, (8,), bytes(8), shapes=((1,),)))
        uplink.send(Release((1,)))
        await both.until(lambda: not both.downlinks.links)
        probe = Probe([3])
        both.batcher.submit(probe)  # home's own
        assert await answers([probe]) == [[[6]]]


async def test_of_a_bundle_that_fails_only_the_bad_member_fails() -> None:
    engine = fixed()
    engine.fails = lambda rows: EngineRunError("no") if BAD in rows else None
    async with pair(engine=engine) as both:
        probes = [both.fronts[0].submit([n, n], caller=n) for n in range(10, 16)]
        results = await answers(probes)
        assert slugs(results) == ["input-rejected" if n == BAD else [[2 * n, 2 * n]] for n in range(10, 16)]
        # From now on it is sent alone, so home knows its source, and it cannot fail others again.
        probes = [both.fronts[0].submit([n, n], caller=n) for n in range(10, 16)]
        await both.until(lambda: both.link(0).open)
        callers = [request.callers for request in both.link(0).open.values()]
        assert sorted(callers) == [1, 5]
        await answers(probes)
        probe = both.fronts[0].submit([1, 1], caller=BAD)
        await answers([probe])
        assert probe.batch is not None
        assert probe.batch.reason == SUSPECT
        assert all(probe.answers == 1 for probe in probes)


async def test_a_caller_that_leaves_a_bundle() -> None:
    async with pair(engine=fixed()) as both:
        both.engine.hold()
        first = both.fronts[0].submit([1, 1])
        await both.until(lambda: both.batcher.running_batches)
        probes = [both.fronts[0].submit([n, n]) for n in range(4)]
        await both.until(lambda: both.batcher.queue.rows == 4)
        both.fronts[0].batcher.cancel(probes[2])
        both.engine.release()
        left = [probe for n, probe in enumerate(probes) if n != 2]
        assert await answers([first, *left]) == [[[2, 2]], [[0, 0]], [[2, 2]], [[6, 6]]]
        assert probes[2].answers == 0


async def test_a_bundle_that_all_callers_leave_is_dropped() -> None:
    async with pair(engine=fixed()) as both:
        both.engine.hold()
        first = both.fronts[0].submit([1, 1])
        await both.until(lambda: both.batcher.running_batches)
        probes = [both.fronts[0].submit([n, n]) for n in range(4)]
        await both.until(lambda: both.batcher.queue.rows == 4)
        for probe in probes:
            both.fronts[0].batcher.cancel(probe)
        await both.until(lambda: not both.batcher.queue.rows)
        assert both.batcher.counters.cancelled == 4
        both.engine.release()
        await answers([first])
        await both.until(lambda: not both.fronts[0].uplink._flights.open)
        assert all(probe.answers == 0 for probe in probes)


async def test_a_request_that_is_cancelled_before_it_is_sent() -> None:
    async with pair() as both:
        probe = both.fronts[0].submit([1])
        both.fronts[0].batcher.cancel(probe)
        assert await answers([both.fronts[0].submit([2])]) == [[[4]]]
        assert both.batcher.counters.accepted == 1
        assert probe.answers == 0


@pytest.mark.parametrize("bundled", [True, False])
async def test_blocks_are_used_again(bundled: bool) -> None:
    async with pair(engine=fixed(LONG) if bundled else None) as both:
        for turn in range(5):
            probes = [both.fronts[0].submit([n + turn] * LONG) for n in range(3)]
            assert await answers(probes) == [[[2 * (n + turn)] * LONG] for n in range(3)]
        await both.until(lambda: not both.blocks_of_home())
        assert both.fronts[0].blocks == 0


async def test_a_cancelled_requests_block_is_free_once_home_has_dropped_it() -> None:
    async with pair() as both:
        both.engine.hold()
        first = both.fronts[0].submit([1] * LONG)
        await both.until(lambda: both.batcher.running_batches)
        probe = both.fronts[0].submit([2] * LONG)
        await both.until(lambda: both.batcher.queue.rows)
        both.fronts[0].batcher.cancel(probe)
        assert both.fronts[0].blocks == 2
        await both.until(lambda: both.fronts[0].blocks == 1)
        both.engine.release()
        await answers([first])
        assert both.fronts[0].blocks == 0


async def test_a_full_slab_is_a_full_queue() -> None:
    async with pair(slab_bytes=1 << 17) as both:  # four rows with room for one more element
        both.engine.hold()
        probes = [both.fronts[0].submit([n] * LONG) for n in range(5)]
        with pytest.raises(QueueFullError) as refused:
            await probes[4].answer
        assert refused.value.retry_after_s > 0
        both.engine.release()
        assert await answers(probes[:4]) == [[[2 * n] * LONG] for n in range(4)]


async def test_a_request_larger_than_the_slab() -> None:
    async with pair(slab_bytes=1 << 17) as both:
        probe = both.fronts[0].submit(*[[1] * LONG] * 5)
        assert slugs(await answers([probe])) == ["body-too-large"]


async def test_answers_wait_for_room_in_homes_slab() -> None:
    engine = GatedEngine()
    engine.answer_width = LONG
    async with pair(engine=engine, slab_bytes=1 << 16) as both:
        probes = [both.fronts[0].submit([n, n]) for n in range(9)]
        assert await answers(probes) == [[[2 * n] * LONG] for n in range(9)]
        await both.until(lambda: not both.blocks_of_home())
        assert not both.link(0)._answers._waiting


async def test_a_dead_front_takes_its_queued_rows_along() -> None:
    async with pair(2) as both:
        both.engine.hold()
        running = both.fronts[0].submit([1])
        await both.until(lambda: both.batcher.running_batches)
        queued, other = both.fronts[0].submit([2]), both.fronts[1].submit([3])
        await both.until(lambda: both.batcher.queue.rows == 2)
        both.fronts[0].uplink.end("it dies")
        assert slugs(await answers([running, queued])) == ["starting", "starting"]
        await both.until(lambda: both.batcher.queue.rows == 1)
        both.engine.release()
        assert await answers([other]) == [[[6]]]
        await both.join(0)
        assert await answers([both.fronts[0].submit([5])]) == [[[10]]]


async def test_fronts_refuse_at_once_without_home() -> None:
    async with pair() as both:
        both.engine.hold()
        probe = both.fronts[0].submit([1])
        await both.until(lambda: both.batcher.running_batches)
        both.link(0).end("home dies")
        (failed,) = await answers([probe])
        assert isinstance(failed, Problem)
        assert failed.members["retry_after_s"] == 1
        batcher = both.fronts[0].batcher
        refusal = batcher.refusal()
        assert isinstance(refusal, Problem)
        assert refusal.kind.slug == "starting"
        with pytest.raises(Problem):
            batcher.submit(Probe([2]))
        assert not both.fronts[0].uplinks.models[0].ready
        both.engine.release()
        await both.join(0)
        assert both.fronts[0].uplinks.models[0].ready
        assert await answers([both.fronts[0].submit([5])]) == [[[10]]]


async def test_callers_are_told_if_an_answer_cannot_be_read_after_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair() as both:
        reading: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(uplink, "reads_later", lambda *arguments: True)
        monkeypatch.setattr(uplink, "in_pieces", lambda *arguments: reading)
        probe = both.fronts[0].submit([1])
        link = both.fronts[0].uplink
        await both.until(lambda: both.engine.ran and not link._flights.open)
        link.end("home dies")
        reading.set_exception(MemoryError())
        assert slugs(await answers([probe])) == ["starting"]
        assert probe.answers == 1


async def test_fronts_refuse_while_home_hangs() -> None:
    async with pair() as both:
        uplink, (page,), model = (
            both.fronts[0].uplink,
            both.downlinks.hub.pages,
            both.fronts[0].uplinks.models[0],
        )

        def look(beat_s: float, ready: bool) -> None:
            page.heartbeat_s = beat_s
            uplink._look.cancel()
            uplink._watch()
            assert model.ready is ready
            assert (both.fronts[0].batcher.refusal() is None) is ready

        look(1.0, True)  # however long ago: the machine may have been paused
        for number in range(STALLED_LOOKS):
            look(1.0, number + 1 < STALLED_LOOKS)
        look(2.0, True)
        assert await answers([both.fronts[0].submit([5])]) == [[[10]]]


async def test_a_home_that_has_not_run_yet_is_not_alive() -> None:
    async with pair() as both:
        maker, uplinks = LinkMaker(SLAB_BYTES), both.fronts[0].uplinks
        home, front = maker.make()
        front.handover.close()
        uplinks.use(front)
        for _ in range(2):
            assert not uplinks.is_alive()
            both.fronts[0].uplink._look.cancel()
            both.fronts[0].uplink._watch()
        both.fronts[0].uplink.end("the test ends")
        home.messages.close()
        home.handover.close()
        for fd in (home.slab_in, home.slab_out):
            os.close(fd)
        maker.close()


async def test_a_dead_engine() -> None:
    async with pair() as both:
        both.engine.fails = lambda rows: EngineDeadError("gone")
        assert slugs(await answers([both.fronts[0].submit([1])])) == ["engine-dead"]


async def test_deadlines_and_priorities_are_homes() -> None:
    async with pair() as both:
        both.engine.hold()
        first = both.fronts[0].submit([1])
        await both.until(lambda: both.batcher.running_batches)
        late = both.fronts[0].submit([2], timeout_s=0.02)
        assert slugs(await answers([late]))[0] in ("expired", "deadline-unreachable", "deadline-too-short")
        low = both.fronts[0].submit(*[[n] for n in range(10, 26)])
        high = both.fronts[0].submit(*[[n] for n in range(30, 46)], priority=1)
        await both.until(lambda: both.batcher.queue.rows == 32)
        both.engine.release()
        await answers([first, low, high])
        assert [ran[0] for ran in both.engine.ran] == [1, 30, 10]


async def test_a_drain_waits_for_what_was_sent() -> None:
    async with pair() as both:
        both.engine.hold()
        probe = both.fronts[0].submit([1])
        draining = asyncio.create_task(both.fronts[0].batcher.drain(DEADLINE_S))
        await both.until(lambda: both.batcher.running_batches)
        assert not draining.done()
        both.engine.release()
        assert await draining
        assert probe.answers == 1


def submit(**fields: Any) -> Submit:
    """Return a request with one row of one number, and other fields than that."""
    return Submit(
        **{"id": 32, "model": 0, "rows": 1, "sizes": (8,), "payload": bytes(8), "shapes": ((1,),), **fields}
    )


HOSTILE = {
    "no such model": submit(model=1),
    "a long shape": submit(shapes=((2,),)),
    "a short shape": submit(rows=2),
    "another number of inputs": submit(sizes=(4, 4)),
    "a shape with other axes": submit(shapes=((1, 1),)),
    "no shape": submit(shapes=None),
    "a payload of another length": submit(payload=bytes(9)),
    "a block outside the slab": submit(payload=SLAB_BYTES - 4),
    "a bundle of another number": submit(rows=2, callers=3, sizes=(16,), payload=bytes(16)),
    "an id that is a member's": submit(id=33),
    "a tenant that was not introduced": submit(tenant=7),
    "a rule that is not there": TenantMessage(1, "t", 3),
    "a block that is free": Release((0,)),
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_bad_message_ends_its_own_link_only(message: FromFront) -> None:
    async with pair(2) as both:
        told: list[int] = []
        both.downlinks.on_broken = lambda front, why: told.append(front)
        both.fronts[0].uplink.send(message)
        await both.until(lambda: told)
        assert told == [0]
        assert list(both.downlinks.links) == [1]
        assert await answers([both.fronts[1].submit([5])]) == [[[10]]]


async def test_an_id_in_use_ends_the_link() -> None:
    async with pair() as both:
        both.engine.hold()
        both.fronts[0].uplink.send(submit())
        both.fronts[0].uplink.send(submit())
        await both.until(lambda: not both.downlinks.links)


async def test_a_tenants_account_is_homes(tmp_path: Path) -> None:
    rule = TenantRule(tenant="t", requests_per_s=1.0, burst=5, max_concurrent=3)
    auth, _ = settings_in(tmp_path, tenants=(rule,))
    async with pair(2, auth=auth) as both:
        assert both.home.inference.auth is not None
        account = both.home.inference.auth.tenants.of("t", ())
        tenants = [front.tenant("t") for front in both.fronts]
        both.engine.hold()
        probes = [both.fronts[n % 2].submit([n], tenant=tenants[n % 2]) for n in range(3)]
        await both.until(lambda: account.open_requests == 3)
        refused = both.fronts[0].submit([3], tenant=tenants[0])
        assert slugs(await answers([refused])) == ["tenant-limit"]
        assert tenants[0].open_requests == 3
        both.engine.release()
        assert await answers(probes) == [[[2 * n]] for n in range(3)]
        assert account.usage.answered == 3
        assert tenants[0].open_requests == account.open_requests == 0
        assert tenants[0].bucket is not None
        assert account.bucket is not None
        assert tenants[0].bucket.full_at_s == account.bucket.full_at_s
        probes = [both.fronts[0].submit([n], tenant=tenants[0]) for n in range(2)]
        await answers(probes)
        refusal = both.fronts[0].batcher.refusal(tenant=tenants[0])
        assert isinstance(refusal, TenantLimitError)  # without asking home


async def test_rows_that_leave_at_once_do_not_fill_the_queue() -> None:
    async with pair(max_queue_rows=16) as both:
        both.engine.hold()
        both.fronts[0].submit(*[[row] for row in range(16)])
        await both.until(lambda: both.batcher.running_batches == 1)
        for _ in range(3):
            await asyncio.sleep(0)
        assert both.fronts[0].batcher.refusal(16) is None
        both.fronts[0].submit(*[[row] for row in range(16)])
        await both.until(lambda: both.batcher.running_batches == 2)
        both.fronts[0].submit(*[[row] for row in range(16)])
        await both.until(lambda: both.fronts[0].batcher.refusal() is not None)


class Step(NamedTuple):
    front: int
    rows: int
    width: int
    leaves: bool
    turns: int  # of the loop before the next step


STEPS = st.lists(
    st.builds(
        Step,
        st.integers(0, 1),
        st.integers(1, 20),
        st.sampled_from([1, 2, 3000]),
        st.booleans(),
        st.integers(0, 3),
    ),
    max_size=30,
)


@contextlib.contextmanager
def long_rows(are_long: bool) -> Iterator[None]:
    """Let rows of more than a block be copied in the thread."""
    with contextlib.ExitStack() as stack:
        for module in (uplink, downlink, rows_of_links) if are_long else ():
            stack.enter_context(mock.patch.object(module, "LARGE_BYTES", INLINE_BYTES))
        yield


@examples(30)
@given(steps=STEPS, is_fixed=st.booleans(), is_long=st.booleans())
def test_each_request_is_answered_once_with_its_own_rows(
    steps: list[Step], is_fixed: bool, is_long: bool
) -> None:
    """Of both fronts: some rows fail, some callers leave, and no shared memory stays in use."""

    async def run() -> None:
        engine = fixed() if is_fixed else GatedEngine(16)
        engine.fails = lambda rows: EngineRunError("no") if (rows % 10 == 3).any() else None
        async with pair(2, engine=engine, slab_bytes=1 << 22) as both:
            asked: list[tuple[Probe, int, int, int]] = []
            left: list[tuple[FrontEnd, Probe]] = []
            for number, step in enumerate(steps):
                width, rows = (2, 1 + step.rows % 3) if is_fixed else (step.width, step.rows)
                first = number * 100 + step.turns
                front = both.fronts[step.front]
                probe = front.submit(*[[first + row] * width for row in range(rows)])
                if step.leaves:
                    left.append((front, probe))
                else:
                    asked.append((probe, first, rows, width))
                for _ in range(step.turns):
                    await asyncio.sleep(0)
                for its_front, gone in left:
                    its_front.batcher.cancel(gone)
            for (probe, first, rows, width), got in zip(
                asked, await answers([probe for probe, *_ in asked]), strict=True
            ):
                bad = any((first + row) % 10 == 3 for row in range(rows))
                expected = [[2 * (first + row)] * width for row in range(rows)]
                assert slugs([got])[0] in ("input-rejected", "run-failed") if bad else got == expected
                assert probe.answers == 1
            assert all(probe.answers <= 1 for _, probe in left)
            await both.until(lambda: not any(link.open for link in both.downlinks.links.values()))
            await both.until(lambda: not any(front.flying or front.blocks for front in both.fronts))
            await both.until(lambda: not any(both.blocks_of_home(number) for number in range(2)))

    with long_rows(is_long):
        asyncio.run(run())


class Fault(NamedTuple):
    front: int
    rows: int
    ends: str  # the process that is killed after this step
    turns: int  # of the loop before that


FAULTS = st.lists(
    st.builds(
        Fault,
        st.integers(0, 1),
        st.integers(1, 20),
        st.sampled_from(["", "", "", "front", "home"]),
        st.integers(0, 6),
    ),
    max_size=20,
)


@examples(30)
@given(steps=FAULTS, is_fixed=st.booleans(), is_long=st.booleans())
def test_a_killed_process_loses_only_its_own_requests(
    steps: list[Fault], is_fixed: bool, is_long: bool
) -> None:
    """All others are answered with their rows, each request once, and no row runs twice."""

    async def run() -> None:
        engine = fixed() if is_fixed else GatedEngine(16)
        async with pair(2, engine=engine, slab_bytes=1 << 22) as both:
            asked: list[tuple[Probe, int, list[list[int]]]] = []
            lost: set[int] = set()  # ids of probes that were in flight on a link that ended
            for number, step in enumerate(steps):
                width = 2 if is_fixed or not is_long else 3000
                rows = [[number * 100 + row] * width for row in range(step.rows)]
                asked.append((both.fronts[step.front].submit(*rows), step.front, rows))
                for _ in range(step.turns):
                    await asyncio.sleep(0)
                ended = {"front": [step.front], "home": [0, 1]}.get(step.ends, [])
                lost |= {id(probe) for probe, front, _ in asked if front in ended and not probe.answer.done()}
                for front in ended:
                    if step.ends == "front":
                        both.fronts[front].uplink.end("it is killed")
                    else:
                        both.link(front).end("it is killed")
                for front in ended:
                    await both.until(lambda front=front: both.fronts[front].uplinks.current is None)
                    await both.until(lambda front=front: front not in both.downlinks.links)
                    await both.join(front)
            got = await answers([probe for probe, *_ in asked])
            for (probe, _, rows), answer in zip(asked, got, strict=True):
                assert probe.answers == 1
                if isinstance(answer, Exception):
                    assert id(probe) in lost
                    assert slugs([answer]) == ["starting"]
                else:
                    assert answer == [[2 * value for value in row] for row in rows]
            ran = [first for batch in engine.ran for first in batch]
            assert len(ran) == len(set(ran))
            await both.until(lambda: not any(link.open for link in both.downlinks.links.values()))
            await both.until(lambda: not any(front.flying or front.blocks for front in both.fronts))
            await both.until(lambda: not any(both.blocks_of_home(number) for number in range(2)))

    with long_rows(is_long):
        asyncio.run(run())
