"""A slot: the buffers, stream and execution contexts that one batch runs with.

Everything is allocated at `open`, for the largest batch: for each tensor a page-locked host buffer, into
which rows are packed directly, and a device buffer. A batch is copied in, run and copied out on the slot's
stream, followed by an event; none of these calls waits, and one wait for the event ends the batch. While it
runs, the other slot's rows are packed and the last batch's outputs are delivered.

With fixed row shapes each bucket has its own execution context, set to its shapes once; a captured CUDA graph
is only valid while its context is unchanged. All contexts of a slot share TensorRT's working memory, since
only one runs at a time. With variable row shapes there is a context for each profile, its shapes are set when
they change, and no graphs are captured.

A tensor's buffer only ever holds rows of that tensor, for all batch sizes. So the padding rows of a batch are
zeros or rows of earlier batches: values that the model accepts, such as indices within bounds. Their outputs
are cut off. After a failed batch they are zeroed, or its bad row would fail the next batch too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec, is_alone
from cobatch.engines.errors import EngineLoadError, EngineRunError, NoBatchAxisError
from cobatch.engines.tensorrt.cuda import Device, Graph, OutOfMemoryError
from cobatch.engines.tensorrt.layout import (
    Late,
    Layout,
    ProfileContext,
    infer,
    lay_out,
    set_shapes,
    view_rows,
)
from cobatch.engines.tensorrt.tensors import Buckets, Profile, as_batch

_CACHE_LIMIT = 256  # row shapes, and numbers of rows of a shape


@dataclass(frozen=True, slots=True)
class Plan:
    """The loaded plan, shared by all slots. `working`: bytes of TensorRT's working memory."""

    trt: Any
    recorder: Any
    working: int
    signature: Signature
    profiles: tuple[Profile, ...]
    buckets: Buckets

    @property
    def fixed(self) -> bool:
        """True if each input has one fixed row shape."""
        return all(spec.row_elements >= 0 for spec in self.signature.inputs)


class Slot:
    """Used on the worker thread, except for `inputs`, which calls nothing of CUDA."""

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
        self._late: dict[int, Late] = {}  # by the tensors' numbers, inputs first
        self._stream: Any = None
        self._event: Any = None

    # Opening and closing

    def open(self, engine: Any) -> None:
        """Create the stream, TensorRT's working memory and the execution contexts, which share it.

        Raises EngineLoadError; OutOfMemoryError if an allocation outside TensorRT failed.
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
            raise EngineLoadError("TensorRT cannot create an execution context")
        context.error_recorder = plan.recorder
        if plan.working and hasattr(context, "set_device_memory"):
            context.set_device_memory(int(self._working), plan.working)
        elif plan.working:
            context.device_memory = int(self._working)
        try:
            accepted = context.set_optimization_profile_async(profile, self._handle)
        except RuntimeError:  # as the bindings say no
            accepted = False
        if not accepted:
            raise EngineLoadError(f"TensorRT does not accept profile {profile}")
        return ProfileContext(context)

    def _context(self, bucket: int, row_shapes: RowShapes) -> ProfileContext:
        buckets = self._plan.buckets
        return self._contexts[bucket if self._plan.fixed else buckets.choose(bucket, row_shapes)[1]]

    def measure(self) -> tuple[tuple[TensorSpec, ...], tuple[int, ...], frozenset[int]]:
        """Return the outputs' inferred specs, and the largest size of each tensor in bytes, inputs first.

        And the numbers of the outputs whose shapes depend on the data.
        """
        plan = self._plan
        inputs, outputs = plan.signature.inputs, plan.signature.outputs
        specs = inputs + outputs
        sizes = [0] * len(specs)
        late = set()
        for rows, row_shapes in self._largest():
            shapes = [
                (spec.name, spec.tensor_shape(rows, shape))
                for spec, shape in zip(inputs, row_shapes, strict=True)
            ]
            context = self._context(rows, row_shapes).context
            output_shapes = infer(context, shapes, outputs)
            for spec, shape in zip(outputs, output_shapes, strict=True):
                if as_batch(spec, shape)[:1] != (rows,):
                    raise NoBatchAxisError(
                        f"output {spec.name!r} does not follow the batch axis: {rows} rows give {list(shape)}"
                    )
            for index, shape in enumerate([*(shape for _, shape in shapes), *output_shapes]):
                size = prod(shape) * specs[index].dtype.itemsize
                if -1 in shape:
                    late.add(index)
                    size = max(0, context.get_max_output_size(specs[index].name))
                sizes[index] = max(sizes[index], size)
        if plan.fixed:
            # With fixed input rows the output rows are fixed too, even if the plan declares them variable.
            outputs = tuple(
                replace(spec, shape=as_batch(spec, shape)[1:])
                for spec, shape in zip(outputs, output_shapes, strict=True)
            )
        return outputs, tuple(sizes), frozenset(late)

    def _largest(self) -> list[tuple[int, RowShapes]]:
        plan = self._plan
        if plan.fixed:
            return [(plan.buckets.sizes[-1], tuple(spec.shape for spec in plan.signature.inputs))]
        return [
            (plan.buckets.most_rows(profile), tuple(shape[1:] for shape in profile.most))
            for profile in plan.profiles
        ]

    def allocate(self, sizes: Sequence[int], late: Collection[int] = ()) -> None:
        """Allocate buffers of the sizes from `measure`, which also names `late`. Raises as `open`."""
        signature = self._plan.signature
        specs = signature.inputs + signature.outputs
        for spec, size in zip(specs, sizes, strict=True):
            self._memory.append(_allocate(self._device.allocate, size, f"tensor {spec.name!r}"))
            what = f"the page-locked buffer of tensor {spec.name!r}, in the host's memory"
            self._hosts.append(_allocate(self._device.pinned, size, what))
        for index in late:
            address = int(self._memory[index])
            self._late[index] = Late(self._plan.trt, specs[index], self._hosts[index], address)
        for profile in self._contexts.values():
            for index, (spec, memory) in enumerate(zip(specs, self._memory, strict=True)):
                if index in self._late:
                    given = profile.context.set_output_allocator(spec.name, self._late[index].allocator)
                else:
                    given = profile.context.set_tensor_address(spec.name, int(memory))
                if not given:
                    raise EngineLoadError(f"TensorRT does not accept an address for tensor {spec.name!r}")

    def prepare(self, graphs: Any | None) -> bool:
        """With fixed row shapes, lay out each bucket, run it once with zeros and capture it.

        `graphs`: cuda-bindings' driver, None for no graphs. Returns True if graphs were captured. Raises
        CaptureError and the errors of a run.
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
            if graphs is not None and not self._late:
                layout.graph = Graph(graphs, self._handle, partial(self._enqueue, layout))
        return graphs is not None and not self._late

    def drop_graphs(self) -> None:
        """Free the graphs; batches are enqueued call by call from now on."""
        for layout in self._layouts.values():
            if layout.graph is not None:
                layout.graph.close()
            layout.graph = None

    def release(self, dead: bool) -> None:
        """Drop TensorRT's objects, without a call into a dead context."""
        if self._stream is not None and not dead:
            self._stream.synchronize()  # no batch may still use memory that will be freed
        if not dead:
            self.drop_graphs()
        for profile in self._contexts.values():
            # Break the cycle with the layout, or the garbage collector would free TensorRT's object later.
            profile.context = profile.layout = None
        self._contexts.clear()
        self._layouts.clear()
        self._entries.clear()

    def in_use(self) -> bool:
        """After `release`: return True if views of the page-locked memory exist, such as outputs."""
        self._outputs = ()
        self._arrays.clear()
        self._late.clear()
        return not all(is_alone(self._hosts, index) for index in range(len(self._hosts)))

    def free(self) -> None:
        """Drop the memory; parts in use are freed with their last view."""
        self._late.clear()
        self._hosts.clear()
        self._memory.clear()
        self._working = None
        self._event = self._stream = None

    # Batches

    def inputs(self, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """Return views of the page-locked buffers. Raises EngineRunError if no profile accepts the shapes."""
        arrays = self._arrays.get(row_shapes)
        if arrays is None:
            self._plan.buckets.choose(rows, row_shapes)
            if len(self._arrays) >= _CACHE_LIMIT:
                self._arrays.clear()
            specs = self._plan.signature.inputs
            arrays = tuple(map(view_rows, self._hosts, specs, row_shapes))
            self._arrays[row_shapes] = arrays
        if rows > len(arrays[0]):
            self._plan.buckets.choose(rows, row_shapes)
        return arrays

    def enqueue(self, rows: int, row_shapes: RowShapes) -> None:
        """Start the batch in the input buffers, without waiting."""
        entry = self._entries.get((rows, row_shapes))
        layout, self._outputs = entry if entry is not None else self._enter(rows, row_shapes)
        if layout.graph is not None:
            layout.graph.launch()
        else:
            self._enqueue(layout)
        if layout.late:
            self._outputs = self._copy_late(layout)
        self._event.record(self._stream)

    def wait(self) -> tuple[Array, ...]:
        """Wait for the batch, with the interpreter lock released."""
        self._event.synchronize()
        return self._outputs

    def recover(self) -> None:
        """Wait for the rest of a failed batch, and zero its rows so that they are not used as padding."""
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

    def _copy_late(self, layout: Layout) -> tuple[Array, ...]:
        """Copy the outputs whose shapes are known now; return all."""
        outputs = list(layout.outputs)
        for place, late in layout.late.items():
            outputs[place] = output = late.output()
            if output.size:
                self._dtoh(output.reshape(-1), late.memory, self._stream)
        return tuple(outputs)

    def _enter(self, rows: int, row_shapes: RowShapes) -> tuple[Layout, tuple[Array, ...]]:
        if len(self._entries) >= _CACHE_LIMIT:
            self._entries.clear()
        bucket, _ = self._plan.buckets.choose(rows, row_shapes)
        layout = self._layout(bucket, row_shapes)
        entry = layout, tuple(output[:rows] for output in layout.outputs)
        self._entries[rows, row_shapes] = entry
        return entry

    def _layout(self, bucket: int, row_shapes: RowShapes) -> Layout:
        layout = self._layouts.get((bucket, row_shapes))
        if layout is None:
            if len(self._layouts) >= _CACHE_LIMIT:
                # Only variable row shapes can be this many, and those have no graphs.
                self._layouts.clear()
                self._entries.clear()
            layout = self._layouts[bucket, row_shapes] = self._lay_out(bucket, row_shapes)
        return layout

    def _lay_out(self, bucket: int, row_shapes: RowShapes) -> Layout:
        profile = self._context(bucket, row_shapes)
        plan = self._plan
        return lay_out(profile, plan.signature, bucket, row_shapes, self._hosts, self._memory, self._late)


def _allocate(allocate: Any, size: int, what: str) -> Any:
    try:
        return allocate(size)
    except MemoryError:
        pass  # raised below, where no exception holds frames any more
    raise OutOfMemoryError(what, size)
