"""ONNX Runtime, on the CPU or with other execution providers.

Inputs are packed into buffers of a slot, which are reused. A binding (`IOBinding`) of the first `rows` rows
of the input and output buffers is created once for each number of rows and cached. ONNX Runtime reads the
buffers at each run, so a run is one call and takes half the time of `run` on a tiny model.

Cached bindings need outputs of known shape: an output that ONNX Runtime allocates stays bound after the first
run, and a run with another output shape fails. Binding at each run costs more than `run`, so models with
strings or with outputs of unknown shape use `run`.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Mapping
from math import prod
from types import MappingProxyType

import numpy as np
import onnxruntime as ort

from cobatch.engines.base import AUTO, Array, Batching, RowShapes, Signature, available_cores
from cobatch.engines.elements import let_go
from cobatch.engines.errors import EngineLoadError, EngineRunError, NoBatchAxisError
from cobatch.engines.onnxruntime import runs
from cobatch.engines.onnxruntime.signature import has_declared_shapes, read_signature

_CPU = "CPUExecutionProvider"
_BINDING_LIMIT = 256
# By ONNX Runtime's severities, from verbose to fatal.
_LEVELS = (logging.DEBUG, logging.DEBUG, logging.WARNING, logging.ERROR, logging.CRITICAL)
_ERROR = 3
log = logging.getLogger("cobatch.onnxruntime")

# ONNX Runtime's binding, and the arrays that receive the outputs.
_Binding = tuple[ort.IOBinding, tuple[Array, ...]]
# Execution providers with their options, in order of preference.
Providers = Mapping[str, Mapping[str, object]]


class _Slot:
    """A slot's memory and bindings. Buffers grow to the largest row shape seen."""

    def __init__(self) -> None:
        self.memory: dict[int, Array] = {}
        self.inputs: dict[RowShapes, tuple[Array, ...]] = {}
        self.outputs: tuple[Array, ...] = ()
        self.bindings: OrderedDict[tuple[int, RowShapes], _Binding] = OrderedDict()
        self.rows = 0
        self.row_shapes: RowShapes = ()

    def forget(self) -> None:
        """Drop all references to buffers that will be replaced."""
        self.inputs.clear()
        self.bindings.clear()


class OnnxRuntimeEngine:
    """One session. A model with a fixed batch axis runs at that size, padded with zeros.

    `threads`: of the session; by default one core is left to the event loop. `max_batch_size` is set to the
    model's own, if it fixes one, and to 1 with batching off. `providers`: the CPU if empty; the CPU also runs
    what none of them can. Raises EngineLoadError if this build of ONNX Runtime lacks one.
    """

    platform = "onnxruntime_onnx"
    slots = 2

    def __init__(
        self,
        path: str,
        max_batch_size: int,
        threads: int | None = None,
        batching: Batching = AUTO,
        providers: Providers = MappingProxyType({}),
    ) -> None:
        present = ort.get_available_providers()
        for name in providers:
            if name not in present:
                raise EngineLoadError(f"this ONNX Runtime has no {name}, only {', '.join(present)}")
        self.path = path
        self._providers = providers or {_CPU: {}}
        self.max_batch_size = max_batch_size
        self._batching = batching
        self._threads = threads or max(1, available_cores() - 1)
        self._signature: Signature | None = None
        self._session: ort.InferenceSession | None = None
        self._slots = [_Slot() for _ in range(self.slots)]
        self._plain = False  # use `run` instead of bindings

    @property
    def signature(self) -> Signature:
        """The model's tensors. Raises RuntimeError before `open`."""
        if self._signature is None:
            raise RuntimeError("the engine is not open")
        return self._signature

    @property
    def outputs_last(self) -> bool:
        """True if outputs are made for each run."""
        return self._plain

    def open(self) -> None:
        """Load the model. Raises EngineLoadError if ONNX Runtime refuses it or it cannot be batched."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # An idle thread that spins would take the event loop's core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = _ERROR
        if hasattr(ort, "set_default_logger_callback"):  # onnxruntime-gpu 1.31 logs to stderr
            ort.set_default_logger_callback(_on_log, _ERROR)
        ort.disable_telemetry_events()
        self._session = session = self._make_session(options)
        try:
            declared = self._settle(session, self._batching)
        except NoBatchAxisError as error:
            if self._batching.verdict != "auto":
                raise
            declared = self._settle(session, Batching("disproved", str(error)))
        except UnicodeDecodeError as error:
            raise EngineLoadError(f"{self.path}: the name of a tensor or axis: {error}") from error
        signature = self.signature
        self.max_batch_size = signature.fixed_batch or (self.max_batch_size if signature.batching.on else 1)
        specs = signature.inputs + signature.outputs
        known = all(spec.row_elements >= 0 for spec in signature.outputs) and declared
        self._plain = not known or any(spec.datatype == "BYTES" for spec in specs)
        if not self._plain:
            for slot in self._slots:
                slot.outputs = tuple(
                    np.zeros((self.max_batch_size, *spec.shape), spec.dtype) for spec in signature.outputs
                )

    def _make_session(self, options: ort.SessionOptions) -> ort.InferenceSession:
        """Raise EngineLoadError also for a provider that ONNX Runtime leaves out, which it only logs."""
        providers = [(name, dict(own)) for name, own in self._providers.items()]
        _logged.clear()
        try:
            session = ort.InferenceSession(self.path, options, providers=providers, enable_fallback=0)
        except Exception as error:
            raise EngineLoadError(f"ONNX Runtime cannot load {self.path}: {error}") from error
        used = session.get_providers()
        for name in self._providers:
            if name not in used:
                why = "; ".join(_logged) or "its message is on stderr"
                raise EngineLoadError(f"ONNX Runtime cannot use {name} here: {why}")
        return session

    def _settle(self, session: ort.InferenceSession, batching: Batching) -> bool:
        """Read the signature; return True if the outputs' shapes are as declared."""
        self._signature = read_signature(session, batching, gpu=list(self._providers) != [_CPU])
        return has_declared_shapes(session, self._signature, self.max_batch_size)

    def close(self) -> None:
        """Free the session and all buffers."""
        self._session = None
        self._slots = []

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """Return [n, *row_shape] for each input, n >= rows; the same arrays for equal shapes if large enough.

        With fixed row shapes n is max_batch_size. Otherwise memory grows as needed, since one huge row must
        not reserve memory for a whole batch of such rows.
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
        if len(state.inputs) >= _BINDING_LIMIT:
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
        """Record the batch; `wait` runs it."""
        state = self._slots[slot]
        state.rows = rows
        state.row_shapes = row_shapes

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Run the batch. Raises EngineRunError with ONNX Runtime's message, and BadRequest."""
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
        except EngineRunError:
            raise
        except Exception as error:
            raise EngineRunError(str(error)) from error
        return outputs if rows == run_rows else tuple(output[:rows] for output in outputs)

    def _run_plain(
        self, session: ort.InferenceSession, slot: int, rows: int, row_shapes: RowShapes
    ) -> tuple[Array, ...]:
        buffers = self.inputs(slot, rows, row_shapes)
        arrays = [self._seen_by_model(buffer[:rows]) for buffer in buffers]
        try:
            return self._run_arrays(session, arrays, row_shapes)
        finally:
            let_go(buffers, rows)

    def _run_arrays(
        self, session: ort.InferenceSession, arrays: list[Array], row_shapes: RowShapes
    ) -> tuple[Array, ...]:
        signature = self.signature
        cuttable = signature.batching.on and signature.fixed_batch is None
        strings = runs.strings_of_row(signature, row_shapes)
        cuts = runs.cuts_of(arrays, len(arrays[0]), strings) if cuttable else []
        if len(cuts) > 1:
            outputs = runs.run_in_parts(session, signature, arrays, cuts)
        else:
            outputs = runs.run(session, signature, arrays)
        if signature.batching.on:
            return tuple(outputs)
        return tuple(output[np.newaxis] for output in outputs)

    def _seen_by_model(self, rows: Array) -> Array:
        """Return the whole tensor that is the only row, with batching off; else the rows."""
        return rows if self.signature.batching.on else rows.reshape(rows.shape[1:])

    def _binding(
        self, session: ort.InferenceSession, slot: int, rows: int, row_shapes: RowShapes
    ) -> _Binding:
        bindings = self._slots[slot].bindings
        key = (rows, row_shapes)
        binding = bindings.get(key)
        if binding is not None:
            bindings.move_to_end(key)
        else:
            if len(bindings) >= _BINDING_LIMIT:
                bindings.popitem(last=False)
            binding = bindings[key] = self._bind(session, slot, rows, row_shapes)
        return binding

    def _bind(self, session: ort.InferenceSession, slot: int, rows: int, row_shapes: RowShapes) -> _Binding:
        io = session.io_binding()
        for spec, array in zip(self.signature.inputs, self.inputs(slot, rows, row_shapes), strict=True):
            part = self._seen_by_model(array[:rows])
            io.bind_input(spec.name, "cpu", 0, part.dtype.type, part.shape, part.ctypes.data)
        parts = tuple(buffer[:rows] for buffer in self._slots[slot].outputs)
        for spec, rows_ in zip(self.signature.outputs, parts, strict=True):
            part = self._seen_by_model(rows_)
            io.bind_output(spec.name, "cpu", 0, part.dtype.type, part.shape, part.ctypes.data)
        return io, parts


# The last errors that were logged: the only reasons that ONNX Runtime gives for leaving a provider out.
_logged: deque[str] = deque(maxlen=2)


def _on_log(severity: int, _category: str, _log_id: str, place: str, message: str) -> None:
    """Log a message, which ONNX Runtime would otherwise write to stderr."""
    _logged.append(message)
    log.log(_LEVELS[severity], "%s (%s)", message, place)
