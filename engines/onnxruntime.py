"""ONNX Runtime on the CPU.

Inputs are packed into buffers that belong to a slot and are reused; a binding (`IOBinding`) of the
first `rows` rows of those buffers and of the output buffers is made once for each number of rows and
kept. ONNX Runtime reads the buffers anew at each run, so a run is one call and takes half the time of
`run` on a tiny model.

That needs outputs of known shape. An output that is left to ONNX Runtime cannot be in a kept binding:
the first run's allocation stays bound, and a run that comes out with another shape fails. Binding it
anew each time costs more than `run`, so models with strings or with outputs of unknown shape use that.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod

import numpy as np
import onnxruntime as ort

from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec
from cobatch.engines.errors import EngineLoadError, EngineRunError
from cobatch.engines.loader import cores

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
_KEPT_BINDINGS = 256


# ONNX Runtime's binding and the arrays that the outputs appear in.
_Binding = tuple[ort.IOBinding, tuple[Array, ...]]


class _Slot:
    """A slot's memory and bindings. Buffers grow to the largest row shape seen and are then reused."""

    def __init__(self) -> None:
        self.memory: dict[int, Array] = {}
        self.inputs: dict[RowShapes, tuple[Array, ...]] = {}
        self.outputs: tuple[Array, ...] = ()
        self.bindings: OrderedDict[tuple[int, RowShapes], _Binding] = OrderedDict()
        self.rows = 0
        self.row_shapes: RowShapes = ()

    def forget(self) -> None:
        """Drop everything that points into buffers that are about to be replaced."""
        self.inputs.clear()
        self.bindings.clear()


class OnnxRuntimeEngine:
    """One session. A model whose first axis is fixed is run at that size, missing rows as zeros.

    `threads`: the session's; by default one core is left to the event loop.
    """

    platform = "onnxruntime_onnx"
    slots = 2

    def __init__(self, path: str, max_batch_size: int, threads: int | None = None) -> None:
        self.path = path
        self.max_batch_size = max_batch_size
        self._threads = threads or max(1, cores() - 1)
        self._signature: Signature | None = None
        self._session: ort.InferenceSession | None = None
        self._slots = [_Slot() for _ in range(self.slots)]
        self._plain = False

    @property
    def signature(self) -> Signature:
        """The model's tensors. Raises RuntimeError before `open`."""
        if self._signature is None:
            raise RuntimeError("the engine is not open")
        return self._signature

    def open(self) -> None:
        """Raises EngineLoadError when ONNX Runtime refuses the file or its tensors cannot be batched."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # A spinning thread would take the event loop's core while it waits for work.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 3
        ort.disable_telemetry_events()
        try:
            session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineLoadError(f"ONNX Runtime cannot load {self.path}: {error}") from error
        self._signature = read_signature(session)
        if self._signature.fixed_batch is not None:
            self.max_batch_size = self._signature.fixed_batch
        self._session = session
        declared = _probe(session, self._signature, self.max_batch_size)
        specs = self._signature.inputs + self._signature.outputs
        known = all(spec.row_elements >= 0 for spec in self._signature.outputs) and declared
        self._plain = not known or any(spec.datatype == "BYTES" for spec in specs)
        if not self._plain:
            for slot in self._slots:
                slot.outputs = tuple(
                    np.zeros((self.max_batch_size, *spec.shape), spec.dtype)
                    for spec in self._signature.outputs
                )

    def close(self) -> None:
        """Let the session and all buffers go."""
        self._session = None
        self._slots = []

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """[n, *row_shape] for each input, n >= rows; the same arrays for the same shapes while they do.

        Where row shapes are fixed n is max_batch_size from the start; else memory grows as it is
        needed, since one caller's huge row must not reserve a whole batch of such rows.
        """
        state = self._slots[slot]
        arrays = state.inputs.get(row_shapes)
        if arrays is None or len(arrays[0]) < rows:
            capacity = self.max_batch_size
            variable = any(spec.row_elements < 0 for spec in self.signature.inputs)
            if variable and self.signature.fixed_batch is None:
                capacity = min(capacity, 1 << (rows - 1).bit_length())
            arrays = state.inputs[row_shapes] = self._make_inputs(state, capacity, row_shapes)
        return arrays

    def _make_inputs(self, state: _Slot, capacity: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        if len(state.inputs) >= _KEPT_BINDINGS:
            state.forget()
        arrays = []
        for index, (spec, row_shape) in enumerate(zip(self.signature.inputs, row_shapes, strict=True)):
            count = capacity * prod(row_shape)
            memory = state.memory.get(index)
            if memory is None or memory.size < count:
                state.forget()
                memory = state.memory[index] = np.zeros(count, spec.dtype)
            arrays.append(memory[:count].reshape(capacity, *row_shape))
        return tuple(arrays)

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Note what to run; ONNX Runtime runs in `wait`."""
        state = self._slots[slot]
        state.rows = rows
        state.row_shapes = row_shapes

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Run. Raises EngineRunError with ONNX Runtime's words."""
        state = self._slots[slot]
        rows = state.rows
        run_rows = rows
        if self.signature.fixed_batch is not None and rows < self.max_batch_size:
            run_rows = self.max_batch_size
            for array in self.inputs(slot, run_rows, state.row_shapes):
                array[rows:] = b"" if array.dtype == object else 0
        session = self._session
        assert session is not None
        try:
            if self._plain:
                outputs = self._run_plain(session, slot, run_rows, state.row_shapes)
            else:
                io, outputs = self._binding(session, slot, run_rows, state.row_shapes)
                session.run_with_iobinding(io)
        except Exception as error:
            raise EngineRunError(str(error)) from error
        return outputs if rows == run_rows else tuple(output[:rows] for output in outputs)

    def _run_plain(
        self, session: ort.InferenceSession, slot: int, rows: int, row_shapes: RowShapes
    ) -> tuple[Array, ...]:
        arrays = self.inputs(slot, rows, row_shapes)
        feed = {
            spec.name: _text(array[:rows]) if array.dtype == object else array[:rows]
            for spec, array in zip(self.signature.inputs, arrays, strict=True)
        }
        return tuple(session.run(None, feed))

    def _binding(
        self, session: ort.InferenceSession, slot: int, rows: int, row_shapes: RowShapes
    ) -> _Binding:
        bindings = self._slots[slot].bindings
        key = (rows, row_shapes)
        binding = bindings.get(key)
        if binding is not None:
            bindings.move_to_end(key)
        else:
            if len(bindings) >= _KEPT_BINDINGS:
                bindings.popitem(last=False)
            binding = bindings[key] = self._bind(session, slot, rows, row_shapes)
        return binding

    def _bind(self, session: ort.InferenceSession, slot: int, rows: int, row_shapes: RowShapes) -> _Binding:
        io = session.io_binding()
        for spec, array in zip(self.signature.inputs, self.inputs(slot, rows, row_shapes), strict=True):
            part = array[:rows]
            io.bind_input(spec.name, "cpu", 0, part.dtype.type, part.shape, part.ctypes.data)
        parts = tuple(buffer[:rows] for buffer in self._slots[slot].outputs)
        for spec, part in zip(self.signature.outputs, parts, strict=True):
            io.bind_output(spec.name, "cpu", 0, part.dtype.type, part.shape, part.ctypes.data)
        return io, parts


def _probe(session: ort.InferenceSession, signature: Signature, max_batch_size: int) -> bool:
    """Run two rows of zeros: whether the outputs have the row shapes that the model declares.

    Raises EngineLoadError where an output's first axis does not count the rows. In a binding such a
    model would only fail to run, without a word about why. A model that refuses zeros shows nothing.
    """
    rows = signature.fixed_batch or min(2, max_batch_size)
    feed = {}
    for spec in signature.inputs:
        shape = (rows, *(abs(size) for size in spec.shape))
        feed[spec.name] = np.full(shape, "" if spec.datatype == "BYTES" else 0, spec.dtype)
    try:
        outputs = session.run(None, feed)
    except Exception:  # noqa: BLE001 - ONNX Runtime's errors have no common base; the warm-up reports it
        return True
    for spec, output in zip(signature.outputs, outputs, strict=True):
        if output.ndim == 0 or output.shape[0] != rows:
            raise EngineLoadError(
                f"output {spec.name!r} does not follow the batch axis: {rows} rows gave {list(output.shape)}"
            )
    return [spec.shape for spec in signature.outputs] == [output.shape[1:] for output in outputs]


def _text(array: Array) -> Array:
    """Strings as ONNX Runtime takes them. Bytes that are not UTF-8 fail the run of their batch alone."""
    flat = [value.decode() if isinstance(value, bytes) else value for value in array.reshape(-1)]
    return np.array(flat, dtype=object).reshape(array.shape)


def read_signature(session: ort.InferenceSession) -> Signature:
    """The signature of a session's model. Raises EngineLoadError when its rows cannot be told apart."""
    inputs = [(_spec("input", node), node.shape[0]) for node in session.get_inputs()]
    outputs = [(_spec("output", node), node.shape[0]) for node in session.get_outputs()]
    if not inputs or not outputs:
        raise EngineLoadError("the model has no inputs or no outputs")
    firsts = {first if isinstance(first, int) else None for _, first in inputs}
    if len(firsts) > 1:
        shown = ", ".join(f"{spec.name!r} {first}" for spec, first in inputs)
        raise EngineLoadError(f"the inputs' first axes differ, so none is the batch axis: {shown}")
    fixed = firsts.pop()
    if fixed == 0:
        raise EngineLoadError("the inputs' first axis is fixed at 0: no row fits")
    for spec, first in outputs:
        if isinstance(first, int) and first != fixed:
            expected = "vary with the batch" if fixed is None else f"be {fixed}, as the inputs'"
            raise EngineLoadError(f"output {spec.name!r}: its first axis is {first}, it should {expected}")
    return Signature(tuple(spec for spec, _ in inputs), tuple(spec for spec, _ in outputs), fixed)


def _spec(what: str, node: ort.NodeArg) -> TensorSpec:
    datatype = _TYPES.get(node.type)
    if datatype is None:
        raise EngineLoadError(f"{what} {node.name!r} has type {node.type}, which is not supported")
    if not node.shape:
        raise EngineLoadError(f"{what} {node.name!r} is a scalar or of unknown rank: no axis to batch along")
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape[1:])
    return TensorSpec(node.name, datatype, shape)
