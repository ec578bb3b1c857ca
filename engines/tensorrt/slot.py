"""A slot: one batch's way over the GPU, on a stream of its own.

Everything is allocated at `open`, for the largest batch: for each tensor a page-locked host buffer, which
rows are packed into directly, and a device buffer. A batch is copied in, run and copied out on the slot's
stream, and an event behind it says when all is done; nothing of this waits, and one wait for the event ends
the batch. While it runs, the other slot's rows are packed and the last batch's answers are handed out.

Where rows have fixed shapes each bucket has an execution context of its own, set to its shapes once; a CUDA
graph that was captured from a context is only good as long as nothing of that context changes. All contexts
of a slot share TensorRT's working memory, since only one of them runs at a time. Where rows vary there is a
context for each profile, its shapes are set when they change, and nothing is captured.

A tensor's buffer only ever holds that tensor's rows, whatever the batch's size. So the surplus rows, which
fill a batch up to its bucket, are zeros or rows of earlier batches: values that the model takes, such as
indices within bounds. What is computed from them is cut off. After a batch that failed they are zeroed, or
the row that it failed on would fail the next one, too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec
from cobatch.engines.errors import EngineLoadError, EngineRunError
from cobatch.engines.tensorrt.cuda import Device, Graph, OutOfMemoryError
from cobatch.engines.tensorrt.layout import Layout, ProfileContext, infer, lay_out, set_shapes, view_rows
from cobatch.engines.tensorrt.tensors import Buckets, Profile

_KEPT = 256  # row shapes, and numbers of rows of a shape, that are remembered


@dataclass(frozen=True, slots=True)
class Plan:
    """What all slots share. `working`: the bytes that TensorRT works in, in any of its contexts."""

    trt: Any
    recorder: Any
    working: int
    signature: Signature
    profiles: tuple[Profile, ...]
    buckets: Buckets

    @property
    def fixed(self) -> bool:
        """Whether the inputs' rows have one shape each."""
        return all(spec.row_elements >= 0 for spec in self.signature.inputs)


class Slot:
    """Lives on the worker thread, but for `inputs`, which makes no call of CUDA's."""

    def __init__(self, plan: Plan, device: Device) -> None:
        self._plan = plan
        self._device = device
        self._contexts: dict[int, ProfileContext] = {}
        self._layouts: dict[tuple[int, RowShapes], Layout] = {}
        self._entries: dict[tuple[int, RowShapes], tuple[Layout, tuple[Array, ...]]] = {}
        self._arrays: dict[RowShapes, tuple[Array, ...]] = {}
        self._working: Any = None
        self._hosts: list[Array] = []
        self._memory: list[Any] = []
        self._outputs: tuple[Array, ...] = ()
        self._stream: Any = None
        self._event: Any = None

    # Opening and closing

    def open(self, engine: Any) -> None:
        """The stream, TensorRT's working memory and the execution contexts, which share it.

        Raises EngineLoadError, and OutOfMemoryError where it was that and not TensorRT's own to say.
        """
        device, plan = self._device, self._plan
        self._stream, self._event = device.stream(), device.event()
        self._handle = int(self._stream.handle)
        self._htod, self._dtoh = device.cuda.memcpy_htod_async, device.cuda.memcpy_dtoh_async
        self._working = _allocate(device.allocate, plan.working, "TensorRT's working memory")
        if plan.fixed:
            shapes = tuple(spec.shape for spec in plan.signature.inputs)
            for bucket in plan.buckets.sizes:
                _, profile = plan.buckets.choose(bucket, shapes)
                self._contexts[bucket] = self._make_context(engine, profile)
        else:
            for each in plan.profiles:
                self._contexts[each.index] = self._make_context(engine, each.index)
        self._stream.synchronize()

    def _make_context(self, engine: Any, profile: int) -> ProfileContext:
        plan = self._plan
        context = engine.create_execution_context(plan.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineLoadError("TensorRT makes no execution context")
        context.error_recorder = plan.recorder
        if plan.working and hasattr(context, "set_device_memory"):
            context.set_device_memory(int(self._working), plan.working)
        elif plan.working:
            context.device_memory = int(self._working)
        if not context.set_optimization_profile_async(profile, self._handle):
            raise EngineLoadError(f"TensorRT does not take profile {profile}")
        return ProfileContext(context)

    def _context(self, bucket: int, row_shapes: RowShapes) -> ProfileContext:
        buckets = self._plan.buckets
        return self._contexts[bucket if self._plan.fixed else buckets.choose(bucket, row_shapes)[1]]

    def measure(self) -> tuple[tuple[TensorSpec, ...], tuple[int, ...]]:
        """The outputs as they come out, and how large each tensor gets, in bytes, inputs first."""
        plan = self._plan
        inputs, outputs = plan.signature.inputs, plan.signature.outputs
        specs = inputs + outputs
        sizes = [0] * len(specs)
        for rows, row_shapes in self._largest():
            shapes = [(spec.name, (rows, *shape)) for spec, shape in zip(inputs, row_shapes, strict=True)]
            found = infer(self._context(rows, row_shapes).context, shapes, outputs)
            for spec, shape in zip(outputs, found, strict=True):
                if shape[:1] != (rows,):
                    raise EngineLoadError(
                        f"output {spec.name!r} does not follow the batch axis: {rows} rows give {list(shape)}"
                    )
            for index, shape in enumerate([*(shape for _, shape in shapes), *found]):
                sizes[index] = max(sizes[index], prod(shape) * specs[index].dtype.itemsize)
        if plan.fixed:
            # Where the inputs' rows have one size, so have the outputs', whatever the plan leaves open.
            outputs = tuple(
                replace(spec, shape=shape[1:]) for spec, shape in zip(outputs, found, strict=True)
            )
        return outputs, tuple(sizes)

    def _largest(self) -> list[tuple[int, RowShapes]]:
        plan = self._plan
        if plan.fixed:
            return [(plan.buckets.sizes[-1], tuple(spec.shape for spec in plan.signature.inputs))]
        return [
            (plan.buckets.most_rows(profile), tuple(shape[1:] for shape in profile.most))
            for profile in plan.profiles
        ]

    def allocate(self, sizes: Sequence[int]) -> None:
        """The buffers, as `measure` answered them. Raises as `open`."""
        signature = self._plan.signature
        specs = signature.inputs + signature.outputs
        for spec, size in zip(specs, sizes, strict=True):
            self._memory.append(_allocate(self._device.allocate, size, f"tensor {spec.name!r}"))
            what = f"the page-locked buffer of tensor {spec.name!r}, in the host's memory"
            self._hosts.append(_allocate(self._device.pinned, size, what))
        for profile in self._contexts.values():
            for spec, memory in zip(specs, self._memory, strict=True):
                if not profile.context.set_tensor_address(spec.name, int(memory)):
                    raise EngineLoadError(f"TensorRT takes no address for tensor {spec.name!r}")

    def prepare(self, graphs: Any | None) -> bool:
        """Where the rows' shapes are fixed: each bucket is laid out, run once with zeros and captured.

        `graphs`: cuda-bindings' driver, None for no graphs. Whether there are some then. Raises what running
        raises, and CaptureError.
        """
        if not self._plan.fixed:
            return False
        shapes = tuple(spec.shape for spec in self._plan.signature.inputs)
        for bucket in self._plan.buckets.sizes:
            try:
                layout = self._layout(bucket, shapes)
            except EngineRunError as error:
                raise EngineLoadError(str(error)) from None
            self._enqueue(layout)
            self._stream.synchronize()
            if graphs is not None:
                layout.graph = Graph(graphs, self._handle, partial(self._enqueue, layout))
        return graphs is not None

    def drop_graphs(self) -> None:
        """Batches are enqueued call by call from now on."""
        for layout in self._layouts.values():
            if layout.graph is not None:
                layout.graph.close()
            layout.graph = None

    def release(self, dead: bool) -> None:
        """Let go of what is TensorRT's. Nothing of a dead context is called any more."""
        if self._stream is not None and not dead:
            self._stream.synchronize()  # nothing may still run in memory that is about to be freed
        if not dead:
            self.drop_graphs()
        for profile in self._contexts.values():
            # It and its layout know each other: the collector would free TensorRT's object, at any time.
            profile.context = profile.layout = None
        self._contexts.clear()
        self._layouts.clear()
        self._entries.clear()

    def still_read(self) -> bool:
        """After `release`: whether somebody has views of the page-locked memory, such as answers."""
        self._outputs = ()
        self._arrays.clear()
        # Known references: the list's, the loop's and the argument's.
        return any(sys.getrefcount(host) > 3 for host in self._hosts)

    def free(self) -> None:
        """Let go of the memory. What somebody still reads of it stays until they are done."""
        self._hosts.clear()
        self._memory.clear()
        self._working = None
        self._event = self._stream = None

    # Batches

    def inputs(self, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """Views of the page-locked buffers. Raises EngineRunError for shapes that no profile takes."""
        arrays = self._arrays.get(row_shapes)
        if arrays is None:
            self._plan.buckets.choose(rows, row_shapes)
            if len(self._arrays) >= _KEPT:
                self._arrays.clear()
            specs = self._plan.signature.inputs
            arrays = tuple(map(view_rows, self._hosts, specs, row_shapes))
            self._arrays[row_shapes] = arrays
        if rows > len(arrays[0]):
            self._plan.buckets.choose(rows, row_shapes)
        return arrays

    def enqueue(self, rows: int, row_shapes: RowShapes) -> None:
        """Start what lies in the inputs. Returns at once."""
        entry = self._entries.get((rows, row_shapes))
        layout, self._outputs = entry if entry is not None else self._enter(rows, row_shapes)
        if layout.graph is not None:
            layout.graph.launch()
        else:
            self._enqueue(layout)
        self._event.record(self._stream)

    def wait(self) -> tuple[Array, ...]:
        """Wait until it is done, with the interpreter lock released."""
        self._event.synchronize()
        return self._outputs

    def recover(self) -> None:
        """After a batch that failed: nothing of it runs on, and no row of it is run again as surplus."""
        self._stream.synchronize()
        for host in self._hosts[: len(self._plan.signature.inputs)]:
            host.fill(0)

    def _enqueue(self, layout: Layout) -> None:
        stream = self._stream
        profile = layout.profile
        if profile.layout is not layout:
            profile.layout = None
            set_shapes(profile.context, layout.shapes)
            profile.layout = layout
        for address, host in layout.copies_in:
            self._htod(address, host, stream)
        if not profile.context.execute_async_v3(self._handle):
            raise EngineRunError("TensorRT could not start the batch")
        for host, address in layout.copies_out:
            self._dtoh(host, address, stream)

    def _enter(self, rows: int, row_shapes: RowShapes) -> tuple[Layout, tuple[Array, ...]]:
        if len(self._entries) >= _KEPT:
            self._entries.clear()
        bucket, _ = self._plan.buckets.choose(rows, row_shapes)
        layout = self._layout(bucket, row_shapes)
        entry = layout, tuple(output[:rows] for output in layout.outputs)
        self._entries[rows, row_shapes] = entry
        return entry

    def _layout(self, bucket: int, row_shapes: RowShapes) -> Layout:
        layout = self._layouts.get((bucket, row_shapes))
        if layout is None:
            if len(self._layouts) >= _KEPT:
                # Only rows of varying shape have so many, and those have no graphs.
                self._layouts.clear()
                self._entries.clear()
            layout = self._layouts[bucket, row_shapes] = self._lay_out(bucket, row_shapes)
        return layout

    def _lay_out(self, bucket: int, row_shapes: RowShapes) -> Layout:
        profile = self._context(bucket, row_shapes)
        return lay_out(profile, self._plan.signature, bucket, row_shapes, self._hosts, self._memory)


def _allocate(allocate: Any, size: int, what: str) -> Any:
    try:
        return allocate(size)
    except MemoryError:
        pass  # raised below, where the other error holds no frames any more
    raise OutOfMemoryError(what, size)
