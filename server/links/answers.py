"""Answers of a batch on their way to fronts: their common part, and the rows of each front."""

from collections.abc import Sequence

from cobatch.batcher.request import Batch
from cobatch.engines.link.messages import BatchInfo
from cobatch.server.links.rows import Buffer, output_bytes


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
