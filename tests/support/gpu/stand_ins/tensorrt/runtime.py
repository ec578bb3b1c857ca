"""Runtime and engine: a plan is loaded."""

from __future__ import annotations

from math import prod
from typing import Any, cast

from . import planting
from .context import IExecutionContext
from .driver import Owned, has_context, violate
from .logs import ErrorSink, ILogger, WithRecorder
from .plan import Plan, PlanError, Profile, Shape, Tensor, read_tensors
from .versions import only_in, package, with_versions


class _Nothing:
    """What a runtime has that could not initialise CUDA: its first use ends a process."""

    def __getattr__(self, name: str) -> Any:
        violate("a runtime that was not made is used")
        raise SystemError("segmentation fault")

    def __setattr__(self, name: str, value: Any) -> None:
        getattr(self, name)


class Runtime(WithRecorder):
    """Loads plans."""

    def __init__(self, logger: ILogger) -> None:
        sink = ErrorSink(logger)
        why = planting.take("Runtime")
        if why is not None:
            sink.error(*why)
        self._sink = sink if why is None else cast("ErrorSink", _Nothing())
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        """Load a plan; None on failure, with the reason in the log."""
        why = planting.take("deserialize_cuda_engine") or self._wrong()
        if why is None:
            try:
                plan = Plan.from_bytes(bytes(serialized_engine))
                why = self._refusal(plan)
            except PlanError as error:
                why = "INTERNAL_ERROR", str(error)
        if why is None:
            try:
                return ICudaEngine._make(plan, ErrorSink(self._sink.logger, self._sink.recorder))
            except MemoryError as error:
                why = (
                    "FAILED_ALLOCATION",
                    f"Requested amount of GPU memory ({error} bytes) could not be allocated.",
                )
        self._sink.error(*why)
        return None

    def _wrong(self) -> tuple[str, str] | None:
        if has_context():
            return None
        violate("deserialize_cuda_engine: no CUDA context is current")
        return "INVALID_STATE", "Cuda Runtime (invalid device context)"

    def _refusal(self, plan: Plan) -> tuple[str, str] | None:
        version = package().__version__
        if plan.version_compatible and not self.engine_host_code_allowed:
            return "INVALID_STATE", "The engine contains a lean runtime, but host code is not allowed."
        if plan.version != version and not plan.version_compatible:
            return "INTERNAL_ERROR", (
                "The engine plan file is not compatible with this version of TensorRT, "
                f"expecting library version {version} got {plan.version}, please rebuild."
            )
        if plan.compute_capability != "9.0" and not plan.hardware_compatible:
            return "INTERNAL_ERROR", (
                "The engine plan file is generated on an incompatible device, "
                f"expecting compute 9.0 got compute {plan.compute_capability}, please rebuild."
            )
        return None


@with_versions
class ICudaEngine(WithRecorder, Owned):
    """A plan with its weights in device memory."""

    _plan: Plan
    _tensors: list[Tensor]

    def __init__(self) -> None:
        raise TypeError("tensorrt.ICudaEngine: No constructor defined!")

    @classmethod
    def _make(cls, plan: Plan, sink: ErrorSink) -> ICudaEngine:
        engine = cls.__new__(cls)
        Owned.__init__(engine, len(plan.model))
        engine._plan = plan
        engine._sink = sink
        engine._tensors = read_tensors(plan.model, plan.tensors)
        return engine

    def _tensor(self, name: str) -> Tensor | None:
        tensor = next((tensor for tensor in self._tensors if tensor.name == name), None)
        if tensor is None:
            self._sink.error("INVALID_ARGUMENT", f"Given invalid tensor name: {name}.")
        return tensor

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        # A model without dynamic axes has an empty profile.
        return max(1, len(self._plan.profiles))

    def get_tensor_name(self, index: int) -> str:
        return self._tensors[index].name

    def get_tensor_mode(self, name: str) -> Any:
        tensor = self._tensor(name)
        return package().TensorIOMode[("OUTPUT", "INPUT")[tensor.is_input] if tensor else "NONE"]

    def get_tensor_dtype(self, name: str) -> Any:
        tensor = self._tensor(name)
        return package().DataType[tensor.dtype if tensor else "FLOAT"]

    def get_tensor_shape(self, name: str) -> Shape:
        tensor = self._tensor(name)
        return tensor.shape if tensor else (-1,)

    def get_tensor_location(self, name: str) -> Any:
        tensor = self._tensor(name)
        return package().TensorLocation[tensor.location if tensor else "DEVICE"]

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        tensor = self._tensor(name)
        return package().TensorFormat[tensor.format if tensor else "LINEAR"]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        tensor = self._tensor(name)
        if tensor is None or not tensor.is_input or not 0 <= profile_index < self.num_optimization_profiles:
            self._sink.error("INVALID_ARGUMENT", f"No profile {profile_index} for tensor {name}.")
            return []
        return list(self._ranges(profile_index).get(name, (tensor.shape,) * 3))

    def _ranges(self, profile_index: int) -> Profile:
        return self._plan.profiles[profile_index] if self._plan.profiles else {}

    def is_shape_inference_io(self, name: str) -> bool:
        tensor = self._tensor(name)
        return tensor is not None and tensor.is_shape

    @only_in("10.16.1.11", "11.4.0.106")
    def get_aliased_input_tensor(self, name: str) -> str | None:
        tensor = self._tensor(name)
        return tensor.aliased if tensor else None

    @only_in("10.0.1", "10.16.1.11")
    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self._working_bytes(profile_index)

    @only_in("10.16.1.11", "11.4.0.106")
    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._working_bytes(profile_index)

    def _working_bytes(self, profile_index: int) -> int:
        """Return the largest size of the inputs, as for a single layer."""
        ranges = self._ranges(profile_index)
        return sum(
            prod(ranges[tensor.name][2] if tensor.name in ranges else tensor.shape) * tensor.item_bytes
            for tensor in self._tensors
            if tensor.is_input
        )

    def create_execution_context(self, strategy: Any = None) -> IExecutionContext | None:
        """Create a context; None on failure, with the reason in the log."""
        why = planting.take("create_execution_context")
        if why is None and not has_context():
            violate("create_execution_context: no CUDA context is current")
            why = "INVALID_STATE", "Cuda Runtime (invalid device context)"
        managed = strategy is not None and strategy.name == "USER_MANAGED"
        profiles = range(self.num_optimization_profiles)
        size = 0 if managed else max(map(self._working_bytes, profiles))
        if why is None and self.on_its_thread("create_execution_context"):
            try:
                return IExecutionContext._make(
                    self, size, managed, ErrorSink(self._sink.logger, self._sink.recorder)
                )
            except MemoryError:
                why = "FAILED_ALLOCATION", f"Requested size was {size} bytes. Cuda Runtime (out of memory)"
        self._sink.error(*(why or ("INVALID_STATE", "wrong thread")))
        return None
