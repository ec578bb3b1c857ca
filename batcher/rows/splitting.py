"""Splitting: a request with more rows than a batch takes is cut into parts, and joined again.

The parts are ordinary requests in the queue and share batches with others. The caller is told once: when all
parts are answered, or when the first one fails, which cancels the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from cobatch.batcher.request import Batch, Payload, Request, State
from cobatch.batcher.rows.copying import copied


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
        self.outputs: Sequence[np.ndarray[Any, Any]] = ()

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


def join(whole: Request, parts: list[Part]) -> Batch:
    """Give `whole` the outputs of all its parts, in order, as if one batch had run them.

    At least one part has run; the rows of failed parts are zeros (b"" for BYTES). The times before the run
    are the first part's; the run lasts as long as all runs together; `rows` is the largest batch's. Raises
    ValueError if the parts' outputs differ in shape beside the rows.
    """
    batches = [part.batch for part in parts if part.error is None and part.batch is not None]
    ran = next(part.outputs for part in parts if part.error is None)
    for part in parts:
        if part.error is not None:
            part.outputs = [
                np.full((part.rows, *output.shape[1:]), b"" if output.dtype == object else 0, output.dtype)
                for output in ran
            ]
    whole.batch = batch = batches[0].for_one(batches)
    batch.rows = max(b.rows for b in batches)
    batch.finished_s = batch.started_s + sum(b.finished_s - b.started_s for b in batches)
    batch.lasting = True
    batch.outputs = [np.concatenate(rows) for rows in zip(*(part.outputs for part in parts), strict=True)]
    whole.first_row = 0
    whole.state = State.DONE
    return batch


def release(parts: list[Request]) -> None:
    """Break the reference cycles between parts and their whole, and drop the parts' outputs."""
    for part in parts:
        assert isinstance(part, Part)
        part.on_done = _ignore
        part.whole = None
        part.outputs = ()


def _ignore(part: Part) -> None:
    """Ignore a part whose whole is answered already."""
