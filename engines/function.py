"""An engine that runs a Python function: a list of items in, one result for each of them out."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np

from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec
from cobatch.engines.errors import CallerError, ResultCountError
from cobatch.engines.worker import Job, Outcome, Worker

log = logging.getLogger("cobatch.worker")

# The items have no shape, unless they are stacked: then those of one shape share a batch.
_ITEMS = TensorSpec("items", "BYTES", ())
_STACKED = TensorSpec("items", "BYTES", (-1,))
_RESULTS = TensorSpec("results", "BYTES", ())
_LISTS = (list, tuple, np.ndarray)


class FunctionEngine:
    """Runs `function` on the items of a batch, which `fill` sets. With `stack` they are arrays of one shape
    and dtype, and it gets one array of them.

    Results are an array of objects, copies of the rows if the function returns one array.
    """

    platform = "python_function"
    slots = 2

    def __init__(
        self, function: Callable[[Any], Any], name: str, *, max_batch_size: int, stack: bool = False
    ) -> None:
        self.max_batch_size = max_batch_size
        self.signature = Signature((_STACKED if stack else _ITEMS,), (_RESULTS,))
        self._function = function
        self._name = name
        self._stack = stack
        self._items: list[list[Any]] = [[] for _ in range(self.slots)]

    def open(self) -> None:
        """Do nothing."""

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """Return no buffers: nothing is copied."""
        return ()

    def fill(self, slot: int, items: list[Any]) -> None:
        """Set the items of a slot's next batch."""
        self._items[slot] = items

    def take(self, slot: int) -> Any:
        """Return the function's argument for a slot's batch, and forget its items."""
        items, self._items[slot] = self._items[slot], []
        return np.stack(items) if self._stack else items

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Do nothing: `wait` runs the batch."""

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Run the batch. Raises CallerError."""
        rows = len(self._items[slot])
        try:
            return (self.checked(self._function(self.take(slot)), rows),)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller hears of it
            raise as_caller_error(error, self._name) from None

    def checked(self, results: Any, rows: int) -> Array:
        """Return the results as an array. Raises TypeError or ResultCountError."""
        if not isinstance(results, _LISTS):
            self._check_type(results)
        if len(results) != rows:
            text = f"{self._name} returned {len(results)} results for {rows} items, not one for each"
            log.error(text)
            raise ResultCountError(text)
        if isinstance(results, np.ndarray) and (results.dtype != object or results.ndim > 1):
            # The function may use it for the next batch, and each row alone would keep all of it in memory.
            results = [row.copy() for row in results]
        return np.fromiter(results, object, rows)

    def _check_type(self, results: Any) -> None:
        is_list = hasattr(results, "__len__") and hasattr(results, "__getitem__")
        if not is_list or isinstance(results, str | bytes | Mapping):
            raise TypeError(f"{self._name} returned {type(results).__name__}, it must return a list")

    def kill(self) -> None:
        """Do nothing: a thread cannot be ended."""

    def close(self) -> None:
        """Do nothing."""


def as_caller_error(error: BaseException, name: str) -> CallerError:
    """Return the error for a batch whose function raised.

    The caller cannot get an exception that would end its task or its generator as it is.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        return CallerError(error)
    wrapped = RuntimeError(f"{name} raised {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return CallerError(wrapped)


class FunctionWorker(Worker):
    """A worker that does not warm its engine up, since no item is known."""

    def _warm_up(self) -> None:
        """Do nothing."""

    def _deliver(self, job: Job, outcome: Outcome) -> None:
        handed = outcome
        if outcome.error is not None:
            # The exception refers to the frames that it passed, of which one has the outcome: a cycle.
            handed = msgspec.structs.replace(outcome)
            outcome.error = None
        super()._deliver(job, handed)
