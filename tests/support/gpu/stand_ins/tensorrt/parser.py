"""The ONNX parser, without some operators and types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no types

from .builder import INetworkDefinition
from .logs import ErrorSink, ILogger
from .plan import DATA_TYPES, read_tensors
from .versions import package

# Some operators that TensorRT's parser lacks.
UNSUPPORTED = {"BitShift", "DynamicQuantizeLinear", "StringNormalizer", "TfIdfVectorizer", "Unique", "Det"}


@dataclass(frozen=True, slots=True)
class _Error:
    code: str
    desc: str
    node: int = -1
    name: str = ""
    operator: str = ""


class ParserError:
    """An error of the parser."""

    def __init__(self, error: _Error) -> None:
        self._error = error

    def code(self) -> Any:
        return package().ErrorCode[self._error.code]

    def desc(self) -> str:
        return self._error.desc

    def node(self) -> int:
        return self._error.node

    def node_name(self) -> str:
        return self._error.name

    def node_operator(self) -> str:
        return self._error.operator


class OnnxParser:
    """Parses a model into a network."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._sink = ErrorSink(logger)
        self._errors: list[_Error] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return ParserError(self._errors[index])

    def clear_errors(self) -> None:
        self._errors.clear()

    def parse(self, model: bytes, path: str | None = None) -> bool:
        self._errors = _check(bytes(model))
        for error in self._errors:
            self._sink.error("INVALID_ARGUMENT", error.desc)
        if self._errors:
            return False
        self._network._model = bytes(model)
        self._network._tensors = read_tensors(bytes(model))
        return True

    def parse_from_file(self, model: str) -> bool:
        try:
            return self.parse(Path(model).read_bytes(), model)
        except OSError as error:
            self._errors = [_Error("MODEL_DESERIALIZE_FAILED", f"Failed to open {model}: {error.strerror}")]
            return False


def _check(model: bytes) -> list[_Error]:
    try:
        graph = onnx.load_from_string(model).graph
    except DecodeError:
        return [_Error("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model")]
    errors = [
        _Error(
            "UNSUPPORTED_NODE",
            f"No importer registered for op: {node.op_type}",
            index,
            node.name,
            node.op_type,
        )
        for index, node in enumerate(graph.node)
        if node.op_type in UNSUPPORTED
    ]
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type.elem_type
        if kind not in DATA_TYPES:
            name = onnx.TensorProto.DataType.Name(kind)
            errors.append(_Error("UNSUPPORTED_NODE_DATATYPE", f"{value.name}: unsupported data type {name}"))
    return errors
