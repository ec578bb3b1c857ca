"""The engines of models in Python: in a process of its own, or in the worker's thread."""

import threading
from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from cobatch.engines.base import Array, Batching, RowShapes, Signature, is_alone
from cobatch.engines.elements import let_go
from cobatch.engines.errors import BadRequest, EngineEndedError, EngineLoadError, EngineRunError, LinkError
from cobatch.engines.link.slab import BLOCK_BYTES, create
from cobatch.engines.python.memory import Region, SlotInputs, read, write_strings
from cobatch.engines.python.messages import KINDS, Failed, Loaded, NotLoaded, Ran, Run, Start
from cobatch.engines.python.model import PythonModel, load
from cobatch.engines.python.process import ModelProcess

# Read by OpenMP, OpenBLAS and MKL when they are loaded; PyTorch uses OpenMP's.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class PythonEngine:
    """What both have in common. `max_batch_size` is set to 1 with batching off."""

    platform = "python"
    slots = 2

    def __init__(
        self,
        source: str,
        max_batch_size: int,
        folder: str,
        device: int,
        batching: Batching,
        arguments: tuple[object, ...] = (),
    ) -> None:
        self.max_batch_size = max_batch_size
        self.own_requests = False  # the model has `preprocess` or `postprocess`
        self._start = Start(source, folder, device, batching, arguments)
        self._signature: Signature | None = None
        self._inputs: list[SlotInputs] = []

    @property
    def signature(self) -> Signature:
        """The model's tensors. Raises RuntimeError before `open`."""
        if self._signature is None:
            raise RuntimeError("the engine is not open")
        return self._signature

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """Return the slot's input buffers: C-contiguous [n, *row_shape] each, n >= rows."""
        return self._inputs[slot].arrays(rows, row_shapes)

    def _opened(self, signature: Signature, reserve: Callable[[int], Callable[[int], memoryview]]) -> None:
        """Make the slots' buffers; `reserve` returns a slot's allocator."""
        self._signature = signature
        self.max_batch_size = self.max_batch_size if signature.batching.on else 1
        self._inputs = [
            SlotInputs(signature, self.max_batch_size, reserve(slot)) for slot in range(self.slots)
        ]


class ThreadEngine(PythonEngine):
    """The model runs in the worker's thread, and so in the server's process."""

    outputs_last = True

    def __init__(
        self, source: str, max_batch_size: int, folder: str, device: int, batching: Batching
    ) -> None:
        super().__init__(source, max_batch_size, folder, device, batching)
        self._model: PythonModel | None = None
        self._batches: dict[int, tuple[int, RowShapes]] = {}

    def open(self) -> None:
        """Load the model. Raises EngineLoadError."""
        self._model = load(*msgspec.structs.astuple(self._start))
        self.own_requests = self._model.own_requests
        self._opened(self._model.signature, lambda _: lambda size: np.zeros(size, np.uint8).data)

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Record the batch; `wait` runs it."""
        self._batches[slot] = rows, row_shapes

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Run the batch. Raises EngineRunError with the traceback, OutputError, or BadRequest."""
        assert self._model is not None
        rows, row_shapes = self._batches.pop(slot)
        buffers = self.inputs(slot, rows, row_shapes)
        try:
            outputs = self._model.run([buffer[:rows] for buffer in buffers])
            return tuple(_own(outputs, index) for index in range(len(outputs)))
        finally:
            let_go(buffers, rows)

    def close(self) -> None:
        """Forget the model."""
        self._model = None
        self._inputs = []


class ProcessEngine(PythonEngine):
    """The model runs in a process of its own, which cannot harm others.

    `on_end` may be set, and is called by another thread when the process has ended. EngineEndedError says so
    for the batch that ran then, and for each later one.
    """

    asynchronous = True

    def __init__(
        self,
        source: str,
        max_batch_size: int,
        folder: str,
        device: int,
        batching: Batching,
        *,
        name: str,
        threads: int | None = None,
        reload: bool = False,
        env: Mapping[str, str] | None = None,
        arguments: tuple[object, ...] = (),
    ) -> None:
        super().__init__(source, max_batch_size, folder, device, batching, arguments)
        self.on_end: Callable[[EngineEndedError], None] = _ignore
        self._name = name
        self._env = dict(env or {})
        if threads is not None:
            self._env |= dict.fromkeys(_THREAD_VARIABLES, str(threads))
        if reload:  # a file that changes twice in a second would have the bytecode of before
            self._env["PYTHONDONTWRITEBYTECODE"] = "1"
        self._number = 0  # of the batch that was sent last
        self._numbers: dict[int, int] = {}  # by slot
        self._answers: dict[int, Ran | Failed] = {}  # to batches that are not waited for yet
        self._regions: list[Region] = []  # of the batch that has begun; of each slot's inputs and outputs
        self._process: ModelProcess | None = None
        self._lock = threading.Lock()
        self._killed = False

    def open(self) -> None:
        """Start the process and load the model there. Raises EngineLoadError."""
        try:
            for _ in range(1 + 2 * self.slots):
                self._regions.append(Region(create(f"cobatch-{self._name}", BLOCK_BYTES, growing=True)))
        except OSError as error:
            raise EngineLoadError(f"memory for batches cannot be made: {error}") from error
        descriptors = [region.descriptor for region in self._regions]
        with self._lock:
            if self._killed:
                raise EngineLoadError("the server is about to stop")
            self._process = process = ModelProcess(self._name, descriptors, self._env, self._tell_end)
        try:
            process.send(self._start)
            loaded = process.receive()
        except EngineEndedError as error:
            raise EngineLoadError(f"while it was loaded, {error}") from error
        if not isinstance(loaded, Loaded):
            raise EngineLoadError(
                loaded.text if isinstance(loaded, NotLoaded) else f"the process sent {loaded}"
            )
        self.own_requests = loaded.own_requests
        self._opened(loaded.signature, lambda slot: self._slot(slot)[0].reserve)

    def _slot(self, slot: int) -> tuple[Region, Region]:
        """Return the regions of a slot's inputs and outputs."""
        return self._regions[1 + 2 * slot], self._regions[2 + 2 * slot]

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Send the batch. Raises EngineEndedError, and EngineRunError for strings that are too long."""
        specs = self.signature.inputs
        arrays = self.inputs(slot, rows, row_shapes)
        inputs = write_strings(specs, arrays, rows, self._slot(slot)[0])
        let_go(arrays, rows)
        self._number += 1
        self._numbers[slot] = self._number
        self._running.send(Run(self._number, slot, inputs))

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Wait for the outputs. Raises EngineRunError with the traceback and output, OutputError, BadRequest,
        and EngineEndedError."""
        number = self._numbers[slot]
        try:
            while number not in self._answers:  # a batch in the other slot may have been sent before
                self._receive()
        except EngineEndedError as error:
            error.begun = self._regions[0].number()[0] == number
            raise
        answer = self._answers.pop(number)
        if isinstance(answer, Failed):
            raise KINDS.get(answer.kind, EngineRunError)(answer.text)
        return read(self.signature.outputs, answer.outputs, self._slot(slot)[1])

    def _receive(self) -> None:
        """Receive the answer to a batch; an error's text gets the output of that batch."""
        process = self._running
        match answer := process.receive():
            case Failed(number, text, kind):
                printed = process.printed(number)
                if KINDS.get(kind) is not BadRequest:  # its text is for the caller
                    answer = Failed(number, text + printed, kind)
            case Ran(number):
                process.output.kept.clear()
            case _:
                raise LinkError(f"the model's process sent {type(answer).__name__}")
        self._answers[number] = answer

    @property
    def pid(self) -> int:
        """The number of the process, once the engine is open."""
        return self._running.pid

    @property
    def _running(self) -> ModelProcess:
        assert self._process is not None
        return self._process

    def kill(self, *, hung: bool = False) -> None:
        """End the process at once; `hung`: once it has logged where it is. May be called by any thread."""
        with self._lock:
            self._killed = True
            self.on_end = _ignore
            if self._process is not None and hung:
                self._process.abandon()
            elif self._process is not None:
                self._process.kill()

    def _tell_end(self, error: EngineEndedError) -> None:
        self.on_end(error)

    def close(self) -> None:
        """End the process and free its memory."""
        self.on_end = _ignore
        if self._process is not None:
            self._process.close()
        for region in self._regions:
            region.close()


def _own(outputs: list[Array], index: int) -> Array:
    """Return an output as an array that nothing else writes to.

    It may be a view of the inputs, or an array that the model uses for the next batch, and then refers to.
    """
    alone = outputs[index].flags.owndata and is_alone(outputs, index)
    return np.ascontiguousarray(outputs[index]) if alone else np.array(outputs[index], order="C")


def _ignore(error: EngineEndedError) -> None:
    """Ignore the end of a process that was ended here."""
