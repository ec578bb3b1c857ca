"""Padding in the batcher: which bucket a request goes to, the engine's input, each caller's rows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatchFailedError, LengthMismatchError, TooLongError
from cobatch.batcher.request import Batch, Request, State
from cobatch.batcher.rows.packing import pack
from cobatch.batcher.rows.padding import Length, Mask, Padder, Where
from cobatch.batcher.scheduling.policy import IDLE
from cobatch.engines.base import RowShapes, Signature, TensorSpec
from tests.support.virtual.loop import Array, Call, FakeEngine, FakeWorker, run

SIGNATURE = FakeEngine().signature
ROW = Where(0, 0)
PAD = 7


class Requested(Request):
    def done(self) -> None:
        raise AssertionError("nothing runs")


def padder(*buckets: int, outputs: tuple[Where, ...] = (ROW,), signature: Signature = SIGNATURE) -> Padder:
    return Padder(signature, [Length((ROW,), outputs, buckets)], [np.int64(PAD)] * len(signature.inputs))


def make(worker: FakeWorker, made: Padder | None) -> Batcher:
    loop = asyncio.get_running_loop()
    return Batcher("fake", [worker], max_queue_rows=1000, padder=made, loop=loop, clock=loop.time)


def widths(*sizes: int, rows: int = 1) -> list[Call]:
    return [
        Call([[100 * n + 10 * row + column for column in range(size)] for row in range(rows)])
        for n, size in enumerate(sizes, 1)
    ]


async def answer(batcher: Batcher) -> None:
    """Wait until every request is answered."""
    assert await batcher.drain(60)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (127, 128), (128, 128), (129, 256), (2**40 + 1, 2**41)],
)
def test_buckets_are_powers_of_two(size: int, bucket: int) -> None:
    assert Length((ROW,)).bucket(size) == bucket


@pytest.mark.parametrize(("size", "bucket"), [(0, 3), (3, 3), (4, 5), (5, 5), (6, None)])
def test_buckets_may_be_listed(size: int, bucket: int | None) -> None:
    assert Length((ROW,), buckets=(3, 5)).bucket(size) == bucket


def test_what_fits_its_bucket_is_left_as_it_is() -> None:
    made = padder()
    exact, short = Requested(1, ((4,),), [bytes(32)]), Requested(1, ((3,),), [bytes(24)])
    assert made.assign(exact) is made.assign(short) is None
    assert exact.row_shapes == short.row_shapes == ((4,),)
    assert exact.pad is None
    assert short.pad is not None
    assert short.pad.row_padding == 1


def test_requests_of_different_lengths_share_a_batch() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine())
        batcher = make(worker, padder())
        calls = widths(3, 4, 2, 1, 3)
        for call in calls:
            batcher.submit(call)
        await answer(batcher)
        for call in calls:
            call.check()
        # Those of 3 and 4 elements, and those as long as their bucket.
        assert sorted(rows for _, rows in worker.ran) == [1, 1, 3]
        assert {bucket: one.rows for bucket, one in batcher.counters.padding.items()} == {
            (1,): 1, (2,): 1, (4,): 3,
        }  # fmt: skip

    run(main())


def test_the_engine_sees_padding_and_no_rows_of_other_requests() -> None:
    seen: list[Array] = []

    async def main() -> None:
        engine = FakeEngine()
        engine.fails = lambda rows: seen.append(rows.copy())
        batcher = make(FakeWorker(engine), padder(4))
        calls = widths(1, 4, 3)
        for call in calls:
            batcher.submit(call)
        await answer(batcher)

    run(main())
    (batch,) = seen
    assert batch.tolist() == [[100, PAD, PAD, PAD], [200, 201, 202, 203], [300, 301, 302, PAD]]


def test_without_rule_lengths_stay_apart() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine())
        batcher = make(worker, None)
        calls = widths(3, 4)
        for call in calls:
            batcher.submit(call)
        await answer(batcher)
        assert len(worker.ran) == 2
        assert batcher.counters.padding_total is None
        assert all(call.pad is None for call in calls)

    run(main())


def test_an_output_that_is_not_said_to_follow_is_not_cut() -> None:
    async def main() -> None:
        batcher = make(FakeWorker(FakeEngine()), padder(4, outputs=()))
        (call,) = widths(3)
        batcher.submit(call)
        await answer(batcher)
        assert isinstance(call.answer, np.ndarray)
        assert call.answer.tolist() == [[200, 202, 204, 2 * PAD]]

    run(main())


def test_an_output_of_unexpected_length_fails_its_requests() -> None:
    class Halves(FakeWorker):
        """y is half as long as x, which the configuration did not say."""

        def _end(self, job: Any, started_s: float) -> None:
            buffer = self.engine.buffers[job.slot]
            self.engine.buffers[job.slot] = buffer[:, ::2]
            super()._end(job, started_s)

    async def main() -> None:
        batcher = make(Halves(FakeEngine()), padder(4))
        short, exact = widths(3, 4)
        batcher.submit(short)
        batcher.submit(exact)
        await answer(batcher)
        assert isinstance(short.answer, BatchFailedError)
        assert isinstance(exact.answer, np.ndarray)
        assert batcher.counters.failed == 1

    run(main())


def test_too_long_is_refused_and_counted() -> None:
    async def main() -> None:
        batcher = make(FakeWorker(FakeEngine()), padder(2, 4))
        fits, not_quite = widths(4, 5)
        batcher.submit(fits)
        with pytest.raises(TooLongError, match="'x' has 5 elements along axis 1, at most 4 fit") as caught:
            batcher.submit(not_quite)
        assert (caught.value.expected, caught.value.actual, caught.value.limit) == ([-1, -1], [1, 5], 4)
        assert batcher.counters.refusals == {"length": 1}
        assert batcher.queue.rows == 1
        await answer(batcher)
        fits.check()

    run(main())


def test_a_request_of_many_rows_is_cut_padded_and_put_together() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=4))
        batcher = make(worker, padder())
        (call,) = widths(3, rows=9)
        batcher.submit(call)
        await answer(batcher)
        call.check()
        assert [rows for _, rows in worker.ran] == [4, 4, 1]
        total = batcher.counters.padding_total
        assert total is not None
        assert (total.rows, total.elements, total.padding, total.waste) == (9, 36, 9, 0.25)

    run(main())


def test_a_cancelled_request_costs_the_others_nothing() -> None:
    async def main() -> None:
        batcher = make(FakeWorker(FakeEngine()), padder(4))
        gone, stays = widths(3, 2)
        batcher.submit(gone)
        batcher.submit(stays)
        batcher.cancel(gone)
        await answer(batcher)
        stays.check()
        assert gone.state is State.CANCELLED
        assert not gone.answers

    run(main())


def test_outputs_are_not_kept_after_the_answer() -> None:
    """Neither the engine's buffers nor copies of them, even if a caller keeps its request."""

    async def main() -> None:
        batcher = make(FakeWorker(FakeEngine()), padder(4))
        (call,) = widths(3)
        batcher.submit(call)
        await answer(batcher)
        assert call.batch is not None
        assert not call.batch.outputs
        assert not call.batch.requests
        assert call.batch.rows == 1

    run(main())


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 11)), min_size=1, max_size=20),
    st.sampled_from([(), (40,), (3, 17, 40), (1, 2, 4, 8, 16, 32, 40)]),
    st.integers(1, 8),
)
def test_every_request_gets_its_own_rows_at_any_length(
    sizes: list[tuple[int, int]], buckets: tuple[int, ...], most: int
) -> None:
    async def main() -> None:
        batcher = make(FakeWorker(FakeEngine(max_batch_size=most)), padder(*buckets))
        calls = [widths(size, rows=rows)[0] for size, rows in sizes]
        for call in calls:
            batcher.submit(call)
        await answer(batcher)
        for call in calls:
            call.check()
        total = batcher.counters.padding_total
        assert total is not None
        assert total.rows == sum(rows for _, rows in sizes)
        assert total.elements - total.padding == sum(size * rows for size, rows in sizes)

    run(main())


# More than one axis, input and length

IMAGE = Signature(
    inputs=(TensorSpec("image", "FP32", (3, -1, -1)), TensorSpec("size", "INT32", (2,))),
    outputs=(TensorSpec("y", "FP32", (-1, -1, 3)),),
)


def shapes_after(made: Padder, shapes: RowShapes) -> RowShapes:
    request = Requested(1, shapes, [])
    assert made.assign(request) is None
    return request.row_shapes


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 3))
def test_two_axes_of_one_input(height: int, width: int, rows: int) -> None:
    lengths = [Length((Where(0, 1),), (Where(0, 0),), (4, 9)), Length((Where(0, 2),), (Where(0, 1),))]
    made = Padder(IMAGE, lengths, [np.float32(-1), None])
    assert shapes_after(made, ((3, 4, 5), (2,))) == ((3, 4, 8), (2,))
    image = np.arange(rows * 3 * height * width, dtype=np.float32).reshape(rows, 3, height, width)
    request = Requested(rows, ((3, height, width), (2,)), [image.tobytes(), bytes(8 * rows)])
    assert made.assign(request) is None
    (_, full_height, full_width), _ = request.row_shapes
    buffers = [np.full((4, *shape), 99, np.float32) for shape in request.row_shapes]
    buffers[1] = buffers[1].astype(np.int32)
    pack([request], buffers)
    expected = np.full((rows, 3, full_height, full_width), -1, np.float32)
    expected[:, :, :height, :width] = image
    assert np.array_equal(buffers[0][:rows], expected)
    assert (buffers[0][rows:] == 99).all()
    if request.pad is not None:
        (cut,) = request.pad.outputs
        assert cut is not None
        assert np.zeros((rows, full_height, full_width, 3))[cut.body].shape == (rows, height, width, 3)


TEXT = Signature(
    inputs=(
        TensorSpec("ids", "INT64", (-1,)),
        TensorSpec("types", "INT32", (1, -1)),
        TensorSpec("mask", "BOOL", (-1,)),
        TensorSpec("word", "BYTES", (-1,)),
    ),
    outputs=(TensorSpec("y", "FP32", (4,)),),
)


def text_padder(*buckets: int) -> Padder:
    mask = Mask(2, (-1,), b"\1")
    first = Length((Where(0, 0), Where(1, 1), Where(2, 0)), (), buckets, mask)
    return Padder(TEXT, [first, Length((Where(3, 0),))], [np.int64(1), np.int32(2), np.bool_(False), b"-"])


def test_several_inputs_share_a_length() -> None:
    made = text_padder(5)
    shapes: list[tuple[int, ...]] = [(3,), (1, 3), (), (3,)]
    payloads: list[Any] = [
        np.arange(6).tobytes(), np.arange(6, dtype=np.int32).tobytes(), None, [b"a"] * 6
    ]  # fmt: skip
    made.add_masks(2, shapes, payloads)
    assert shapes[2] == (3,)
    request = Requested(2, tuple(shapes), payloads)
    assert made.assign(request) is None
    assert request.row_shapes == ((5,), (1, 5), (5,), (4,))
    padded = made.padded(Batch([request], 2, request.row_shapes, IDLE))
    assert padded == ((5, 4), 2 * (5 + 5 + 5 + 4), 2 * 7)
    assert request.pad is not None
    assert request.pad.row_padding == 2 + 2 + 2 + 1
    assert request.pad.outputs == (None,)
    buffers = [
        np.zeros((3, *shape), spec.dtype) for shape, spec in zip(request.row_shapes, TEXT.inputs, strict=True)
    ]
    pack([request], buffers)
    assert buffers[0][:2].tolist() == [[0, 1, 2, 1, 1], [3, 4, 5, 1, 1]]
    assert buffers[1][:2].tolist() == [[[0, 1, 2, 2, 2]], [[3, 4, 5, 2, 2]]]
    assert buffers[2][:2].tolist() == [[True] * 3 + [False] * 2] * 2
    assert buffers[3][:2].tolist() == [[b"a", b"a", b"a", b"-"]] * 2


def test_a_mask_that_came_is_kept() -> None:
    shapes: list[tuple[int, ...]] = [(2,), (1, 2), (2,), (1,)]
    payloads: list[Any] = [bytes(16), bytes(8), b"\1\0", [b"a"]]
    text_padder().add_masks(1, shapes, payloads)
    assert payloads[2] == b"\1\0"


@pytest.mark.parametrize(
    ("shapes", "tensor", "expected", "actual"),
    [
        (((3,), (1, 4), (3,), (1,)), "types", [-1, 1, 3], [1, 1, 4]),
        (((3,), (1, 3), (2,), (1,)), "mask", [-1, 3], [1, 2]),
    ],
)
def test_inputs_that_share_a_length_must_have_it(
    shapes: RowShapes, tensor: str, expected: Sequence[int], actual: Sequence[int]
) -> None:
    error = text_padder().assign(Requested(1, shapes, []))
    assert isinstance(error, LengthMismatchError)
    assert (error.tensor, error.expected, error.actual) == (tensor, expected, actual)
    assert "'ids' has 3: they must have the same length" in str(error)


def test_a_payload_of_the_wrong_size_is_refused() -> None:
    made = padder(4)
    request = Requested(1, ((3,),), [bytes(16)])
    assert made.assign(request) is None
    with pytest.raises(ValueError, match=r"reshape|assignment"):
        pack([request], [np.zeros((2, 4), np.int64)])


def test_lengths_that_callers_send_are_not_remembered_for_ever() -> None:
    made = padder()
    for size in range(10_000):
        shapes_after(made, ((size,),))
    assert len(made._pads) <= 4096
