"""Builder, network, config and profiles: from a parsed model to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import planting
from .logs import ErrorSink, ILogger, WithRecorder
from .plan import Plan, Profile, Shape, Tensor
from .versions import package

_PHASES = ("Graph Optimization", "Tactic Selection", "Serialization")


class IHostMemory(bytes):
    """Bytes that TensorRT owns."""

    @property
    def nbytes(self) -> int:
        return len(self)


class ITensor:
    """A network's input or output."""

    def __init__(self, tensor: Tensor) -> None:
        self.name = tensor.name
        self.shape = tensor.shape
        self.is_shape_tensor = tensor.is_shape


class INetworkDefinition:
    """A network, filled by a parser."""

    def __init__(self) -> None:
        self._model = b""
        self._tensors: list[Tensor] = []

    def _side(self, is_input: bool) -> list[Tensor]:
        return [tensor for tensor in self._tensors if tensor.is_input == is_input]

    @property
    def num_inputs(self) -> int:
        return len(self._side(True))

    @property
    def num_outputs(self) -> int:
        return len(self._side(False))

    def get_input(self, index: int) -> ITensor:
        return ITensor(self._side(True)[index])

    def get_output(self, index: int) -> ITensor:
        return ITensor(self._side(False)[index])


class IOptimizationProfile:
    """Ranges of shapes. As in TensorRT it accepts any name, and only its truth value shows an error."""

    def __init__(self) -> None:
        self._shapes: Profile = {}

    # The parameters' names are NVIDIA's.
    def set_shape(
        self,
        input: str,  # noqa: A002
        min: Sequence[int],  # noqa: A002
        opt: Sequence[int],
        max: Sequence[int],  # noqa: A002
    ) -> None:
        self._shapes[input] = (tuple(min), tuple(opt), tuple(max))

    def get_shape(self, input: str) -> list[Shape]:  # noqa: A002
        return list(self._shapes[input])

    def __bool__(self) -> bool:
        return all(
            len(low) == len(best) == len(high)
            and all(0 <= a <= b <= c for a, b, c in zip(low, best, high, strict=True))
            for low, best, high in self._shapes.values()
        )


class ITimingCache:
    """Timings of one GPU with one version."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._data)


class IBuilderConfig:
    """Build settings."""

    def __init__(self, sink: ErrorSink) -> None:
        self._sink = sink
        self._profiles: list[IOptimizationProfile] = []
        self._flags: set[str] = set()
        self._limits: dict[str, int] = {}
        self._timings: ITimingCache | None = None
        self.hardware_compatibility_level: Any = package().HardwareCompatibilityLevel["NONE"]
        self.progress_monitor: Any = None

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if not profile:
            self._sink.error(
                "INVALID_ARGUMENT", "Optimization profile is not valid: min, opt, max are not in order"
            )
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def set_flag(self, flag: Any) -> None:
        self._flags.add(package().BuilderFlag(flag.value).name)

    def get_flag(self, flag: Any) -> bool:
        return flag.name in self._flags

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._limits[package().MemoryPoolType(pool.value).name] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._limits.get(pool.name, 1 << 30)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._data and not ignore_mismatch and not cache._data.startswith(_own_timings()):
            self._sink.error("INVALID_ARGUMENT", "The timing cache is another GPU's or version's")
            return False
        self._timings = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._timings


def _own_timings() -> bytes:
    return f"stand-in timings {package().__version__}\n".encode()


class Builder(WithRecorder):
    """Builds plans."""

    def __init__(self, logger: ILogger) -> None:
        self._sink = ErrorSink(logger)

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        known = package().NetworkDefinitionCreationFlag
        if flags & ~sum(1 << int(flag) for flag in known):
            self._sink.error("INVALID_ARGUMENT", f"unknown network creation flags {flags:#x}")
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._sink)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        """Return the plan; None on failure, with the reason in the log."""
        why = planting.take("build_serialized_network") or _refusal(network, config)
        if why is not None:
            self._sink.error(*why)
            return None
        if not _report(config.progress_monitor):
            return None
        if config._timings is not None:
            config._timings._data = _own_timings() + b"tactics"
        plan = Plan(
            network._model,
            [profile._shapes for profile in config._profiles],
            package().__version__,
            version_compatible="VERSION_COMPATIBLE" in config._flags,
            hardware_compatible=config.hardware_compatibility_level.name != "NONE",
        )
        return IHostMemory(plan.to_bytes())


def _refusal(network: INetworkDefinition, config: IBuilderConfig) -> tuple[str, str] | None:
    dynamic = [tensor for tensor in network._side(True) if -1 in tensor.shape]
    if dynamic and not config._profiles:
        return (
            "INVALID_CONFIG",
            "Network has dynamic or shape inputs, but no optimization profile has been defined.",
        )
    for index, profile in enumerate(config._profiles):
        for tensor in dynamic:
            ranges = profile._shapes.get(tensor.name)
            if ranges is None:
                return "INVALID_CONFIG", f"input {tensor.name} has no shape in optimization profile {index}"
            if any(not _matches(tensor.shape, shape) for shape in ranges):
                return "INVALID_CONFIG", f"optimization profile {index} does not fit input {tensor.name}"
    return None


def _matches(declared: Shape, shape: Shape) -> bool:
    return len(declared) == len(shape) and all(a in (-1, b) for a, b in zip(declared, shape, strict=True))


def _report(monitor: Any) -> bool:
    """Report a build to the monitor as TensorRT does; return True if the build goes on."""
    if monitor is None:
        return True
    whole = "Building engine"
    go_on = True
    monitor.phase_start(whole, None, len(_PHASES))
    for step, phase in enumerate(_PHASES):
        monitor.phase_start(phase, whole, 2)
        # All steps of a phase, then its parent's.
        go_on = go_on and monitor.step_complete(phase, 0) and monitor.step_complete(phase, 1)
        monitor.phase_finish(phase)
        go_on = go_on and monitor.step_complete(whole, step)
        if not go_on:
            break
    monitor.phase_finish(whole)
    return go_on
