"""How many processors there are to share.

From a setting to an engine. A new engine is one file and one line in ENGINES.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cobatch.engines.base import Engine
from cobatch.engines.errors import EngineLoadError


def cores() -> int:
    """Those that this process may use: a container's share can be far below the machine's count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What only some engines ask: `threads` ONNX Runtime, the rest TensorRT.

    `batch_buckets`: the sizes that batches are rounded up to (None: powers of two). `plan_cache`: the folder
    of built plans (None: in the user's cache).
    """

    threads: int | None = None
    device: int = 0
    slots: int = 2
    batch_buckets: tuple[int, ...] | None = None
    tensorrt_runtime: str = "tensorrt"
    cuda_graphs: bool = True
    plan_cache: Path | None = None
    plan_host_code: bool = False


def _onnxruntime(path: str, max_batch_size: int, options: EngineOptions) -> Engine:
    from cobatch.engines.onnxruntime import OnnxRuntimeEngine  # noqa: PLC0415 - load only the library that is used

    return OnnxRuntimeEngine(path, max_batch_size, options.threads)


def _tensorrt(path: str, max_batch_size: int, options: EngineOptions) -> Engine:
    from cobatch.engines.tensorrt.engine import TensorRTEngine  # noqa: PLC0415
    from cobatch.engines.tensorrt.plans.build import BuildOptions  # noqa: PLC0415 - the same
    from cobatch.engines.tensorrt.plans.cache import plan_source  # noqa: PLC0415

    built_for = BuildOptions(max_batch_size=max_batch_size, runtime=options.tensorrt_runtime)
    return TensorRTEngine(
        path,
        max_batch_size,
        device=options.device,
        buckets=options.batch_buckets,
        slots=options.slots,
        runtime=options.tensorrt_runtime,
        graphs=options.cuda_graphs,
        host_code=options.plan_host_code,
        plan_source=plan_source(Path(path), built_for, options.plan_cache, options.device),
    )


ENGINES: dict[str, Callable[[str, int, EngineOptions], Engine]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
}
# What opens a file where nothing is said: a plan runs nowhere else.
_BY_SUFFIX = {".onnx": "onnxruntime", ".plan": "tensorrt", ".engine": "tensorrt"}


def load_engine(
    kind: str,
    path: str | os.PathLike[str],
    max_batch_size: int,
    options: EngineOptions = EngineOptions(),
) -> Engine:
    """An engine for the file, not yet open. Raises EngineLoadError when there is none for it.

    `kind` is a key of ENGINES, or "auto" for what fits the file.
    """
    path = os.fspath(path)
    suffix = Path(path).suffix
    if suffix not in _BY_SUFFIX and kind in {"auto", "tensorrt"}:
        raise EngineLoadError(f"no engine is known for {path}; expected an .onnx, .plan or .engine file")
    if kind == "auto":
        kind = _BY_SUFFIX[suffix]
    make = ENGINES.get(kind)
    if make is None:
        raise EngineLoadError(f"engine {kind!r} is not part of this release; there is {', '.join(ENGINES)}")
    try:
        return make(path, max_batch_size, options)
    except ImportError as error:
        raise EngineLoadError(f"engine {kind!r} cannot be used here: {error}") from error
