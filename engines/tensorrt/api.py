"""The one seam over NVIDIA's Python modules: TensorRT 10.x and 11.x, and TensorRT for RTX.

All three have the same classes. What differs is which enumerators there are and what they count as (11
dropped the precision flags and moved others), so nothing here or above writes an enumerator's value: it
is asked for by name, and None says that this version has none.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from cobatch.engines.errors import EngineLoadError

RUNTIMES = ("tensorrt", "tensorrt-rtx")
# What to import, best first, and what to install where none is there. TensorRT for RTX's own package is
# a shell around its bindings, which are ordinary wheels and can be there alone.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = {
    "tensorrt": "pip install 'cobatch[tensorrt]', or tensorrt-cu12 for CUDA 12",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13",
}
_OLDEST = {"tensorrt": 10, "tensorrt-rtx": 1}


@dataclass(frozen=True, slots=True)
class TensorRT:
    """A loaded module: `trt.Runtime(...)` and the like. `version` is the module's own, such as 10.16.0."""

    kind: str
    version: str
    trt: Any

    def flag(self, enum: str, name: str) -> Any | None:
        """The enumerator `name` of `enum`, such as ("BuilderFlag", "FP16"); None where there is none."""
        return getattr(getattr(self.trt, enum, None), name, None)

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT for RTX, which compiles a plan's kernels when it is loaded."""
        return self.kind == "tensorrt-rtx"


def load_tensorrt(kind: str = "tensorrt") -> TensorRT:
    """Import what `kind` (one of RUNTIMES) stands for. Raises EngineLoadError that says what to install."""
    if kind not in _MODULES:
        raise EngineLoadError(f"runtime {kind!r} is not known; there is {', '.join(RUNTIMES)}")
    why = "it is not installed"
    for name in _MODULES[kind]:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in _MODULES[kind]:
                why = str(error)
        except (ImportError, OSError) as error:
            # A library that the module links to: the loader's own words name it.
            why = str(error)
        else:
            return _checked(kind, module)
    raise EngineLoadError(f"{kind} cannot be used here: {why}; {_INSTALL[kind]}")


def _checked(kind: str, module: Any) -> TensorRT:
    version = str(module.__version__)
    major = version.partition(".")[0]
    if not major.isdecimal() or int(major) < _OLDEST[kind]:
        raise EngineLoadError(f"{kind} {version} is too old; {_OLDEST[kind]} or newer is needed")
    return TensorRT(kind, version, module)
