"""The signature of a session's model, and whether its outputs are as declared."""

import numpy as np
import onnxruntime as ort

from cobatch.engines.base import EXPORT_DOCS, Batching, Signature, TensorSpec
from cobatch.engines.errors import EngineLoadError, NoBatchAxisError
from cobatch.engines.onnxruntime import runs
from cobatch.engines.proof import prove, settle

_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


def has_declared_shapes(session: ort.InferenceSession, signature: Signature, max_batch_size: int) -> bool:
    """Run zeros; True if the outputs have the declared row shapes, or the model refuses zeros.

    Raises NoBatchAxisError if an output's first axis does not count the rows: in a binding such a model would
    fail without a reason.
    """
    rows = signature.fixed_batch or min(2, max_batch_size)
    shapes = [spec.tensor_shape(rows, spec.least_row) for spec in signature.inputs]
    zeros = [
        np.full(shape, "" if spec.datatype == "BYTES" else 0, spec.dtype)
        for spec, shape in zip(signature.inputs, shapes, strict=True)
    ]
    try:
        outputs = runs.run(session, signature, zeros, runs.quiet())
    except Exception:  # noqa: BLE001 - ONNX Runtime has no base class of errors; the warm-up reports them
        return True
    for spec, output in zip(signature.outputs, outputs, strict=True):
        if spec.batched and output.shape[:1] != (rows,):
            raise NoBatchAxisError(
                f"output {spec.name!r} does not follow the batch axis: {rows} rows gave {list(output.shape)}"
            )
    return all(
        spec.tensor_shape(rows, spec.shape) == output.shape
        for spec, output in zip(signature.outputs, outputs, strict=True)
    )


def read_signature(session: ort.InferenceSession, batching: Batching, *, gpu: bool) -> Signature:
    """Read the signature of a session's model, and prove its batch axis. Raises EngineLoadError."""
    inputs = [_spec("input", node) for node in session.get_inputs()]
    outputs = [_spec("output", node) for node in session.get_outputs()]
    quiet = runs.quiet()
    return settle(
        inputs,
        outputs,
        batching,
        lambda rows: prove(rows, lambda arrays: runs.run(session, rows, arrays, quiet), gpu=gpu),
    )


def _spec(kind: str, node: ort.NodeArg) -> TensorSpec:
    """Return the whole tensor; one of unknown rank counts as a scalar, as ONNX Runtime describes it."""
    datatype = _TYPES.get(node.type)
    if datatype is None:
        hint = f"; export it with zipmap=False: {EXPORT_DOCS}" if node.type.startswith("seq(map(") else ""
        raise EngineLoadError(f"{kind} {node.name!r} has type {node.type}, which is not supported{hint}")
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    names = tuple(size if isinstance(size, str) else "" for size in node.shape)
    limit = runs.MOST_TEXT_BYTES if datatype == "BYTES" else None
    return TensorSpec(node.name, datatype, shape, batched=False, axis_names=names, max_text_bytes=limit)
