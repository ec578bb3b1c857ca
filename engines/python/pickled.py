"""A Python function in a process of its own: items and results are pickled, as elements of BYTES tensors.

The process has the model `Calls`, which finds the function by its module and name.
"""

import importlib
import importlib.util
import inspect
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
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
# The program's name in the process, as `multiprocessing` has it, in its package.
_PROGRAM = "__mp_main__"


class Reference(NamedTuple):
    """Where another process finds a function: `path` is the program's, if it is one of that."""

    module: str
    path: str
    qualname: str
    name: str
    stack: bool


def refer_to(function: Callable[..., Any], name: str, *, stack: bool) -> Reference:
    """Return the reference to a function. Raises TypeError if another process cannot import it."""
    module, qualname = getattr(function, "__module__", ""), getattr(function, "__qualname__", "<locals>")
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", "") if module == "__main__" else ""
    if path:
        package = main.__spec__.parent if main.__spec__ is not None else ""  # of `python -m`
        module = f"{package}.{_PROGRAM}" if package else _PROGRAM
        sys.modules.setdefault(module, main)  # where results find their classes
    if "<locals>" in qualname or module in ("", "__main__"):
        raise TypeError(f"{name} cannot run in a process: it must be a function of a module or a program")
    return Reference(module, path and os.path.realpath(path), qualname, name, stack)


class PickledEngine(FunctionEngine):
    """Runs a function in a process of its own; see `FunctionEngine` and `ProcessEngine`."""

    asynchronous = True

    def __init__(self, reference: Reference, max_batch_size: int) -> None:
        super().__init__(_elsewhere, reference.name, max_batch_size=max_batch_size, stack=reference.stack)
        self._dead = ""
        self._engine = ProcessEngine(
            f"{__name__}:{Calls.__name__}",
            max_batch_size,
            sys.path[0] or ".",
            0,
            Batching("on"),
            name=reference.name,
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
            arguments=reference,
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
        (calls,) = self._engine.inputs(slot, rows, _NO_SHAPE)
        calls[:rows] = pickles
        self._engine.enqueue(slot, rows, _NO_SHAPE)

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Wait for the results. Raises CallerError, and EngineEndedError."""
        (answers,) = self._engine.wait(slot)
        raised = answers[0].startswith(_RAISED)
        if raised:
            answers = answers[:1]
            answers[0] = answers[0].removeprefix(_RAISED)
        try:
            results = np.fromiter(map(pickle.loads, answers), object, len(answers))
        except Exception as error:  # noqa: BLE001 - the result's own code
            raise as_caller_error(error, self._name) from None
        if raised:
            raise CallerError(results[0])
        return (results,)

    def kill(self) -> None:
        """End the process at once."""
        self._engine.kill()

    def close(self) -> None:
        """End the process."""
        self._engine.close()


class Calls:
    """The model in the process; its arguments are a Reference."""

    inputs = {"calls": ("BYTES", [-1])}  # noqa: RUF012 - as in any model
    outputs = {"answers": ("BYTES", [-1])}  # noqa: RUF012

    def __init__(self, *reference: Any) -> None:
        self._engine = cache(lambda: _engine_of(Reference(*reference)))

    def load(self) -> None:
        """Import the function's module. If that fails, each batch tries again, for its callers hear of it."""
        with suppress(Exception):
            self._engine()

    def predict(self, batch: dict[str, Array]) -> Array:
        """Run the function; an exception is the answer."""
        calls = batch["calls"]
        try:
            answers = _run(self._engine(), calls.tolist())
        except Exception as error:  # noqa: BLE001 - of the function
            answers = [_RAISED + _pickled(error), *[b""] * (len(calls) - 1)]
        return np.fromiter(answers, object, len(calls))


def _run(engine: FunctionEngine, calls: Sequence[bytes]) -> list[bytes]:
    engine.fill(0, [pickle.loads(call) for call in calls])  # noqa: S301 - of the process that started this one
    try:
        (results,) = engine.wait(0)
    except CallerError as error:
        raise error.original from error.original.__cause__
    return [pickle.dumps(result) for result in results]


class Wrapper:
    """Base of an object that batches the calls of its `__wrapped__`, whose name in the module it takes."""

    __wrapped__: Callable[..., Any]


def _engine_of(reference: Reference) -> FunctionEngine:
    name = reference.module
    module = _program(name, reference.path) if reference.path else importlib.import_module(name)
    function = attrgetter(reference.qualname)(module)
    wrapper = inspect.unwrap(function, stop=lambda one: isinstance(one, Wrapper))
    if isinstance(wrapper, Wrapper):
        function = wrapper.__wrapped__
    return FunctionEngine(function, reference.name, max_batch_size=0, stack=reference.stack)


def _program(name: str, path: str) -> Any:
    """Import a program, under another name than `__main__`."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = sys.modules[name] = module  # where items find their classes
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
