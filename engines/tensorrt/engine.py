"""TensorRT on one GPU, driven by the worker's thread alone.

The thread creates the GPU's context, loads the plan, allocates all memory and, at the end, frees it. A batch
costs it a few calls: set the shapes if they changed, copy in, execute, copy out, record an event, and later
wait for that event; or, with CUDA graphs, launch, record, wait.

TensorRT's and PyCUDA's objects must be freed before the context and on this thread. An exception holds its
frames and with them such objects, so errors are raised as new exceptions, outside the `except` block.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cobatch.engines.base import AUTO, Array, Batching, RowShapes, Signature
from cobatch.engines.errors import (
    EngineDeadError,
    EngineError,
    EngineLoadError,
    EngineRunError,
    NoBatchAxisError,
)
from cobatch.engines.proof import PROOF_ROWS, prove, settle
from cobatch.engines.tensorrt.api import load_tensorrt
from cobatch.engines.tensorrt.cuda import (
    CaptureError,
    Device,
    Needs,
    OutOfMemoryError,
    as_engine_error,
    is_sticky,
    load_graphs,
    show_bytes,
    working_memory,
)
from cobatch.engines.tensorrt.diagnostics import ErrorLog, make, make_log, make_recorder
from cobatch.engines.tensorrt.plans.cache import Verdicts
from cobatch.engines.tensorrt.slot import Plan, Slot
from cobatch.engines.tensorrt.tensors import (
    Buckets,
    Profile,
    estimate_buffers,
    read_profiles,
    read_tensors,
)

log = logging.getLogger("cobatch.tensorrt")

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)


class TensorRTEngine:
    """A plan in `slots` slots. `max_batch_size` is lowered to the plan's.

    `buckets`: batch sizes to round up to, powers of two by default. `graphs`: replay CUDA graphs if
    cuda-bindings is installed and row shapes are fixed. `host_code`: the plan may contain code for the CPU,
    as version-compatible ones do. `plan_source` returns the plan's bytes; it is called with the GPU's context
    current, so it may build the plan. `verdicts` keeps the outcome of the proof of batching.
    """

    platform = "tensorrt_plan"
    asynchronous = True  # see `Engine`

    def __init__(
        self,
        path: str,
        max_batch_size: int,
        *,
        device: int = 0,
        buckets: Sequence[int] | None = None,
        slots: int = 2,
        runtime: str = "tensorrt",
        graphs: bool = True,
        host_code: bool = False,
        plan_source: Callable[[], bytes] | None = None,
        batching: Batching = AUTO,
        verdicts: Verdicts | None = None,
    ) -> None:
        self.path = path
        self.max_batch_size = max_batch_size
        self.slots = slots
        self._bucket_sizes = buckets
        self._runtime_kind = runtime
        self._graphs = graphs
        self._host_code = host_code
        self._plan_source = plan_source or Path(path).read_bytes
        self._batching = batching
        self._verdicts = verdicts
        self._device = Device(device)
        self._gpu = f"GPU {device}"
        self._signature: Signature | None = None
        self._slots: list[Slot] = []
        self._runtime: Any = None
        self._engine: Any = None
        self._recorder: Any = None
        self._trt: Any = None
        self._log: ErrorLog | None = None
        self._needs: Needs | None = None
        self._free = 0
        self._dead = ""

    @property
    def signature(self) -> Signature:
        """The model's tensors. Raises RuntimeError before `open`."""
        if self._signature is None:
            raise RuntimeError("the engine is not open")
        return self._signature

    # Opening and closing

    def open(self) -> None:
        """Load the plan and allocate. Raises EngineLoadError."""
        try:
            self._open()
            return
        except Exception as error:  # noqa: BLE001 - TensorRT's errors have no common base
            proving = isinstance(error, EngineDeadError) and self._batching.verdict == "auto"
            failure = self._load_failure(error)
        if not proving:
            raise failure
        # The proof's inputs ended it, for example as indices outside a table: open it again without.
        self.close()
        self._dead = ""
        self._batching = Batching("unproven", f"its inputs ended the engine: {failure}")
        self.open()

    def _open(self) -> None:
        tensorrt = load_tensorrt(self._runtime_kind)
        self._trt = trt = tensorrt.trt
        self._device.open()
        self._log = make_log(trt)
        self._recorder = make_recorder(trt)
        data = self._plan_source()
        self._runtime = make(trt.Runtime, self._log, f"{tensorrt.kind} {tensorrt.version} cannot run here")
        self._runtime.error_recorder = self._recorder
        self._runtime.engine_host_code_allowed = self._host_code
        self._free, _ = self._device.memory()
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            sizes = f"the plan has {show_bytes(len(data))}; free on {self._gpu}: {show_bytes(self._free)}"
            raise EngineLoadError(
                f"TensorRT {tensorrt.version} cannot load the plan of {self.path} ({sizes})"
            )
        signature, profiles = self._settle(data)
        buckets = Buckets(signature, profiles, self.max_batch_size, self._bucket_sizes)
        if (
            signature.fixed_batch is None
            and signature.batching.on
            and buckets.max_batch_size < self.max_batch_size
        ):
            log.warning(
                "%s: the plan accepts at most %d rows, max_batch_size is %d",
                self.path,
                buckets.max_batch_size,
                self.max_batch_size,
            )
        self.max_batch_size = buckets.max_batch_size
        self._free, _ = self._device.memory()
        working = max(working_memory(self._engine, profile.index) for profile in profiles)
        buffers = estimate_buffers(signature, profiles, buckets)
        self._needs = Needs(self.slots, buckets.sizes[-1], working, buffers)
        self._fill_slots(Plan(trt, self._recorder, working, signature, profiles, buckets))
        log.info(
            "%s: TensorRT %s on %s, %d slots, batches of %s rows, %s besides the weights, CUDA graphs %s",
            self.path,
            tensorrt.version,
            self._gpu,
            self.slots,
            ", ".join(map(str, buckets.sizes)),
            show_bytes(self._needs.total),
            "on" if self._prepare() else "off",
        )

    def _settle(self, plan: bytes) -> tuple[Signature, tuple[Profile, ...]]:
        """Decide if rows are batched, as an earlier load of this plan did, and read the profiles."""
        batching, verdicts = self._batching, self._verdicts
        if batching.verdict == "auto" and verdicts is not None:
            batching = verdicts.recall(plan) or batching
        signature = settle(*read_tensors(self._engine), batching, self._prove)
        if batching.verdict == "auto" and verdicts is not None:
            verdicts.remember(plan, signature.batching)
        return read_profiles(self._engine, signature)

    def _prove(self, rows: Signature) -> Batching:
        """Prove the batch axis in a slot of its own, which is small."""
        signature, profiles = read_profiles(self._engine, rows)
        buckets = Buckets(signature, profiles, PROOF_ROWS, (1, PROOF_ROWS - 1))
        working = max(working_memory(self._engine, profile.index) for profile in profiles)
        slot = Slot(Plan(self._trt, self._recorder, working, signature, profiles, buckets), self._device)
        self._slots = [slot]  # `close` frees it if the proof ends the engine
        try:
            slot.open(self._engine)
            slot.allocate(*slot.measure()[1:])
            batching = prove(signature, partial(self._try, slot), buckets.max_batch_size, gpu=True)
        except NoBatchAxisError as error:
            batching = Batching("disproved", str(error))
        except EngineLoadError as error:
            # Such as too little memory, which the engine's own slots will lack too.
            batching = Batching("unproven", str(error))
        self._slots = []
        slot.release(dead=False)
        slot.free()
        return batching

    def _try(self, slot: Slot, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Run rows once. A refusal is raised outside the frames that hold TensorRT's objects."""
        rows, row_shapes = len(arrays[0]), tuple(array.shape[1:] for array in arrays)
        try:
            for buffer, array in zip(slot.inputs(rows, row_shapes), arrays, strict=True):
                buffer[:rows] = array
            slot.enqueue(rows, row_shapes)
            return slot.wait()
        except NoBatchAxisError:
            raise
        except Exception as error:  # noqa: BLE001 - see `open`
            failure = as_engine_error(error)
        text = "; ".join([str(failure), *self._details()])
        if isinstance(failure, EngineDeadError) or is_sticky(text):
            raise EngineDeadError(text)
        slot.recover()
        raise EngineRunError(text)

    def _fill_slots(self, plan: Plan) -> None:
        for _ in range(self.slots):
            self._slots.append(Slot(plan, self._device))
            self._slots[-1].open(self._engine)
        outputs, sizes, late = self._slots[0].measure()
        self._signature = replace(plan.signature, outputs=outputs)
        assert self._needs is not None
        self._needs = replace(self._needs, buffers=sum(sizes))
        for slot in self._slots:
            slot.allocate(sizes, late)

    def _prepare(self) -> bool:
        """Run each slot once; True if batches are replayed as graphs. A model may refuse zeros only."""
        driver = load_graphs() if self._graphs else None
        for slot in self._slots:
            try:
                captured = slot.prepare(driver)
            except (CaptureError, EngineRunError) as error:
                text = "; ".join([str(error), *self._details()])
                if is_sticky(text):
                    raise EngineDeadError(text) from None
                captured = False
                problem = "no CUDA graph" if isinstance(error, CaptureError) else "a run with zeros failed"
                log.warning("%s: %s: %s", self.path, problem, text)
                slot.recover()
                slot.drop_graphs()
                driver = None
        return captured

    def _load_failure(self, error: Exception) -> EngineLoadError:
        text = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        text = "; ".join([text, *self._details()])
        if isinstance(as_engine_error(error), EngineDeadError) or is_sticky(text):
            self._dead = text
        memory = isinstance(error, OutOfMemoryError) or _OUT_OF_MEMORY.search(text)
        if memory and self._needs is not None:
            return EngineLoadError(self._needs.refusal(self._gpu, text, self._free))
        return EngineLoadError(text)

    def close(self) -> None:
        """Free everything; after a sticky error, by destroying the context."""
        dead = bool(self._dead)
        slots, self._slots = self._slots, []
        for slot in slots:
            try:
                slot.release(dead)
            except Exception as error:  # noqa: BLE001 - PyCUDA's; the context frees the rest
                log.warning("%s: closing: %s", self.path, error)
                dead = True
                slot.release(dead)
        self._engine = self._runtime = None
        in_use = [slot.in_use() for slot in slots]
        if any(in_use):
            log.warning("%s: outputs are still in use; the GPU's context is kept", self.path)
            self._device.keep(slots, dead)
            return
        if dead:
            self._device.close(dead)  # so that freeing the slots calls nothing in the dead context
        for slot in slots:
            slot.free()
        self._recorder = None
        self._device.close(dead)

    # Batches

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """Return the slot's page-locked input buffers. Raises EngineRunError if no profile fits."""
        return self._slots[slot].inputs(rows, row_shapes)

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Start the batch on the slot's stream, without waiting for the GPU."""
        if self._dead:
            raise EngineDeadError(self._dead)
        try:
            self._slots[slot].enqueue(rows, row_shapes)
            return
        except Exception as error:  # noqa: BLE001 - no common base of PyCUDA's and TensorRT's
            failure = self._run_failure(slot, error)
        raise failure

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Wait for the batch; its only wait."""
        if self._dead:
            raise EngineDeadError(self._dead)
        try:
            return self._slots[slot].wait()
        except Exception as error:  # noqa: BLE001 - see above
            failure = self._run_failure(slot, error)
        raise failure

    def _run_failure(self, slot: int, error: Exception) -> EngineError:
        """Return the error of a failed batch; the slot is usable again unless the engine is dead."""
        failure = as_engine_error(error)
        text = "; ".join([str(failure), *self._details()])
        if not isinstance(failure, EngineDeadError) and not is_sticky(text):
            try:
                self._slots[slot].recover()
            except Exception as later:  # noqa: BLE001 - see above
                text = f"{text}; {as_engine_error(later)}"
            else:
                return EngineRunError(text)
        self._dead = f"{self._gpu}: {text}"
        return EngineDeadError(self._dead)

    def _details(self) -> list[str]:
        """Return TensorRT's errors since the last call, without duplicates."""
        entries = [] if self._recorder is None else self._recorder.take()
        logged = [] if self._log is None else self._log.take()
        texts = [entry.partition(": ")[2] for entry in entries]
        return [*entries, *(line for line in logged if not any(text in line for text in texts))]
