"""Build a plan from an ONNX file: parse, add profiles, set flags, build, with progress.

Networks are strongly typed: TensorRT 11 has no others, and with 10 the precision comes from the ONNX file in
the same way. A failed call returns None or False and logs the reason, so exceptions quote the last logged
errors.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cobatch.engines.errors import EngineLoadError
from cobatch.engines.tensorrt.api import TensorRT, load_tensorrt
from cobatch.engines.tensorrt.diagnostics import ErrorLog, make, make_log
from cobatch.engines.tensorrt.plans.manifest import BuildOptions, write_file
from cobatch.engines.tensorrt.plans.profiles import Profile, Shape, largest_batch, make_profiles

log = logging.getLogger("cobatch.tensorrt")

_PARSER_ERROR_LIMIT = 5

# Called with the innermost phase's name and the fraction of the build that is done; False cancels the build.
Progress = Callable[[str, float], bool]


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The tree of running phases of a build, and the fraction that is done.

    A phase is one step of its parent. The fraction never falls, although TensorRT enters some phases several
    times. Thread-safe, since TensorRT reports from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, _Phase] = {}
        self._fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> float:
        """Start a phase; `parent` is None for an outermost one. Returns the fraction, as the others."""
        with self._lock:
            self._open[name] = _Phase(parent, max(1, steps))
            return self._advance(name)

    def step(self, name: str, step: int) -> float:
        """Finish a step of a phase, counted from 0."""
        with self._lock:
            phase = self._open.get(name)
            if phase is not None:
                phase.done = min(step + 1, phase.steps)
            return self._advance(name)

    def finish(self, name: str) -> float:
        """Finish a phase, perhaps before its last step."""
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
            # A finished child does not finish its parent's step: TensorRT reports that separately.
            fraction = min(1.0, (phase.done + fraction) / phase.steps)
            name = phase.parent if phase.parent != name else None
        self._fraction = max(self._fraction, fraction)
        return self._fraction


class BuildWatch:
    """A build's progress. `monitor`: for TensorRT; `cancelled`: the build was told to stop."""

    def __init__(self) -> None:
        self.monitor: Any = None
        self.cancelled = False
        self.error: BaseException | None = None


def make_watch(trt_module: Any, progress: Progress) -> BuildWatch:
    """Create a monitor of this module that calls `progress`; its exception is kept and ends the build."""
    watch = BuildWatch()
    phases = Phases()

    def report(name: str, fraction: float) -> bool:
        # Called from C++: an exception that left would end the process.
        if watch.cancelled:
            return False
        try:
            watch.cancelled = not progress(name, fraction)
        except BaseException as error:  # noqa: BLE001 - raised again after the build
            watch.error = error
            watch.cancelled = True
        return not watch.cancelled

    class Monitor(trt_module.IProgressMonitor):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            trt_module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            report(phase_name, phases.start(phase_name, parent_phase or None, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return report(phase_name, phases.step(phase_name, step))

        def phase_finish(self, phase_name: str) -> None:
            report(phase_name, phases.finish(phase_name))

    watch.monitor = Monitor()
    return watch


@dataclass(frozen=True, slots=True)
class Built:
    """A plan with its profiles. `max_batch_size`: the model's own if fixed."""

    plan: bytes
    profiles: tuple[Profile, ...]
    max_batch_size: int


def build_plan(model: Path, options: BuildOptions, progress: Progress | None = None) -> bytes:
    """Build a plan and return only its bytes."""
    return build(model, options, progress).plan


def build(model: Path, options: BuildOptions, progress: Progress | None = None) -> Built:
    """Build for this thread's current GPU, which takes seconds to many minutes.

    `progress` is called from several threads. Raises EngineLoadError with TensorRT's reason.
    """
    if options.runtime == "tensorrt-lean":
        raise EngineLoadError(
            "tensorrt-lean builds no plans, it only runs version-compatible ones of tensorrt"
        )
    runtime = load_tensorrt(options.runtime)
    errors = make_log(runtime.trt, threads=True)
    builder = make(runtime.trt.Builder, errors, f"{runtime.kind} {runtime.version} cannot build here")
    network = _network(runtime, builder)
    # The parser holds the network's weights until the plan is built.
    parser = _parse(runtime, network, errors, model)
    config = builder.create_builder_config()
    profiles = make_profiles(
        options.profiles, _inputs(network, model), options.max_batch_size, options.opt_batch_size
    )
    for profile in profiles:
        _add_profile(builder, config, profile, errors)
    save_timings = _configure(runtime, config, options, errors)
    plan = _run(runtime, builder, network, config, errors, progress)
    del parser
    save_timings()
    return Built(plan, tuple(profiles), largest_batch(profiles) or _fixed_batch(network))


def _network(runtime: TensorRT, builder: Any) -> Any:
    typed = runtime.flag("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
    return builder.create_network(0 if typed is None else 1 << int(typed))


def _parse(runtime: TensorRT, network: Any, errors: ErrorLog, model: Path) -> Any:
    parser = runtime.trt.OnnxParser(network, errors.logger)
    parsed = parser.parse_from_file(str(model))
    parser_errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
    logged = errors.reason("no reason given")
    if not parsed:
        more = len(parser_errors) - _PARSER_ERROR_LIMIT
        shown = "; ".join(parser_errors[:_PARSER_ERROR_LIMIT]) or logged
        raise EngineLoadError(
            f"{runtime.kind} cannot parse {model}: {shown}{f'; and {more} more' if more > 0 else ''}"
        )
    if network.num_outputs == 0 or network.num_inputs == 0:
        # A file that is not ONNX may parse as an empty model.
        raise EngineLoadError(f"{runtime.kind} cannot parse {model}: it has no inputs or no outputs")
    return parser


def _parser_error(error: Any) -> str:
    """Format an error, such as `node 'conv1' (BitShift): unsupported: ...`."""
    name, operator = error.node_name(), error.node_operator()
    where = f"node {name!r}" if name else f"node {error.node()}" if error.node() >= 0 else "the graph"
    code = str(error.code()).rpartition(".")[2].lower().replace("_", " ")
    described = " ".join(error.desc().split())
    # The parser's text is the failed C++ condition; "false" has no meaning for a reader.
    why = code if described in {"", "false"} else f"{code}: {described}"
    return f"{where} ({operator}): {why}" if operator else f"{where}: {why}"


def _inputs(network: Any, model: Path) -> dict[str, Shape]:
    inputs: dict[str, Shape] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(int(size) for size in tensor.shape)
        if tensor.is_shape_tensor:
            raise EngineLoadError(
                f"input {tensor.name!r} of {model} is a shape tensor, whose values are sizes of other "
                "tensors: not supported"
            )
        inputs[tensor.name] = shape
    return inputs


def _fixed_batch(network: Any) -> int:
    """Return the first axis's size; 1 for a model whose first input is a scalar."""
    return int((*network.get_input(0).shape, 1)[0])


def _add_profile(builder: Any, config: Any, wanted: Profile, errors: ErrorLog) -> None:
    profile = builder.create_optimization_profile()
    try:
        for name, (low, best, high) in wanted.items():
            profile.set_shape(name, low, best, high)
        added = bool(profile) and config.add_optimization_profile(profile) >= 0
    except (TypeError, ValueError) as error:
        raise EngineLoadError(f"TensorRT refuses the profile {wanted}: {error}") from None
    if not added:
        raise EngineLoadError(f"TensorRT refuses the profile {wanted}: {errors.reason('no reason given')}")


def _configure(runtime: TensorRT, config: Any, options: BuildOptions, errors: ErrorLog) -> Callable[[], None]:
    """Set the options. Returns a function to call after the build."""
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
        raise EngineLoadError("tensorrt-rtx has no timing cache: it measures no kernels while it builds")
    return _use_timings(config, options.timing_cache, errors)


def _known(runtime: TensorRT, enum: str, name: str) -> Any:
    value = runtime.flag(enum, name)
    if value is None:
        raise EngineLoadError(f"{runtime.kind} {runtime.version} has no {enum}.{name}")
    return value


def _use_timings(config: Any, path: Path, errors: ErrorLog) -> Callable[[], None]:
    """Use the timings in a file if they are of this GPU. Returns a function that writes them back."""
    try:
        saved = path.read_bytes()
    except FileNotFoundError:
        saved = b""
    except OSError as error:
        raise EngineLoadError(f"cannot read the timing cache {path}: {error.strerror}") from None
    if not config.set_timing_cache(config.create_timing_cache(saved), False):
        log.warning("timing cache %s does not fit: %s; it is replaced", path, errors.reason("of another GPU"))
        config.set_timing_cache(config.create_timing_cache(b""), False)

    def save() -> None:
        try:
            write_file(path, bytes(config.get_timing_cache().serialize()))
        except OSError as error:
            # Keep the plan, which took long to build.
            log.warning("cannot write the timing cache %s: %s", path, error.strerror)

    return save


def _run(
    runtime: TensorRT,
    builder: Any,
    network: Any,
    config: Any,
    errors: ErrorLog,
    progress: Progress | None,
) -> bytes:
    watch = make_watch(runtime.trt, progress or (lambda _phase, _fraction: True))
    config.progress_monitor = watch.monitor
    try:
        serialized = builder.build_serialized_network(network, config)
    finally:
        config.progress_monitor = None  # it must not outlive `watch`
    if watch.error is not None:
        raise watch.error
    if watch.cancelled:
        raise EngineLoadError("the build was cancelled")
    if serialized is None:
        raise EngineLoadError(f"{runtime.kind} cannot build this model: {errors.reason('no reason given')}")
    return bytes(serialized)
