"""Splitting: a request with more rows than a batch takes is cut into parts, and joined again.

The parts are ordinary requests in the queue and share batches with others. The caller is told once: when all
parts are answered, or when the first one fails, which cancels the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from cobatch.batcher.request import Batch, Payload, Request
from cobatch.batcher.rows.copying import Array, copied


class Part(Request):
    """Consecutive rows of `whole`, with a copy of their outputs until all parts are done."""

    __slots__ = ("_source", "on_done", "outputs", "whole")

    def __init__(
        self, whole: Request, payloads: list[Payload], rows: int, on_done: Callable[[Part], None]
    ) -> None:
        super().__init__(rows, whole.row_shapes, payloads)
        self.tenant = whole.tenant
        self.priority = whole.priority
        self.deadline_s = whole.deadline_s
        self.timeout_s = whole.timeout_s
        self.pad = whole.pad
        self.whole: Request | None = whole
        self._source = whole.source
        self.on_done = on_done
        self.outputs: Sequence[Array] = ()

    @property
    def source(self) -> Hashable:
        return self._source

    def done(self) -> None:
        try:
            if self.error is None:
                assert self.batch is not None
                end = self.first_row + self.rows
                rows = [output[self.first_row : end] for output in self.batch.outputs]
                # Else the engine writes the next batch into these buffers.
                self.outputs = rows if self.batch.lasting else [copied(own) for own in rows]
        except Exception as error:  # noqa: BLE001 - such as out of memory: the whole must fail
            self.batch = None
            self.error = error
        self.on_done(self)


def cut(whole: Request, most_rows: int, on_done: Callable[[Part], None]) -> list[Part]:
    """Cut `whole` into parts of at most `most_rows` rows. Payloads are sliced as views, not copied."""
    views = [p if isinstance(p, list) else memoryview(p).cast("B") for p in whole.payloads]
    per_row = [len(view) // whole.rows for view in views]
    parts: list[Part] = []
    for first in range(0, whole.rows, most_rows):
        end = min(first + most_rows, whole.rows)
        payloads: list[Payload] = [v[first * n : end * n] for v, n in zip(views, per_row, strict=True)]
        part = Part(whole, payloads, end - first, on_done)
        part.callers = 0 if parts else 1  # together they answer one
        parts.append(part)
    return parts


def joint(parts: list[Part]) -> Batch:
    """Return a batch as if it had run all parts, in order; `join` gives it its outputs.

    At least one part has run. The times before the run are the first part's; the run lasts as long as all
    runs together; `rows` is the largest batch's.
    """
    batches = [part.batch for part in parts if part.error is None and part.batch is not None]
    batch = batches[0].for_one(batches)
    batch.rows = max(b.rows for b in batches)
    batch.finished_s = batch.started_s + sum(b.finished_s - b.started_s for b in batches)
    batch.lasting = True
    return batch


def pieces(parts: list[Part]) -> list[tuple[Array, ...]]:
    """Return, for each output, its rows of each part; those of failed parts are zeros (b"" for BYTES)."""
    ran = next(part.outputs for part in parts if part.error is None)
    rows = [[_zeros(output, part.rows) for output in ran] if part.error else part.outputs for part in parts]
    return list(zip(*rows, strict=True))


def _zeros(like: Array, rows: int) -> Array:
    zero = np.array(b"" if like.dtype == object else 0, like.dtype)
    return np.broadcast_to(zero, (rows, *like.shape[1:]))


def join(outputs: list[tuple[Array, ...]]) -> list[Array]:
    """Return each output in one piece, in any thread. Raises ValueError if shapes differ beside the rows."""
    return [np.concatenate(rows) for rows in outputs]


def release(parts: list[Request]) -> None:
    """Break the reference cycles between parts and their whole, and drop the parts' outputs."""
    for part in parts:
        assert isinstance(part, Part)
        part.on_done = _ignore
        part.whole = None
        part.outputs = ()


def _ignore(part: Part) -> None:
    """Ignore a part whose whole is answered already."""
