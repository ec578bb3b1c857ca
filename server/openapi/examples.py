"""Examples for the OpenAPI document: requests that run as they stand, one row of zeros for each loaded model.

Zero is a value of every datatype, is in range where a model takes indices, and is ASCII as bytes, so that a
binary body can be written in JSON too.
"""

import base64
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import msgspec
import numpy as np

from cobatch import __version__
from cobatch.engines.base import Signature, TensorSpec
from cobatch.server.api.v2 import EXTENSIONS, config, index_entry, metadata, statistics
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
from cobatch.server.predictions.content import JSON, MULTIPART, OCTETS
from cobatch.server.predictions.encode import dtype_name

Json = dict[str, Any]

# Models with longer rows get no example: it would be too long to read.
_ELEMENTS_LIMIT = 4096


class LoadedModels:
    """The served models: `all` of them, and the `loaded` ones with signatures and required inputs by name."""

    def __init__(self, inference: Inference) -> None:
        self.all: list[Model] = list(inference.models.values())
        self.loaded = [model for model in self.all if model.batcher is not None]
        self.signatures: Mapping[str, Signature] = {
            model.name: model.engine_worker.engine.signature for model in self.loaded
        }
        # Without the masks that padding makes where the request has none.
        self.required = {model.name: [spec.name for spec in model.decoder.required] for model in self.loaded}
        # The model in the examples of answers.
        self.shown = next((one for one in self.loaded if has_example(self.signatures[one.name])), None)


def add_examples(operations: Mapping[str, Json], models: LoadedModels) -> None:
    """Add requests and answers of the loaded models to the operations, which come by `operationId`."""
    body = operations["predict"]["requestBody"]["content"][MULTIPART]["schema"]["properties"]
    for name in sorted({spec.name for one in models.signatures.values() for spec in one.inputs}):
        text = "nested lists in JSON, or with its own Content-Type raw bytes or a .npy file"
        body[name] = {"type": "array", "description": text}
    for model, signature in models.signatures.items():
        if has_example(signature):
            for id_, media, key, example in _requests(model, signature):
                content = operations[id_]["requestBody"]["content"][media]
                content.setdefault("examples", {})[key] = example
    shown = models.shown
    if shown is not None and (message := infer_json(models.signatures[shown.name])) is not None:
        item = {"method": "POST", "url": f"/v2/models/{shown.name}/infer", "body": message}
        batch = operations["batch"]["requestBody"]["content"][JSON]["examples"]["two"]["value"]
        batch["requests"] += [{"id": "first", **item}, {"id": "second", **item}]
    for id_, answer in _answers(models).items():
        operations[id_]["responses"]["200"]["content"][JSON]["example"] = answer
    # Examples in operations.json have another model's name.
    for id_, status, member in (
        ("getModelReady", "200", "name"),
        ("getModelReady", "503", "name"),
        ("predict", "202", "model"),
        ("cancelPrediction", "200", "model"),
    ):
        example = operations[id_]["responses"][status]["content"][JSON]["example"]
        if models.all:
            example[member] = (shown or models.all[0]).name


def _answers(models: LoadedModels) -> Json:
    """Return examples of 200 answers by `operationId`."""
    server = {"name": "cobatch", "version": __version__, "extensions": EXTENSIONS}
    answers: Json = {
        "getServer": server,
        "getServerSlash": server,
        "getAllStats": {"model_stats": [statistics(model) for model in models.loaded[:1]]},
        "getIndex": [index_entry(model) for model in models.all],
    }
    shown = models.shown
    if shown is None:
        return answers
    signature = models.signatures[shown.name]
    outputs = [_with_data(spec) for spec in signature.outputs]
    predicted = {
        "id": "kQ0vR1mXbq8sWc3LtZ5dYg6h",
        "status": "completed",
        "model": shown.name,
        "outputs": {
            spec.name: {"dtype": dtype_name(spec), "shape": _shape(spec), "data": _zeros(spec)}
            for spec in signature.outputs
        },
        "usage": {"rows": 1, "batch_rows": 16, "queue_us": 213, "compute_us": 1480},
    }
    return answers | {
        "getModel": metadata(shown),
        "getConfig": config(shown),
        "getStats": {"model_stats": [statistics(shown)]},
        "infer": {"model_name": shown.name, "model_version": shown.version, "id": "1", "outputs": outputs},
        "predict": predicted,
        "getPrediction": predicted,
    }


def _requests(model: str, signature: Signature) -> Iterator[tuple[str, str, str, Json]]:
    """Yield `operationId`, media type, key and example of each way to send a row to the model."""

    def example(value: Any, form: str = "", **headers: str) -> Json:
        request: Json = {"summary": f"One row for {model}{form}", "value": value, "x-path": {"name": model}}
        return request | ({"x-headers": headers} if headers else {})

    if (message := infer_json(signature)) is not None:
        yield "infer", JSON, model, example(message)
    length = "Inference-Header-Content-Length"
    binary, json_length = infer_binary(signature)
    yield "infer", OCTETS, model, example(binary, ": JSON, then its bytes", **{length: str(json_length)})
    if (raw := raw_tensor(signature)) is not None:
        yield "infer", OCTETS, f"{model}-raw", example(raw, " as bytes alone", **{length: "0"})
        yield "predict", OCTETS, model, example(raw, " as bytes alone")
    yield "predict", JSON, model, example(prediction(signature))
    inputs = {spec.name: _nested(spec) for spec in signature.inputs}
    yield "predict", MULTIPART, model, example(inputs | {"request": {"priority": 1}})


def has_example(signature: Signature) -> bool:
    """Return whether a row is short enough to be shown."""
    return sum(prod(_row(spec)) for spec in (*signature.inputs, *signature.outputs)) <= _ELEMENTS_LIMIT


def infer_json(signature: Signature) -> Json | None:
    """Return an infer request in JSON, or None where JSON cannot express a datatype."""
    if any(spec.datatype == "BF16" for spec in signature.inputs):
        return None
    return {"id": "1", "inputs": [_with_data(spec) for spec in signature.inputs]}


def infer_binary(signature: Signature) -> tuple[str, int]:
    """Return an infer request with binary inputs and outputs, as text, and the length of its JSON."""
    inputs = [
        _tensor(spec) | {"parameters": {"binary_data_size": len(_bytes(spec))}} for spec in signature.inputs
    ]
    message = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    text = msgspec.json.encode(message).decode()
    return text + "".join(_bytes(spec) for spec in signature.inputs), len(text)


def raw_tensor(signature: Signature) -> str | None:
    """Return a body that is one row of the only input, or None where that is not possible."""
    if len(signature.inputs) != 1 or signature.inputs[0].shape.count(-1) > 1:
        return None
    spec = signature.inputs[0]
    # Elsewhere each element of BYTES follows its length; here the whole body is one element.
    if spec.datatype != "BYTES":
        return _bytes(spec)
    return "text" if prod(_row(spec)) == 1 else None


def prediction(signature: Signature) -> Json:
    """Return the request for a prediction in JSON."""
    return {"inputs": {spec.name: _nested(spec) for spec in signature.inputs}, "deadline_ms": 60_000}


def _row(spec: TensorSpec) -> list[int]:
    return [1 if size == -1 else size for size in spec.shape]


def _shape(spec: TensorSpec) -> list[int]:
    """Return the shape of a tensor of one row."""
    return list(spec.tensor_shape(1, tuple(_row(spec))))


def _tensor(spec: TensorSpec) -> Json:
    return {"name": spec.name, "shape": _shape(spec), "datatype": spec.datatype}


def _zero(spec: TensorSpec) -> Any:
    if spec.datatype == "BYTES":
        return "text"
    return False if spec.datatype == "BOOL" else 0.0 if spec.datatype in ("FP16", "FP32", "FP64") else 0


def _with_data(spec: TensorSpec) -> Json:
    return _tensor(spec) | {"data": [_zero(spec)] * prod(_row(spec))}


def _zeros(spec: TensorSpec) -> Any:
    return np.full(_shape(spec), _zero(spec), object).tolist()


def _nested(spec: TensorSpec) -> Any:
    """Return the row as nested lists, or as base64 where JSON has no such numbers."""
    if spec.datatype != "BF16":
        return _zeros(spec)
    data = base64.b64encode(_bytes(spec).encode()).decode()
    return {"b64": data, "dtype": spec.datatype, "shape": _shape(spec)}


def _bytes(spec: TensorSpec) -> str:
    """Return the row's bytes as text. An element of BYTES is its length, here 0, and that number of bytes."""
    size = 4 if spec.datatype == "BYTES" else spec.dtype.itemsize
    return "\0" * (size * prod(_row(spec)))
