"""A Python function in a process of its own: items and results are pickled, as elements of BYTES tensors.

The process has the model `Calls`, which finds the function by its module and name.
"""

import importlib
import importlib.util
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from cobatch.engines.base import Array, Batching, RowShapes
from cobatch.engines.errors import CallerError, EngineDeadError, EngineLoadError
from cobatch.engines.function import FunctionEngine, as_caller_error
from cobatch.engines.python.engine import ProcessEngine

# Before the pickle of an exception; one of a result begins otherwise.
_RAISED = b"!"
_NO_SHAPE: RowShapes = ((),)


class Reference(NamedTuple):
    """Where another process finds a function: `path` is the program's, if its module is `__main__`."""

    module: str
    path: str
    qualname: str
    name: str
    stack: bool


def refer_to(function: Callable[..., Any], name: str, *, stack: bool) -> Reference:
    """Return the reference to a function. Raises TypeError if another process cannot import it."""
    module, qualname = getattr(function, "__module__", ""), getattr(function, "__qualname__", "<locals>")
    main = sys.modules["__main__"]
    path = ""
    if module == "__main__":
        spec = main.__spec__
        module, path = ("", getattr(main, "__file__", "")) if spec is None else (spec.name, "")
    if "<locals>" in qualname or not (module or path):
        raise TypeError(f"{name} cannot run in a process: it must be a function of a module or a program")
    return Reference(module, path and os.path.realpath(path), qualname, name, stack)


class PickledEngine(FunctionEngine):
    """Runs a function in a process of its own; see `FunctionEngine` and `ProcessEngine`."""

    asynchronous = True

    def __init__(self, reference: Reference, max_batch_size: int) -> None:
        super().__init__(_elsewhere, reference.name, max_batch_size=max_batch_size, stack=reference.stack)
        self._reference = reference
        self._dead = ""
        self._engine = ProcessEngine(
            f"{__name__}:{Calls.__name__}",
            max_batch_size,
            sys.path[0] or ".",
            0,
            Batching("on"),
            name=reference.name,
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def open(self) -> None:
        """Start the process; if that fails, each run does."""
        try:
            self._engine.open()
        except EngineLoadError as error:
            self._dead = str(error)

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Send the batch. Raises CallerError for items that cannot be pickled, and EngineDeadError."""
        if self._dead:
            raise EngineDeadError(self._dead)
        items, self._items[slot] = self._items[slot], []
        try:
            pickles = [pickle.dumps(item) for item in items]
        except Exception as error:  # noqa: BLE001 - the item's own code
            raise as_caller_error(error, self._name) from None
        pickles[0] = pickle.dumps((self._reference, pickles[0]))
        (calls,) = self._engine.inputs(slot, rows, _NO_SHAPE)
        calls[:rows] = pickles
        self._engine.enqueue(slot, rows, _NO_SHAPE)

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Wait for the results. Raises CallerError, and EngineEndedError."""
        (answers,) = self._engine.wait(slot)
        if answers[0].startswith(_RAISED):
            raise CallerError(pickle.loads(answers[0][len(_RAISED) :]))  # noqa: S301 - of our own process
        try:
            results = (pickle.loads(answer) for answer in answers)  # noqa: S301
            return (np.fromiter(results, object, len(answers)),)
        except Exception as error:  # noqa: BLE001 - the result's own code
            raise as_caller_error(error, self._name) from None

    def kill(self) -> None:
        """End the process at once."""
        self._engine.kill()

    def close(self) -> None:
        """End the process."""
        self._engine.close()


class Calls:
    """The model in the process. A batch's first element has the reference to the function, too."""

    inputs = {"calls": ("BYTES", [-1])}  # noqa: RUF012 - as in any model
    outputs = {"answers": ("BYTES", [-1])}  # noqa: RUF012

    def predict(self, batch: dict[str, Array]) -> Array:
        """Run the function; an exception is the answer."""
        calls = batch["calls"]
        try:
            answers = _run(calls.tolist())
        except Exception as error:  # noqa: BLE001 - of the function
            answers = [_RAISED + _pickled(error), *[b""] * (len(calls) - 1)]
        return np.fromiter(answers, object, len(calls))


def _run(calls: Sequence[bytes]) -> list[bytes]:
    reference, first = pickle.loads(calls[0])  # noqa: S301 - of the process that started this one
    engine = _engine_of(reference)
    engine.fill(0, [pickle.loads(call) for call in (first, *calls[1:])])  # noqa: S301
    try:
        (results,) = engine.wait(0)
    except CallerError as error:
        raise error.original from error.original.__cause__
    return [pickle.dumps(result) for result in results]


@cache
def _engine_of(reference: Reference) -> FunctionEngine:
    module = importlib.import_module(reference.module) if reference.module else _program(reference.path)
    function = attrgetter(reference.qualname)(module)
    function = getattr(function, "__wrapped__", function)  # the module's name is that of the batched one
    return FunctionEngine(function, reference.name, max_batch_size=0, stack=reference.stack)


def _program(path: str) -> Any:
    """Import a program, under another name than `__main__`, as `multiprocessing` does."""
    spec = importlib.util.spec_from_file_location("__mp_main__", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module  # where items find their classes
    spec.loader.exec_module(module)
    return module


def _pickled(error: Exception) -> bytes:
    """Return an exception with its traceback as a note; one that cannot be pickled as a RuntimeError."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # noqa: S301 - ours; some exceptions cannot be made again
    except Exception:  # noqa: BLE001 - its own code
        other = RuntimeError(f"{type(error).__name__}: {error}")
        other.__notes__ = error.__notes__
        data = pickle.dumps(other)
    return data


def _elsewhere(_: object) -> Any:
    raise AssertionError("it runs in a process")
