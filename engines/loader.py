"""Create an engine from its settings: one of ENGINES, or of an installed package (plugins.py)."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cobatch.engines.base import AUTO, Batching, Engine
from cobatch.engines.errors import EngineError, EngineLoadError
from cobatch.engines.plugins import find_plugin, package_of, plugin_names


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of engines: `batching` of all, `threads` of ONNX Runtime and Python, the others of TensorRT.

    `batch_buckets`: sizes that batches are padded to (None: powers of two). `plan_cache`: folder of built
    plans (None: in the user's cache folder). Of a model in Python: its `name`, the `folder` where modules are
    found, `device`, if it runs `in_thread`, and if its files may change (`reload`). `providers`: execution
    providers of ONNX Runtime, with their options. `own`: the settings' `engine_options`; an engine of another
    package checks them.
    """

    threads: int | None = None
    device: int = 0
    slots: int = 2
    batch_buckets: tuple[int, ...] | None = None
    tensorrt_runtime: str = "tensorrt"
    cuda_graphs: bool = True
    plan_cache: Path | None = None
    plan_host_code: bool = False
    batching: Batching = AUTO
    name: str = "model"
    folder: str = "."
    in_thread: bool = False
    reload: bool = False
    providers: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    own: Mapping[str, object] = field(default_factory=dict)


def _onnxruntime(path: str, max_batch_size: int, options: EngineOptions) -> Engine:
    from cobatch.engines.onnxruntime.engine import OnnxRuntimeEngine  # noqa: PLC0415 - loads only this engine's library

    return OnnxRuntimeEngine(path, max_batch_size, options.threads, options.batching, options.providers)


def _tensorrt(path: str, max_batch_size: int, options: EngineOptions) -> Engine:
    from cobatch.engines.tensorrt.engine import TensorRTEngine  # noqa: PLC0415
    from cobatch.engines.tensorrt.plans.cache import Verdicts, plan_source  # noqa: PLC0415
    from cobatch.engines.tensorrt.plans.manifest import BuildOptions  # noqa: PLC0415

    build_options = BuildOptions(max_batch_size=max_batch_size, runtime=options.tensorrt_runtime)
    return TensorRTEngine(
        path,
        max_batch_size,
        device=options.device,
        buckets=options.batch_buckets,
        slots=options.slots,
        runtime=options.tensorrt_runtime,
        graphs=options.cuda_graphs,
        host_code=options.plan_host_code,
        batching=options.batching,
        verdicts=Verdicts(options.plan_cache),
        plan_source=plan_source(Path(path), build_options, options.plan_cache, options.device),
    )


def _python(source: str, max_batch_size: int, options: EngineOptions) -> Engine:
    from cobatch.engines.python.engine import ProcessEngine, ThreadEngine  # noqa: PLC0415

    common = source, max_batch_size, options.folder, options.device, options.batching
    if options.in_thread:
        return ThreadEngine(*common)
    return ProcessEngine(*common, name=options.name, threads=options.threads, reload=options.reload)


ENGINES: dict[str, Callable[[str, int, EngineOptions], Engine]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
    "python": _python,
}
BY_SUFFIX = {".onnx": "onnxruntime", ".plan": "tensorrt", ".engine": "tensorrt"}


def load_engine(
    kind: str,
    path: str | os.PathLike[str],
    max_batch_size: int,
    options: EngineOptions = EngineOptions(),
) -> Engine:
    """Create an engine for a model file, or `FILE.py:NAME`, not yet open. Raises EngineLoadError.

    `kind` is a key of ENGINES, the name of an engine of another package, or "auto" to choose by the file's
    suffix, and "python" for `...:NAME`.
    """
    path = os.fspath(path)
    suffix = Path(path).suffix
    if suffix not in BY_SUFFIX and kind == "tensorrt":
        raise _no_engine(path)
    if kind == "auto":
        kind = BY_SUFFIX.get(suffix) or ("python" if ":" in Path(path).name else suffix)
    make = ENGINES.get(kind)
    if make is None:
        return _from_package(kind, path, max_batch_size, options)
    if options.own:
        raise EngineLoadError(f"engine {kind!r} takes no engine_options: only other packages' engines do")
    try:
        return make(path, max_batch_size, options)
    except (ImportError, OSError) as error:
        raise EngineLoadError(f"engine {kind!r} cannot be used here: {error}") from error


def _from_package(kind: str, path: str, max_batch_size: int, options: EngineOptions) -> Engine:
    """Create an engine of another package; `kind`: its name or the file's suffix. Raises EngineLoadError."""
    plugin = find_plugin(kind)
    if plugin is None:
        if kind == Path(path).suffix:
            raise _no_engine(path)
        names = ", ".join((*ENGINES, *plugin_names()))
        raise EngineLoadError(f"unknown engine {kind!r}; expected one of {names}")
    try:
        engine: Engine = plugin.load()(path, max_batch_size, options)
    except EngineError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise EngineLoadError(
            f"engine {kind!r} of {package_of(plugin)} cannot be used here: {why}"
        ) from error
    return engine


def _no_engine(path: str) -> EngineLoadError:
    return EngineLoadError(
        f"no engine for {path}: expected an .onnx, .plan or .engine file, or FILE.py:NAME, or set engine"
    )
