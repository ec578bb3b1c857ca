"""A model in Python: finds the object, reads its signature, calls it, and checks its outputs.

    class Doubler:
        inputs = {"x": ("FP32", [-1, 3])}  # as V2 says it; a first axis of -1 counts rows
        outputs = {"y": ("FP32", [-1, 3])}

        def load(self) -> None: ...  # once, before the first batch; may take the device's number
        def predict(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...

Without `inputs` and `outputs` the annotations say it: of parameters that are tensors, and of the result, as
`Annotated[np.ndarray, "FP32", [-1, 3]]`; or a TypedDict of such ones. A function is a model without `load`.
"""

import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints, is_typeddict

import numpy as np

from cobatch.engines.base import DATATYPES, Array, Batching, Signature, TensorSpec
from cobatch.engines.errors import BadRequest, EngineLoadError, EngineRunError, OutputError
from cobatch.engines.proof import settle

# The only output's name where an annotation gives none.
OUTPUT = "output"
_EXPECTED = 'expected a datatype of V2 and a shape, as ("FP32", [-1, 3])'
# Models in threads may have one file, which must not be used before it is executed.
_IMPORTING = threading.RLock()
_NO_ROWS = "the inputs' first axis is not -1"


class PythonModel:
    """A model that is loaded. `run` is called by one thread at a time."""

    def __init__(
        self, found: object, predict: Callable[..., object], signature: Signature, *, by_name: bool
    ) -> None:
        self.found = found
        self.signature = signature
        self.own_requests = hasattr(found, "preprocess") or hasattr(found, "postprocess")
        self._predict = predict
        self._by_name = by_name

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run a batch: rows of each input, and of each output.

        With batching off there is one row, which the model sees without the axis of rows. Raises
        EngineRunError with the traceback of an error that the model raised, BadRequest with the text of
        the model's, and OutputError.
        """
        specs = self.signature.inputs
        rows = len(inputs[0])
        batch = {
            spec.name: array if spec.batched else array[0] for spec, array in zip(specs, inputs, strict=True)
        }
        try:
            answer = self._predict(**batch) if self._by_name else self._predict(batch)
        except BadRequest as error:
            raise BadRequest(str(error)) from None  # without the frames, which refer to the rows
        except Exception as error:
            tail = error.__traceback__ and error.__traceback__.tb_next  # without this frame
            raise EngineRunError("".join(traceback.format_exception(type(error), error, tail))) from error
        outputs = self.signature.outputs
        if not isinstance(answer, Mapping):
            if len(outputs) > 1 or answer is None:
                raise OutputError(f"predict returned {type(answer).__name__}, expected a dict of arrays")
            answer = {outputs[0].name: answer}
        unknown = sorted(map(str, answer.keys() - {spec.name for spec in outputs}))
        if unknown:
            names = ", ".join(repr(spec.name) for spec in outputs)
            raise OutputError(f"predict returned an output {unknown[0]!r}, expected {names}")
        return [_checked(spec, rows, answer.get(spec.name)) for spec in outputs]


def _checked(spec: TensorSpec, rows: int, output: object) -> Array:
    expected = spec.tensor_shape(rows, spec.shape)
    text = f"output {spec.name!r}: expected {spec.datatype} {list(expected)}"
    if not isinstance(output, np.ndarray):
        came = "nothing" if output is None else f"{type(output).__name__}, which is no NumPy array"
        raise OutputError(f"{text}, got {came}")
    if spec.datatype == "BYTES" and output.dtype.kind in "SU":
        output = output.astype(object)
    shape = output.shape
    fits = len(shape) == len(expected) and all(a in (-1, b) for a, b in zip(expected, shape, strict=True))
    if not fits or output.dtype != spec.dtype:
        came = next((name for name, dtype in DATATYPES.items() if dtype == output.dtype), str(output.dtype))
        raise OutputError(f"{text}, got {came} {list(shape)}")
    return output if spec.batched else output[np.newaxis]


# Loading


def load(
    source: str,
    folder: str,
    device: int,
    batching: Batching,
    arguments: Sequence[object] = (),
    *,
    alone: bool = False,
) -> PythonModel:
    """Find a model, load it and read its signature. Raises EngineLoadError.

    `source`: `FILE.py:NAME` or `MODULE:NAME`, in `folder`; modules are found as Python finds them, too.
    `device`: for a `load` that takes it. `arguments`: of a class. `alone`: the process is the model's own, so
    its modules may hide installed ones.
    """
    found = open_object(source, folder, (device,), arguments, alone=alone)
    predict = getattr(found, "predict", found)
    if not callable(predict):
        name = source.rpartition(":")[2]
        hint = "; with `handle` it belongs in [[pipelines]]" if hasattr(found, "handle") else ""
        raise EngineLoadError(f"{source}: {name} has no method `predict`, and is no function{hint}")
    inputs, outputs, by_name = _read(source, found, predict)
    signature = settle(inputs, outputs, batching, _judge)
    if signature.fixed_batch is not None:
        raise EngineLoadError(f'{source}: {_NO_ROWS}: it cannot be batched; set batching = "off"')
    return PythonModel(found, predict, signature, by_name=by_name)


def open_object(
    source: str,
    folder: str,
    of_load: Sequence[object] = (),
    arguments: Sequence[object] = (),
    *,
    alone: bool = False,
    loader: str = "load",
) -> object:
    """Find an object, make one of a class, and call its `load`, with `of_load` if it takes arguments.

    See `load`. `loader`: another method's name. Raises EngineLoadError.
    """
    found = _find(source, folder, first=alone)
    name = source.rpartition(":")[2]
    if inspect.isclass(found):
        found = _call(f"{name}()", found, *arguments)
    loading = getattr(found, loader, None)
    if loading is not None:
        given = of_load if inspect.signature(loading).parameters else ()
        _call(f"{name}.{loader}", loading, *given)
    return found


def _judge(rows: Signature) -> Batching:
    """Return the decision about a model that can be batched: its declaration is believed."""
    return Batching("on") if rows.fixed_batch is None else Batching("off", _NO_ROWS)


def _call(what: str, function: Callable[..., Any], *arguments: object) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        raise EngineLoadError(f"{what} failed: {described(error)}") from error


def described(error: BaseException) -> str:
    """Return an error's type, text and place, in one line."""
    frames = traceback.extract_tb(error.__traceback__ if not isinstance(error, SyntaxError) else None)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return " ".join("".join(traceback.format_exception_only(error)).split()) + place


def _find(source: str, folder: str, *, first: bool) -> Any:
    where, _, name = source.rpartition(":")
    if not where or not name:
        raise EngineLoadError(f"{source!r} names no model; expected FILE.py:NAME or MODULE:NAME")
    with _IMPORTING:
        module = _call(f"importing {where}", _import, where, folder, first)
    try:
        return getattr(module, name)
    except AttributeError:
        raise EngineLoadError(f"{where} has no {name!r}") from None


def _import(where: str, folder: str, first: bool) -> Any:
    file = Path(folder, where).absolute()
    if not where.endswith(".py"):
        _add_path(Path(folder), first=first)
        return importlib.import_module(where)
    _add_path(file.parent, first=first)
    known = sys.modules.get(file.stem)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    # With a model in a thread the name may be another module's.
    name = file.stem if known is None else f"{file.stem}@{file.parent}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _add_path(folder: Path, *, first: bool) -> None:
    path = str(folder.absolute())
    if path not in sys.path:
        sys.path.insert(0 if first else len(sys.path), path)


# Signature


def _read(
    source: str, found: object, predict: Callable[..., object]
) -> tuple[list[TensorSpec], list[TensorSpec], bool]:
    """Return whole inputs and outputs, and True if predict takes the inputs as arguments of their names."""
    inputs, outputs = getattr(found, "inputs", None), getattr(found, "outputs", None)
    by_name = False
    if inputs is None or outputs is None:
        try:
            hints = get_type_hints(predict, include_extras=True)
        except Exception as error:
            raise EngineLoadError(f"{source}: the annotations cannot be read: {described(error)}") from error
        result = hints.pop("return", None)
        if outputs is None and result is not None:
            outputs = _fields(result) if is_typeddict(result) else {OUTPUT: result}
        if inputs is None:
            only = next(iter(hints.values())) if len(hints) == 1 else None
            by_name = not is_typeddict(only)
            inputs = hints if by_name else _fields(only)
    return _specs(f"{source}: inputs", inputs), _specs(f"{source}: outputs", outputs), by_name


def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _specs(where: str, declared: object) -> list[TensorSpec]:
    if not isinstance(declared, Mapping) or not declared:
        raise EngineLoadError(f"{where} are not declared: {_EXPECTED} for each name")
    specs = []
    for name, declaration in declared.items():
        tensor = getattr(declaration, "__metadata__", declaration)
        match tensor:
            case (str(datatype), list(shape) | tuple(shape)) if datatype in DATATYPES and _is_shape(shape):
                specs.append(TensorSpec(str(name), datatype, tuple(shape), batched=False))
            case _:
                raise EngineLoadError(f"{where}[{str(name)!r}]: {_EXPECTED}, got {tensor!r}")
    return specs


def _is_shape(shape: Sequence[object]) -> bool:
    return all(type(size) is int and (size > 0 or size == -1) for size in shape)
