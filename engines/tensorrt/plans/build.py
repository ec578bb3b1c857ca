"""How far a build is, from TensorRT's progress monitor: a tree of phases folded into one fraction.

From an ONNX file to a plan: parse, profiles, flags by name, build.

Networks are strongly typed: 11 knows nothing else, and with 10 it makes precision come from the ONNX file
in the same way. Calls that fail answer None or False and only log, so the log's last errors are put into
every exception.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cobatch.engines.errors import EngineLoadError
from cobatch.engines.tensorrt.api import TensorRT, load_tensorrt
from cobatch.engines.tensorrt.diagnostics import ErrorLog, make_log
from cobatch.engines.tensorrt.plans.files import write_file
from cobatch.engines.tensorrt.plans.profiles import Profile, Shape, largest_batch, make_profiles

# Called with the innermost phase's name and the whole's fraction; False cancels the build.
Progress = Callable[[str, float], bool]


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The phases that are open. Thread-safe, since TensorRT reports from several threads.

    A phase fills the step of its parent that runs. The fraction never falls, although TensorRT enters
    some phases several times.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, _Phase] = {}
        self._fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> float:
        """A phase begins; `parent` is None for an outermost one."""
        with self._lock:
            self._open[name] = _Phase(parent, max(1, steps))
            return self._advance(name)

    def step(self, name: str, step: int) -> float:
        """Step `step`, from 0 on, of a phase is done."""
        with self._lock:
            phase = self._open.get(name)
            if phase is not None:
                phase.done = min(step + 1, phase.steps)
            return self._advance(name)

    def finish(self, name: str) -> float:
        """A phase ends, perhaps before its last step."""
        with self._lock:
            phase = self._open.get(name)
            if phase is not None:
                phase.done = phase.steps
            fraction = self._advance(name)
            self._open.pop(name, None)
            return fraction

    def _advance(self, name: str | None) -> float:
        fraction = 0.0
        while name is not None and (phase := self._open.get(name)) is not None:
            # A child that is complete does not complete its parent's step: that is told apart.
            fraction = min(1.0, (phase.done + fraction) / phase.steps)
            name = phase.parent if phase.parent != name else None
        self._fraction = max(self._fraction, fraction)
        return self._fraction


class BuildWatch:
    """`monitor` is handed to TensorRT. `cancelled` tells whether the build was asked to stop."""

    def __init__(self) -> None:
        self.monitor: Any = None
        self.cancelled = False
        self.error: BaseException | None = None


def make_watch(trt_module: Any, progress: Progress) -> BuildWatch:
    """A monitor of this module that tells `progress`; what that raises ends the build and is kept."""
    watch = BuildWatch()
    phases = Phases()

    def tell(name: str, fraction: float) -> bool:
        # There is C++ above: an exception that left would end the process.
        if watch.cancelled:
            return False
        try:
            watch.cancelled = not progress(name, fraction)
        except BaseException as error:  # noqa: BLE001 - raised again by the one who waits for the build
            watch.error = error
            watch.cancelled = True
        return not watch.cancelled

    class Monitor(trt_module.IProgressMonitor):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            trt_module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tell(phase_name, phases.start(phase_name, parent_phase or None, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return tell(phase_name, phases.step(phase_name, step))

        def phase_finish(self, phase_name: str) -> None:
            tell(phase_name, phases.finish(phase_name))

    watch.monitor = Monitor()
    return watch


log = logging.getLogger("cobatch.tensorrt")

_MOST_PARSER_ERRORS = 5


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What a plan is built for. `profiles`: specs as in profiles.py; without one, 1 to `max_batch_size` rows.

    `opt_batch_size` (default: the largest) is the batch that kernels are chosen for. `hardware_compatible`:
    runs on every GPU from Ampere on; `version_compatible`: on later TensorRTs too.
    """

    max_batch_size: int = 64
    opt_batch_size: int | None = None
    profiles: tuple[str, ...] = ()
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    runtime: str = "tensorrt"


@dataclass(frozen=True, slots=True)
class Built:
    """A plan, and what it was made for. `max_batch_size` is the model's own where that is fixed."""

    plan: bytes
    profiles: tuple[Profile, ...]
    max_batch_size: int


def build_plan(model: Path, options: BuildOptions, progress: Progress | None = None) -> bytes:
    """`build`, when only the plan is wanted."""
    return build(model, options, progress).plan


def build(model: Path, options: BuildOptions, progress: Progress | None = None) -> Built:
    """Build for the GPU that is current on this thread; seconds to many minutes.

    `progress` is called from this thread and others with a phase's name and the fraction done; False
    cancels. Raises EngineLoadError, with TensorRT's own reason.
    """
    runtime = load_tensorrt(options.runtime)
    kept = make_log(runtime.trt)
    builder = _builder(runtime, kept)
    network = _network(runtime, builder)
    # The parser holds the network's weights until the plan is built.
    parser = _parse(runtime, network, kept, model)
    config = builder.create_builder_config()
    profiles = make_profiles(
        options.profiles, _inputs(network, model), options.max_batch_size, options.opt_batch_size
    )
    for profile in profiles:
        _add_profile(builder, config, profile, kept)
    save_timings = _configure(runtime, config, options, kept)
    plan = _run(runtime, builder, network, config, kept, progress)
    del parser
    save_timings()
    return Built(plan, tuple(profiles), largest_batch(profiles) or _fixed_batch(network))


def _builder(runtime: TensorRT, kept: ErrorLog) -> Any:
    try:
        return runtime.trt.Builder(kept.logger)
    except (TypeError, RuntimeError) as error:  # pybind11's words for a null pointer
        why = kept.reason(str(error))
        raise EngineLoadError(f"{runtime.kind} {runtime.version} cannot build here: {why}") from None


def _network(runtime: TensorRT, builder: Any) -> Any:
    typed = runtime.flag("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
    return builder.create_network(0 if typed is None else 1 << int(typed))


def _parse(runtime: TensorRT, network: Any, kept: ErrorLog, model: Path) -> Any:
    parser = runtime.trt.OnnxParser(network, kept.logger)
    parsed = parser.parse_from_file(str(model))
    told = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
    logged = kept.reason("it gives no reason")
    if not parsed:
        more = len(told) - _MOST_PARSER_ERRORS
        shown = "; ".join(told[:_MOST_PARSER_ERRORS]) or logged
        raise EngineLoadError(
            f"{runtime.kind} cannot take {model}: {shown}{f'; and {more} more' if more > 0 else ''}"
        )
    if network.num_outputs == 0 or network.num_inputs == 0:
        # A file that is no ONNX at all may parse as an empty model.
        raise EngineLoadError(
            f"{runtime.kind} cannot take {model}: no ONNX model with inputs and outputs in it"
        )
    return parser


def _parser_error(error: Any) -> str:
    """`node 'conv1' (BitShift): unsupported: …`."""
    name, operator = error.node_name(), error.node_operator()
    where = f"node {name!r}" if name else f"node {error.node()}" if error.node() >= 0 else "the graph"
    code = str(error.code()).rpartition(".")[2].lower().replace("_", " ")
    described = " ".join(error.desc().split())
    # The parser's text is the condition that failed, as C++: "false" says nothing.
    why = code if described in {"", "false"} else f"{code}: {described}"
    return f"{where} ({operator}): {why}" if operator else f"{where}: {why}"


def _inputs(network: Any, model: Path) -> dict[str, Shape]:
    inputs: dict[str, Shape] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(int(size) for size in tensor.shape)
        if tensor.is_shape_tensor or not shape:
            # Its values, not its rows, decide other shapes: there is nothing to batch.
            raise EngineLoadError(f"input {tensor.name!r} of {model} has no batch axis")
        inputs[tensor.name] = shape
    return inputs


def _fixed_batch(network: Any) -> int:
    return int(network.get_input(0).shape[0])


def _add_profile(builder: Any, config: Any, wanted: Profile, kept: ErrorLog) -> None:
    profile = builder.create_optimization_profile()
    try:
        for name, (low, best, high) in wanted.items():
            profile.set_shape(name, low, best, high)
        added = bool(profile) and config.add_optimization_profile(profile) >= 0
    except (TypeError, ValueError) as error:
        raise EngineLoadError(f"TensorRT refuses the profile {wanted}: {error}") from None
    if not added:
        raise EngineLoadError(f"TensorRT refuses the profile {wanted}: {kept.reason('it gives no reason')}")


def flags_of(options: BuildOptions) -> tuple[str, ...]:
    """The names of what is turned on, as a manifest lists them.

    Plans of TensorRT for RTX are always for all GPUs from Ampere on: kernels are compiled at load.
    """
    hardware = options.hardware_compatible or options.runtime == "tensorrt-rtx"
    named = {"AMPERE_PLUS": hardware, "VERSION_COMPATIBLE": options.version_compatible}
    return tuple(name for name, on in named.items() if on)


def _configure(runtime: TensorRT, config: Any, options: BuildOptions, kept: ErrorLog) -> Callable[[], None]:
    """Set what the options say; what comes back is called after the build."""
    if options.workspace_mb is not None:
        pool = _known(runtime, "MemoryPoolType", "WORKSPACE")
        config.set_memory_pool_limit(pool, options.workspace_mb << 20)
    if options.version_compatible:
        config.set_flag(_known(runtime, "BuilderFlag", "VERSION_COMPATIBLE"))
    if options.hardware_compatible and not runtime.is_rtx:
        level = _known(runtime, "HardwareCompatibilityLevel", "AMPERE_PLUS")
        config.hardware_compatibility_level = level
    if options.timing_cache is None:
        return lambda: None
    if runtime.is_rtx:
        raise EngineLoadError("tensorrt-rtx times nothing while it builds: it takes no timing cache")
    return _use_timings(config, options.timing_cache, kept)


def _known(runtime: TensorRT, enum: str, name: str) -> Any:
    value = runtime.flag(enum, name)
    if value is None:
        raise EngineLoadError(f"{runtime.kind} {runtime.version} has no {enum}.{name}")
    return value


def _use_timings(config: Any, path: Path, kept: ErrorLog) -> Callable[[], None]:
    """Start from the timings in a file where they fit this GPU, and write them back."""
    try:
        saved = path.read_bytes()
    except FileNotFoundError:
        saved = b""
    except OSError as error:
        raise EngineLoadError(f"cannot read the timing cache {path}: {error.strerror}") from None
    if not config.set_timing_cache(config.create_timing_cache(saved), False):
        log.warning("timing cache %s does not fit: %s; it is begun anew", path, kept.reason("another GPU's"))
        config.set_timing_cache(config.create_timing_cache(b""), False)

    def save() -> None:
        try:
            write_file(path, bytes(config.get_timing_cache().serialize()))
        except OSError as error:
            # The plan is built, which took long: it is worth more than the timings.
            log.warning("cannot write the timing cache %s: %s", path, error.strerror)

    return save


def _run(
    runtime: TensorRT, builder: Any, network: Any, config: Any, kept: ErrorLog, progress: Progress | None
) -> bytes:
    watch = make_watch(runtime.trt, progress or (lambda _phase, _fraction: True))
    config.progress_monitor = watch.monitor
    try:
        serialized = builder.build_serialized_network(network, config)
    finally:
        config.progress_monitor = None  # it must not outlive what `watch` holds
    if watch.error is not None:
        raise watch.error
    if watch.cancelled:
        raise EngineLoadError("the build was cancelled")
    if serialized is None:
        raise EngineLoadError(f"{runtime.kind} cannot build this model: {kept.reason('it gives no reason')}")
    return bytes(serialized)
