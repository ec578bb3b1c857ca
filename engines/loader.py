"""From a setting to an engine. A new engine is one file and one line in ENGINES."""

from __future__ import annotations

import os
from collections.abc import Callable

from engines.base import Engine
from engines.errors import EngineLoadError


def _onnxruntime(path: str, max_batch_size: int, threads: int | None) -> Engine:
    from engines.onnxruntime import OnnxRuntimeEngine  # noqa: PLC0415 - load only the library that is used

    return OnnxRuntimeEngine(path, max_batch_size, threads)


ENGINES: dict[str, Callable[[str, int, int | None], Engine]] = {"onnxruntime": _onnxruntime}


def load_engine(
    kind: str, path: str | os.PathLike[str], max_batch_size: int, threads: int | None = None
) -> Engine:
    """An engine for the file, not yet open. Raises EngineLoadError when there is none for it.

    `kind` is a key of ENGINES, or "auto" for what fits the file.
    """
    path = os.fspath(path)
    if kind == "auto":
        if not path.endswith(".onnx"):
            raise EngineLoadError(f"no engine is known for {path}; expected an .onnx file")
        kind = "onnxruntime"
    make = ENGINES.get(kind)
    if make is None:
        raise EngineLoadError(f"engine {kind!r} is not part of this release; there is {', '.join(ENGINES)}")
    try:
        return make(path, max_batch_size, threads)
    except ImportError as error:
        raise EngineLoadError(f"engine {kind!r} cannot be used here: {error}") from error
