"""Execution contexts: shapes, addresses, and batches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from . import planting
from .driver import (
    ALIGNMENT,
    Owned,
    enqueue,
    has_context,
    host_address,
    is_capturing,
    room,
    synchronize,
    violate,
    words,
)
from .logs import ErrorSink, WithRecorder
from .plan import Shape, Tensor, output_shapes, session_of
from .versions import only_in, with_versions

if TYPE_CHECKING:
    from .runtime import ICudaEngine

_Ranges = list[tuple[Tensor, Shape, int]]


def _plain_int(value: Any, what: str) -> int:
    # 10.0 accepts only int, later versions any object with __int__.
    if type(value) is not int:
        raise TypeError(f"{what}: incompatible function arguments: {value!r} is no plain int")
    return value


class _Changes:
    """Count of the changes of a context's shapes or profile."""

    def __init__(self) -> None:
        self.count = 0


class _Run:
    """True once a queued batch, or profile switch, has run; set by its kernel."""

    def __init__(self) -> None:
        self.done = False

    def finish(self) -> None:
        self.done = True


class IOutputAllocator:
    """Base of an object that gives memory to outputs of unknown shape, and is told the shape."""

    reallocate_output_async: Callable[..., int | None]
    notify_shape: Callable[[str, Shape], None]

    def __init__(self) -> None:
        pass


@with_versions
class IExecutionContext(WithRecorder, Owned):
    """Runs batches of one engine, one after the other, on the thread that created it."""

    def __init__(self) -> None:
        raise TypeError("tensorrt.IExecutionContext: No constructor defined!")

    @classmethod
    def _make(cls, engine: ICudaEngine, size: int, managed: bool, sink: ErrorSink) -> IExecutionContext:
        context = cls.__new__(cls)
        Owned.__init__(context, size)
        context._engine = engine
        context._sink = sink
        context._managed = managed
        context._memory = (0, 0)
        context._profile = 0
        context._shapes = {}
        context._addresses = {}
        context._allocators = {}
        # The stream of a profile switch and if it has run; the run since the shapes were set; its count.
        context._switch = None
        context._warm = None
        context._changes = _Changes()
        return context

    _engine: ICudaEngine
    _managed: bool
    _memory: tuple[int, int]
    _profile: int
    _shapes: dict[str, Shape]
    _addresses: dict[str, int]
    _allocators: dict[str, IOutputAllocator]
    _switch: tuple[int, _Run] | None
    _warm: _Run | None
    _changes: _Changes

    @property
    def engine(self) -> ICudaEngine:
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Use a profile. Raises RuntimeError; most methods return False. Log and recorder get the reason."""
        if not self._use_profile(profile_index, stream_handle):
            raise RuntimeError("Error in set optimization profile async.")
        return True

    def _use_profile(self, profile_index: int, stream_handle: int) -> bool:
        method = "set_optimization_profile_async"
        stream = _plain_int(stream_handle, method)
        if not self._may(method) or self._planted(method):
            return False
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._fail("INVALID_ARGUMENT", f"there is no optimization profile {profile_index}")
        run = _Run()
        code = enqueue(stream, run.finish, (), captured=False)
        if code:
            return self._cuda(code)
        self._profile = profile_index
        self._shapes.clear()
        self._switch = (stream, run)
        self._changed()
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if not self._may("set_input_shape") or self._planted("set_input_shape"):
            return False
        wanted = tuple(int(size) for size in shape)
        tensor = self._engine._tensor(name)
        if tensor is None or not tensor.is_input:
            return self._fail("INVALID_ARGUMENT", f"{name} is no input")
        low, _, high = self._engine._ranges(self._profile).get(name, (tensor.shape,) * 3)
        fits = len(wanted) == len(low) and all(a <= b <= c for a, b, c in zip(low, wanted, high, strict=True))
        if not fits:
            violate(f"set_input_shape: {name} {list(wanted)} is outside profile {self._profile}")
            return self._fail(
                "INVALID_ARGUMENT",
                f"Supplied shape {list(wanted)} for {name} is not within [{list(low)}, {list(high)}]",
            )
        if self._shapes.get(name) != wanted:
            self._shapes[name] = wanted
            self._changed()
        return True

    def _changed(self) -> None:
        self._warm = None
        self._changes.count += 1

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self._missing()

    def infer_shapes(self) -> list[str]:
        """Return the inputs without shapes. Raises RuntimeError."""
        if not self._may("infer_shapes") or self._planted("infer_shapes"):
            raise RuntimeError("infer_shapes error code: -1")
        return self._missing()

    def _missing(self) -> list[str]:
        return [
            tensor.name
            for tensor in self._engine._tensors
            if tensor.is_input and -1 in tensor.shape and tensor.name not in self._shapes
        ]

    def get_tensor_shape(self, name: str) -> Shape:
        """Return the shape, with -1 for unknown axes."""
        tensor = self._engine._tensor(name)
        if tensor is None:
            return (-1,)
        if tensor.is_input:
            return self._shapes.get(name, tensor.shape)
        return tensor.shape if self._missing() else self._outputs()[name]

    def _outputs(self) -> dict[str, Shape]:
        inputs = tuple(
            (tensor.name, self._shapes.get(tensor.name, tensor.shape))
            for tensor in self._engine._tensors
            if tensor.is_input
        )
        return output_shapes(self._engine._plan.model, inputs)

    def get_max_output_size(self, name: str) -> int:
        """Return the bytes needed at most."""
        tensor = self._engine._tensor(name)
        shape = self.get_tensor_shape(name)
        if tensor is None:
            return -1
        return tensor.largest if -1 in shape else prod(shape) * tensor.item_bytes

    def set_output_allocator(self, name: str, output_allocator: IOutputAllocator) -> bool:
        if not self._may("set_output_allocator"):
            return False
        if self._engine._tensor(name) is None:
            return self._fail("INVALID_ARGUMENT", f"{name} is no tensor")
        self._allocators[name] = output_allocator
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        address = _plain_int(memory, "set_tensor_address")
        if not self._may("set_tensor_address"):
            return False
        if self._engine._tensor(name) is None:
            return self._fail("INVALID_ARGUMENT", f"{name} is no tensor")
        if address % ALIGNMENT:
            violate(f"set_tensor_address: the address of {name} is not aligned to {ALIGNMENT} bytes")
        self._addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    @property
    def device_memory(self) -> int:
        return self._memory[0]

    @device_memory.setter
    def device_memory(self, memory: int) -> None:
        """Set the memory in versions without `set_device_memory`; it must be large enough."""
        address = _plain_int(memory, "device_memory")
        self._memory = (address, room(address))
        self._changed()

    @only_in("10.16.1.11", "11.4.0.106")
    def set_device_memory(self, memory: int, size: int) -> None:
        """Set the memory of a USER_MANAGED context."""
        self._memory = (_plain_int(memory, "set_device_memory"), size)
        self._changed()

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue a batch."""
        stream = _plain_int(stream_handle, "execute_async_v3")
        if not self._may("execute_async_v3") or self._planted("execute_async_v3"):
            return False
        captured = is_capturing(stream)
        wrong = self._wrong_state(stream, captured)
        if wrong:
            violate(f"execute_async_v3: {wrong}")
            return self._fail("INVALID_STATE", wrong)
        ranges, wrong = self._ranges(stream)
        late = [tensor for tensor, shape, _ in ranges if -1 in shape]
        if late and captured:
            wrong = f"captured, but the shape of {late[0].name} depends on the data"
        if wrong:
            violate(f"execute_async_v3: {wrong}")
            return self._fail("INVALID_ARGUMENT", wrong)
        # A captured kernel outlives the context and must not reference it.
        run, changes, model = _Run(), self._changes, self._engine._plan.model
        shapes: dict[str, Shape] = {}
        before = changes.count

        def work() -> None:
            if captured and planting.graphs_are_strict() and changes.count != before:
                violate("a graph is launched whose execution context was changed since it was captured")
            shapes.update(_compute(model, ranges))
            run.finish()

        used = [
            (address, tensor.largest if -1 in shape else prod(shape) * tensor.item_bytes)
            for tensor, shape, address in ranges
        ]
        own = self._memory if self._managed else (self._address, 1)
        code = enqueue(stream, work, [*used, *([own] if own[0] else [])], captured=captured)
        if code:
            return self._cuda(code)
        if not captured:
            self._warm = run
        if late:
            # Only after the run are the shapes known, so the call waits for it.
            code = synchronize(stream)
            if code:
                return self._cuda(code)
            for tensor in late:
                self._allocators[tensor.name].notify_shape(tensor.name, shapes[tensor.name])
        return True

    def _wrong_state(self, stream: int, captured: bool) -> str | None:
        if not stream:
            return "the default stream is used"
        if missing := self._missing():
            return f"the shape of {missing[0]} is not set"
        if captured and (self._warm is None or not self._warm.done):
            return "captured before a batch of these shapes was enqueued and waited for"
        if self._switch is not None and self._switch[0] != stream and not self._switch[1].done:
            return "the profile was switched on another stream, which was not waited for"
        if self._managed and not self._memory[0]:
            return "no device memory is set"
        if self._managed and self._memory[1] < self._engine._working_bytes(self._profile):
            return "the device memory that was set is too small"
        return None

    def _ranges(self, stream: int) -> tuple[_Ranges, str | None]:
        ranges: _Ranges = []
        for tensor in self._engine._tensors:
            shape = self.get_tensor_shape(tensor.name)
            address = self._addresses.get(tensor.name, 0)
            size = prod(shape) * tensor.item_bytes
            if -1 in shape:
                allocator = self._allocators.get(tensor.name)
                if allocator is None:
                    return (
                        [],
                        f"the shape of {tensor.name} depends on the data and it has no output allocator",
                    )
                size = tensor.largest
                address = allocator.reallocate_output_async(tensor.name, None, size, ALIGNMENT, stream) or 0
            if not address:
                return [], f"the address of {tensor.name} is not set"
            if room(address) < max(1, size):
                state = "too small" if room(address) else "freed, or never was device memory"
                return [], f"the memory of {tensor.name} is {state}"
            ranges.append((tensor, shape, address))
        return ranges, None

    def _may(self, method: str) -> bool:
        if not self.on_its_thread(method):
            return self._fail("INVALID_STATE", f"{method}: wrong thread")
        if not has_context():
            violate(f"{method}: no CUDA context is current")
            return self._fail("INVALID_STATE", "Cuda Runtime (invalid device context)")
        return True

    def _planted(self, method: str) -> bool:
        planted = planting.take(method)
        if planted is not None:
            self._fail(*planted)
        return planted is not None

    def _fail(self, code: str, text: str) -> bool:
        self._sink.error(code, f"IExecutionContext: {text}")
        return False

    def _cuda(self, code: int) -> bool:
        return self._fail("FAILED_EXECUTION", f"Cuda Driver ({words(code)})")


def _compute(model: bytes, ranges: _Ranges) -> dict[str, Shape]:
    """Run the model on the device's memory, as a kernel does; return the shapes that depended on the data."""
    session = session_of(model)
    binding = session.io_binding()
    late = []
    for tensor, shape, address in ranges:
        if -1 in shape:
            binding.bind_output(tensor.name)
            late.append((tensor, address))
            continue
        at = host_address(address, prod(shape) * tensor.item_bytes)
        bind = binding.bind_input if tensor.is_input else binding.bind_output
        bind(tensor.name, "cpu", 0, tensor.element, shape, at)
    session.run_with_iobinding(binding)
    found = {}
    values = dict(
        zip([one.name for one, _, _ in ranges if not one.is_input], binding.get_outputs(), strict=True)
    )
    for tensor, address in late:
        value = values[tensor.name].numpy()
        ctypes.memmove(host_address(address, value.nbytes), value.ctypes.data, value.nbytes)
        found[tensor.name] = value.shape
    return found
