"""Answers of a batch on their way to fronts: their common part, the rows of each front, and their blocks.

A payload that waits for a block of the slab is kept here meanwhile, as it would be in a socket's buffer.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from cobatch.batcher.request import Batch
from cobatch.engines.link.messages import INLINE_BYTES, Answers, BatchInfo, Failed, ToFront
from cobatch.engines.link.slab import SlabWriter
from cobatch.server.links.rows import LARGE_BYTES, Buffer, output_bytes
from cobatch.server.v2.pieces import in_pieces, release


class SharedRows:
    """The common part of the answers of a batch, on all links.

    `row_size`: bytes of a row of all outputs, `strings`: elements of its BYTES outputs.
    """

    __slots__ = ("_row_bytes", "_wholes", "info", "outputs", "row_size", "shapes", "strings")

    def __init__(self, batch: Batch) -> None:
        outputs = batch.outputs
        self.info = info_of(batch)
        self.shapes = tuple([output.shape[1:] for output in outputs])
        # Of a BYTES tensor, whose rows differ, 0.
        self._row_bytes = [0 if one.dtype == object else one.nbytes // len(one) for one in outputs]
        self.strings = sum([one.size // len(one) for one in outputs if one.dtype == object])
        self._wholes: list[memoryview | None] = [None] * len(outputs)
        self.outputs = len(outputs)
        self.row_size = sum(self._row_bytes)

    def rows(self, batch: Batch, first: int, rows: int) -> list[Buffer]:
        """Return some rows of each output: of numbers, views of a copy of all."""
        pieces: list[Buffer] = []
        for index, row_bytes in enumerate(self._row_bytes):
            output, whole = batch.outputs[index], self._wholes[index]
            if output.dtype == object:
                pieces.append(output_bytes(output[first : first + rows]))
                continue
            if whole is None:
                whole = self._wholes[index] = memoryview(output.tobytes())
            pieces.append(whole[first * row_bytes : (first + rows) * row_bytes])
        return pieces


class AnswerGroup:
    """Answers of one batch for one front. `columns`: the pieces of each output."""

    __slots__ = ("columns", "ids", "model", "places", "shared")

    def __init__(self, shared: SharedRows, model: int) -> None:
        self.shared = shared
        self.model = model
        self.ids: list[int] = []
        self.places: list[int] = []
        self.columns: list[list[Buffer]] = [[] for _ in range(shared.outputs)]

    def add(self, id_: int, first_row: int, pieces: Sequence[Buffer]) -> None:
        """Add the rows of a request, which begin in this row of the batch."""
        self.ids.append(id_)
        self.places.append(first_row)
        for column, piece in zip(self.columns, pieces, strict=True):
            column.append(piece)

    def hold(self, id_: int, first_row: int, columns: Sequence[Sequence[Buffer]]) -> None:
        """Hold the rows of one request alone, each output in pieces."""
        self.ids, self.places = [id_], [first_row]
        self.columns = [list(pieces) for pieces in columns]


class AnswerWriter:
    """Writes answers into the slab of a link. `post` sends a message, `end` ends the link."""

    def __init__(self, slab: SlabWriter, post: Callable[[ToFront], None], end: Callable[[str], None]) -> None:
        self._slab = slab
        self._post = post
        self._end = end
        self._waiting: deque[tuple[Answers, list[Buffer], int]] = deque()  # for a block

    def close(self) -> None:
        """Forget the answers that wait, and the link, which has ended."""
        self._waiting.clear()
        self._post = self._end = _ignore

    def post(self, group: AnswerGroup) -> None:
        """Send the answers of a group, once there is a block for them."""
        sizes = tuple([sum(map(len, column)) for column in group.columns])
        size = sum(sizes)
        buffers = [piece for column in group.columns for piece in column]
        # Answers that wait have the next blocks: a large one would else be overtaken for ever.
        waits = self._waiting and size > INLINE_BYTES
        payload = None if waits else self._block_for(buffers, size)
        shared = group.shared
        answers = Answers(
            group.model,
            shared.info,
            tuple(group.ids),
            tuple(group.places),
            shared.shapes,
            sizes,
            0 if payload is None else payload,
        )
        if payload is not None:
            self._post_rows(answers, buffers, size)
        elif size <= self._slab.size:
            self._waiting.append((answers, buffers if size > LARGE_BYTES else [b"".join(buffers)], size))
        else:
            members = {"body_bytes": size, "limit_bytes": self._slab.size}
            detail = f"the outputs have {size} bytes, the limit is {self._slab.size}"
            for id_ in group.ids:
                self._post(Failed(id_, "result-too-large", detail, members, batch=shared.info))

    def post_waiting(self) -> None:
        """Send answers for which there is a block now."""
        while self._waiting:
            answers, buffers, size = self._waiting[0]
            payload = self._block_for(buffers, size)
            if payload is None:
                return
            self._waiting.popleft()
            self._post_rows(msgspec.structs.replace(answers, payload=payload), buffers, size)

    def _block_for(self, buffers: list[Buffer], size: int) -> bytes | int | None:
        """Return the place of an answer's rows, which are there already unless they are long."""
        slab = self._slab
        return slab.reserve(size) if size > LARGE_BYTES else slab.place(buffers, size)

    def _post_rows(self, answers: Answers, buffers: list[Buffer], size: int) -> None:
        """Send an answer, a long one once it is in its block: its buffers are copies of outputs."""
        if size <= LARGE_BYTES:
            self._post(answers)
            return
        filling = in_pieces(self._slab.fill, answers.payload, buffers, release)  # type: ignore[arg-type]  # an offset
        filling.add_done_callback(partial(self._on_filled, answers))

    def _on_filled(self, answers: Answers, filling: asyncio.Future[None]) -> None:
        error = filling.exception()
        if error is None:
            self._post(answers)
        else:
            self._end(f"an answer could not be copied: {error!r}")


def _ignore(_: object) -> None:
    pass


def info_of(batch: Batch) -> BatchInfo:
    """Return a batch as messages describe it."""
    return BatchInfo(
        batch.number,
        batch.rows,
        batch.reason,
        batch.engine,
        batch.slot,
        batch.gathered_s,
        batch.dispatched_s,
        batch.started_s,
        batch.finished_s,
        batch.failed,
        tuple([info_of(one) for one in batch.joined]),
    )
