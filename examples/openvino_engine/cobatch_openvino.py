"""OpenVINO as an engine of cobatch, added by the entry points in pyproject.toml beside this file.

It runs OpenVINO's own files (`.xml`) and, with `engine = "openvino"`, ONNX files. A batch runs in the
background while the next one is packed: each slot has an infer request, which reads the slot's buffers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov

import cobatch

Array = np.ndarray[Any, Any]
RowShapes = tuple[tuple[int, ...], ...]

_TYPES = {
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "u64": "UINT64",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "f32": "FP32",
    "f64": "FP64",
}


class OpenVinoEngine:
    """A compiled model. Its options: `device`, such as "CPU" or "GPU.1", and `properties` of OpenVINO."""

    platform = "openvino"
    asynchronous = True

    def __init__(self, path: str, max_batch_size: int, options: cobatch.EngineOptions) -> None:
        unknown = options.own.keys() - {"device", "properties"}
        if unknown:
            raise cobatch.EngineLoadError(
                f"engine_options: unknown key {min(unknown)!r}; expected device or properties"
            )
        device, properties = options.own.get("device", "CPU"), options.own.get("properties", {})
        if not isinstance(device, str) or not isinstance(properties, dict):
            raise cobatch.EngineLoadError("engine_options: device must be text, and properties a table")
        self._core = ov.Core()
        if device not in (available := self._core.available_devices):
            raise cobatch.EngineLoadError(
                f"engine_options: there is no device {device!r} here, only {', '.join(available)}"
            )
        threads = {} if options.threads is None else {"INFERENCE_NUM_THREADS": options.threads}
        self.path = path
        self.max_batch_size = max_batch_size
        self.slots = options.slots
        self._device = device
        self._properties = threads | properties
        self._batching = options.batching
        self._requests: list[ov.InferRequest] = []
        self._buffers: list[tuple[RowShapes, tuple[Array, ...]]] = [((), ())] * self.slots
        self._rows = [0] * self.slots
        self._signature: cobatch.Signature | None = None

    @property
    def signature(self) -> cobatch.Signature:
        """The model's tensors. Raises RuntimeError before `open`."""
        if self._signature is None:
            raise RuntimeError("the engine is not open")
        return self._signature

    def open(self) -> None:
        """Compile the model, and test that its rows are independent. Raises EngineLoadError."""
        try:
            model = self._core.compile_model(self.path, self._device, self._properties)
        except RuntimeError as error:
            raise cobatch.EngineLoadError(f"OpenVINO cannot load {self.path}: {error}") from error
        self._requests = [model.create_infer_request() for _ in range(self.slots)]
        self._signature = cobatch.settle_signature(
            [_spec("input", port) for port in model.inputs],
            [_spec("output", port) for port in model.outputs],
            self._batching,
            lambda rows: cobatch.prove_batching(rows, self._run, self.max_batch_size),
        )
        most = self.max_batch_size if self._signature.batching.on else 1
        self.max_batch_size = self._signature.fixed_batch or most

    def _run(self, arrays: Sequence[Array]) -> list[Array]:
        """Run whole inputs, for the test at load."""
        self._start(0, arrays)
        return self._finish(0)

    def _start(self, slot: int, arrays: Sequence[Array]) -> None:
        """Start a run of whole inputs. Raises EngineRunError with OpenVINO's message."""
        request = self._requests[slot]
        try:
            for number, array in enumerate(arrays):
                request.set_input_tensor(number, ov.Tensor(array, shared_memory=True))
            request.start_async()
        except RuntimeError as error:
            raise cobatch.EngineRunError(str(error)) from error

    def _finish(self, slot: int) -> list[Array]:
        try:
            self._requests[slot].wait()
        except RuntimeError as error:
            raise cobatch.EngineRunError(str(error)) from error
        return [tensor.data for tensor in self._requests[slot].output_tensors]

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """Return the slot's buffers; they are replaced when the row shapes change or the rows need more."""
        shapes, arrays = self._buffers[slot]
        if shapes != row_shapes or not arrays or len(arrays[0]) < rows:
            size = self.signature.fixed_batch or rows
            arrays = tuple(
                np.zeros((size, *row), spec.dtype)
                for spec, row in zip(self.signature.inputs, row_shapes, strict=True)
            )
            self._buffers[slot] = (row_shapes, arrays)
        return arrays

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Start the batch; a model of a fixed size gets rows of zeros in addition."""
        self._rows[slot] = rows
        size = self.signature.fixed_batch or rows
        arrays = self.inputs(slot, rows, row_shapes)
        for array in arrays:
            array[rows:size] = 0
        if self.signature.batching.on:
            self._start(slot, [array[:size] for array in arrays])
        else:  # the only row is the whole tensor
            self._start(slot, [array.reshape(array.shape[1:]) for array in arrays])

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Wait for the outputs. Raises EngineRunError."""
        outputs = self._finish(slot)
        if not self.signature.batching.on:
            return tuple(output[np.newaxis] for output in outputs)
        return tuple(output[: self._rows[slot]] for output in outputs)

    def close(self) -> None:
        """Free the model's memory."""
        self._requests = []
        self._buffers = []


def _spec(kind: str, port: ov.ConstOutput) -> cobatch.TensorSpec:
    """Return an input or output as a whole tensor."""
    names = port.get_names()
    name = port.any_name if names else port.node.friendly_name
    datatype = _TYPES.get(port.element_type.get_type_name())
    shape = port.partial_shape
    if datatype is None or shape.rank.is_dynamic:
        raise cobatch.EngineLoadError(f"{kind} {name!r}: {port.element_type} {shape} is not supported")
    sizes = tuple(axis.get_length() if axis.is_static else -1 for axis in shape)
    return cobatch.TensorSpec(name, datatype, sizes, batched=False)
