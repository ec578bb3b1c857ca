"""The handler of a model in Python with requests of its own shape: `preprocess`, the model, `postprocess`.

    class Classifier:
        def preprocess(self, picture: Annotated[bytes, "image/png"]) -> dict[str, np.ndarray]: ...  # one row
        def predict(self, batch): ...
        def postprocess(self, row: dict[str, np.ndarray]) -> Label: ...

Here only the first and the last run, of an object without its `load`; `predict` runs in the model's process.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import numpy as np

from cobatch.engines.base import DATATYPES
from cobatch.engines.errors import BadRequest, EngineLoadError
from cobatch.engines.python.model import described
from cobatch.server.links.steps import model
from cobatch.server.pipelines.thread import CallThread

Row = dict[str, Any]
_WORDS = {"b": "true or false", "i": "integers", "u": "integers", "f": "finite numbers", "O": "strings"}


def around(found: object, name: str, datatypes: Mapping[str, str], *, batched: bool) -> Callable[[Any], Any]:
    """Return the handler of a loaded object.

    `datatypes`: of the model's inputs, for values that are no array. `batched`: the model has a first axis,
    which the rows here have not. Raises EngineLoadError.
    """
    before, after = getattr(found, "preprocess", None), getattr(found, "postprocess", None)
    step = model(name)
    thread = CallThread()

    async def call(method: Callable[[Any], Any], argument: object) -> Any:
        if inspect.iscoroutinefunction(method):
            return await method(argument)
        return await thread.run(method, argument)

    async def handle(request: Any) -> Any:
        row = request if before is None else await call(before, request)
        if before is None and set(row) != set(datatypes):
            raise BadRequest(f"expected the inputs {', '.join(datatypes)}, got {', '.join(row) or 'none'}")
        if not isinstance(row, dict):
            raise TypeError(f"preprocess returned {type(row).__name__}, expected a dict of arrays")
        arrays = {key: _array(key, value, datatypes.get(key)) for key, value in row.items()}
        if batched:
            arrays = {key: array[np.newaxis] for key, array in arrays.items()}
        outputs = await step(**arrays)
        if batched:
            outputs = {key: value[0] for key, value in outputs.items()}
        return outputs if after is None else await call(after, outputs)

    handle.__doc__ = inspect.getdoc(found) if type(found).__doc__ else None
    handle.__annotations__ = {
        "request": _hints(before).get("first", Any) if before is not None else dict[str, Any],
        "return": _hints(after).get("return", Any) if after is not None else Any,
    }
    return handle


def _array(name: str, value: Any, datatype: str | None) -> np.ndarray[Any, Any]:
    """Return an input's array. Raises BadRequest for a value that the datatype has not, as V2 does."""
    if isinstance(value, np.ndarray) or datatype is None:
        return np.asarray(value)
    dtype = DATATYPES[datatype]
    try:
        given = np.asarray(value, None if dtype.kind != "O" else dtype)
        with np.errstate(over="ignore"):
            array = np.asarray(value, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRequest(f"input {name!r} ({datatype}): {error}") from None
    if given.size and not _fits(given, array):
        raise BadRequest(f"input {name!r} ({datatype}): expected {_WORDS[dtype.kind]}")
    return array


def _fits(given: np.ndarray[Any, Any], array: np.ndarray[Any, Any]) -> bool:
    """Return True if an array has the values that it was made of, but for the digits of a float."""
    match array.dtype.kind:
        case "O":
            return all(isinstance(one, str | bytes) for one in array.flat)
        case "f":
            return given.dtype.kind in "iuf" and np.isfinite(array).all() == np.isfinite(given).all()
        case kind:
            return given.dtype.kind in ("b" if kind == "b" else "iu") and bool((array == given).all())


def _hints(method: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of the only parameter, as `first`, and of the result. Raises EngineLoadError."""
    name = method.__qualname__
    parameters = list(inspect.signature(method).parameters)
    if len(parameters) != 1:
        raise EngineLoadError(f"{name} takes one argument, got {', '.join(parameters) or 'none'}")
    try:
        hints = get_type_hints(method, include_extras=True)
    except Exception as error:
        raise EngineLoadError(f"{name}: the annotations cannot be read: {described(error)}") from error
    return {"first": hints.get(parameters[0], Any), "return": hints.get("return", Any)}
