"""The far end of the link of a pipeline's process: models in home as its steps use them."""

import asyncio
import socket
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from cobatch.batcher.request import Payload, Request
from cobatch.batcher.rows.padding import Padder
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec
from cobatch.engines.link.channel import Channel
from cobatch.engines.link.messages import decode_to_front
from cobatch.engines.link.slab import SlabReader, SlabWriter
from cobatch.server.http.problem import Problem
from cobatch.server.inference.padding import make_padder
from cobatch.server.links.page import Page
from cobatch.server.links.remote import RemoteBatcher, RemoteModel
from cobatch.server.links.rows import written
from cobatch.server.links.steps import KEPT_STEPS, Caller, StepError
from cobatch.server.links.uplink import MOST_TENANTS, Uplink
from cobatch.server.observability.record import StepTimes
from cobatch.server.settings.schema import ModelSettings, PadSettings
from cobatch.server.v2.checks import (
    OutputSizes,
    TensorNames,
    check_strings,
    check_tensor,
    check_text,
    wrong_shape,
)


class LinkedModel(Struct, frozen=True, array_like=True):
    """What a pipeline's process needs to know of a model before it is loaded."""

    name: str
    max_queue_rows: int
    pad: tuple[PadSettings, ...] = ()


class StepRequest(Request):
    """The rows of a step."""

    __slots__ = ("answer", "caller", "model")

    def __init__(
        self, step: "StepModel", caller: Caller, rows: int, shapes: RowShapes, payloads: Any
    ) -> None:
        Request.__init__(self, rows, shapes, payloads)
        self.model = step
        self.caller = caller
        self.tenant, self.priority = caller.tenant, caller.priority
        self.timeout_s = caller.timeout_s()
        self.answer: asyncio.Future[dict[str, Array]] = caller.link.loop.create_future()

    @property
    def source(self) -> Hashable:
        return self.tenant or self.caller.source

    def done(self) -> None:
        if self.answer.done():
            return
        if self.error is not None:
            self.answer.set_exception(_step_error(self.model.name, self.error))
            return
        assert self.batch is not None
        first, batch = self.first_row, self.batch
        outputs = {}
        for spec, output in zip(self.model.specs, batch.outputs, strict=True):
            own = output[first : first + self.rows]
            own = own if batch.lasting else _copied(own)
            outputs[spec.name] = own if spec.batched else own[0]
        self.answer.set_result(outputs)

    def times(self, error: BaseException | None) -> StepTimes:
        """Return the times of this step, which has ended."""
        kind = getattr(error, "kind", "" if error is None else "cancelled")
        batch = self.batch
        if batch is None:
            now_s = time.monotonic()
            times_s = now_s, now_s, now_s
        else:
            times_s = batch.dispatched_s, batch.started_s, batch.finished_s
        return StepTimes(self.model.name, self.rows, self.enqueued_s or times_s[0], *times_s, kind)


def _copied(rows: Array) -> Array:
    """Return a copy that may be written to.

    The interpreter lock is kept: a handler's thread would have it for a while (`batcher.rows.copying`).
    """
    if rows.dtype.hasobject:
        return rows.copy()
    return np.ndarray(rows.shape, rows.dtype, bytearray(np.ascontiguousarray(rows).data))


def _step_error(name: str, error: Exception) -> StepError:
    return StepError(name, error if isinstance(error, Problem) else Problem("internal", str(error)))


class StepModel(RemoteModel):
    """A model in home, as steps use it."""

    def __init__(self, linked: LinkedModel, index: int) -> None:
        super().__init__(linked.name, index, linked.max_queue_rows, 1)
        self.settled = asyncio.Event()  # it is loaded, or never will be
        self._pads = linked.pad
        self._padder: Padder | None = None

    def use(self, signature: Signature) -> None:
        self._padder = make_padder(self.name, self._pads, signature)
        self._names = TensorNames(signature, self._padder)
        self._output_sizes = OutputSizes(signature)
        self._inputs = {spec.name: (index, spec) for index, spec in enumerate(signature.inputs)}
        self._fixed = all(spec.row_elements >= 0 for spec in signature.inputs)
        self._row_shapes: RowShapes = tuple(spec.shape for spec in signature.inputs)
        self.specs = signature.outputs

    def request(self, caller: Caller, inputs: Mapping[str, Any]) -> StepRequest:
        """Return the request of a step. Raises TypeError and StepError."""
        try:
            self._names.check_inputs(list(inputs))
        except Problem as problem:
            raise TypeError(f"step {self.name!r}: {problem.detail}") from None
        payloads: list[Any] = [None] * len(self._inputs)
        shapes: list[tuple[int, ...]] = list(self._row_shapes)
        rows = 0
        try:
            for name, value in inputs.items():
                index, spec = self._inputs[name]
                array = np.asarray(value)
                shapes[index] = row_shape = array.shape[1:] if spec.batched else array.shape
                self._check_datatype(spec, array)
                if array.shape[1:] != spec.shape or not array.size or not spec.batched:
                    check_tensor(spec, spec.datatype, list(array.shape))
                count = len(array) if spec.batched else 1
                if rows not in (0, count):
                    raise wrong_shape(spec, list(array.shape), f"the other inputs have {rows} rows")
                rows = count
                payloads[index] = written(_payload(spec, rows, array))
                shapes[index] = row_shape
            if not self._fixed:
                if self._padder is not None:
                    self._padder.add_masks(rows, shapes, payloads)
                self._output_sizes.check(rows, shapes)
        except Problem as problem:
            raise StepError(self.name, problem) from None
        return StepRequest(self, caller, rows, self._row_shapes if self._fixed else tuple(shapes), payloads)

    def _check_datatype(self, spec: TensorSpec, array: Array) -> None:
        fits = array.dtype.kind in "OSU" if spec.datatype == "BYTES" else array.dtype == spec.dtype
        if not fits:
            expected = "strings or bytes" if spec.datatype == "BYTES" else f"{spec.dtype} ({spec.datatype})"
            raise TypeError(
                f"step {self.name!r}: input {spec.name!r} must be of {expected}, got {array.dtype}"
            )

    def loaded_batcher(self) -> RemoteBatcher:
        """Return the batcher. Raises StepError if there is none yet."""
        if self.batcher is not None:
            return self.batcher
        if self.load_error is not None:
            problem = Problem("load-failed", f"model {self.name!r} could not be loaded", model=self.name)
        else:
            detail = f"model {self.name!r} is being loaded"
            problem = Problem("starting", detail, model=self.name, retry_after_s=1)
        raise StepError(self.name, problem)


def _payload(spec: TensorSpec, rows: int, array: Array) -> Payload:
    """Return an input's elements as they are sent. Raises Problem."""
    if spec.datatype != "BYTES":
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    check_strings(spec, array.size)
    texts = [one if isinstance(one, bytes) else str(one).encode() for one in array.reshape(-1).tolist()]
    check_text(spec, rows, texts)
    return texts


class StepEnd:
    """The far end of a pipeline's link to home. `descriptors`: as `hub.open_steps` returns them."""

    def __init__(self, descriptors: Sequence[int], models: Sequence[LinkedModel]) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        messages, slab_in, slab_out, page = descriptors
        linked = [StepModel(one, index) for index, one in enumerate(models)]
        self._models = {one.name: one for one in linked}
        self._tenants: dict[tuple[str, int], Tenant] = {}
        self._uplink = Uplink(
            Channel(socket.socket(fileno=messages), decode_to_front),
            SlabReader(slab_in),
            SlabWriter(slab_out),
            Page(page, len(models), None, writable=False),
            linked,
            self.loop,
            on_loaded=self._settle,
            on_ended=self._on_ended,
            waits=True,
        )

    def _settle(self) -> None:
        for one in self._models.values():
            if one.batcher is not None or one.load_error is not None:
                one.settled.set()

    def _on_ended(self, why: str, broken: bool) -> None:
        for one in self._models.values():
            one.settled.set()

    def unknown(self, names: set[str]) -> str | None:
        """Return why these names are not all models of the server, or None."""
        missing = sorted(names - self._models.keys())
        if not missing:
            return None
        known = ", ".join(map(repr, self._models)) or "no models"
        return f"there is no model {missing[0]!r}; the server has {known}"

    def tenant(self, name: str, rule: int) -> Tenant:
        """Return the tenant of this name and rule."""
        tenant = self._tenants.pop((name, rule), None)
        if tenant is None:
            tenant = Tenant(name)
            tenant.rule = rule
            if len(self._tenants) >= MOST_TENANTS:
                del self._tenants[next(iter(self._tenants))]
        self._tenants[name, rule] = tenant
        return tenant

    async def call(self, caller: Caller, name: str, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Run a step of a call. Raises StepError, TypeError and LookupError."""
        step = self._models.get(name)
        if step is None:
            raise LookupError(self.unknown({name}))
        if caller.ended:
            raise RuntimeError(f"step {name!r}: its request has ended")
        if not step.settled.is_set():
            await self._until_settled(caller, step)
        batcher = step.loaded_batcher()
        request = step.request(caller, inputs)
        if request.timeout_s is not None and request.timeout_s <= 0:
            raise StepError(name, Problem("expired", "the call's deadline has passed"))
        error: BaseException | None = None
        caller.open.add(request.answer)
        try:
            batcher.submit(request)
            return await request.answer
        except Problem as problem:
            error = StepError(name, problem)
            raise error from None
        except BaseException as raised:
            error = raised
            batcher.cancel(request)
            raise
        finally:
            caller.open.discard(request.answer)
            if len(caller.steps) < KEPT_STEPS:
                caller.steps.append(request.times(error))
            del error  # it refers to this frame

    async def _until_settled(self, caller: Caller, step: StepModel) -> None:
        """Wait until a model is loaded, or cannot be: the server may load it at this moment."""
        waiting = asyncio.ensure_future(step.settled.wait())
        caller.open.add(waiting)
        try:
            await waiting
        finally:
            caller.open.discard(waiting)

    def close(self) -> None:
        """End the link."""
        self._uplink.end("the process ends")


def linked_models(settings: Sequence[ModelSettings]) -> tuple[LinkedModel, ...]:
    """Return what a pipeline's process needs to know of these models."""
    return tuple(LinkedModel(one.name, one.max_queue_rows, tuple(one.pad)) for one in settings)
