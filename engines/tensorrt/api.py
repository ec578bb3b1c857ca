"""The only module that imports NVIDIA's TensorRT modules: TensorRT 10.x and 11.x, whole or lean, and TensorRT
for RTX.

All of them have the same classes. They differ in the enumerators and their values (11 dropped the precision
flags and moved others), so enumerators are always looked up by name; None means that this version has none.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from cobatch.engines.errors import EngineLoadError

RUNTIMES = ("tensorrt", "tensorrt-lean", "tensorrt-rtx")
# Modules to import, in order of preference. The last two packages only wrap their bindings, which are
# ordinary wheels and may be installed alone.
_MODULES = {
    "tensorrt": ("tensorrt",),
    "tensorrt-lean": ("tensorrt_lean", "tensorrt_lean_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
# The package to install if all are missing.
_INSTALL = {
    "tensorrt": "pip install 'cobatch[tensorrt]', or tensorrt-cu12 for CUDA 12",
    "tensorrt-lean": "pip install tensorrt-lean-cu13, or tensorrt-lean-cu12 for CUDA 12",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13",
}
_OLDEST = {"tensorrt": 10, "tensorrt-lean": 10, "tensorrt-rtx": 1}


@dataclass(frozen=True, slots=True)
class TensorRT:
    """A loaded module `trt`. `version`: of the module, such as 10.16.0."""

    kind: str
    version: str
    trt: Any

    def flag(self, enum: str, name: str) -> Any | None:
        """Return an enumerator, such as ("BuilderFlag", "FP16"); None if this version lacks it."""
        return getattr(getattr(self.trt, enum, None), name, None)

    @property
    def is_rtx(self) -> bool:
        """True for TensorRT for RTX, which compiles a plan's kernels at load."""
        return self.kind == "tensorrt-rtx"


def load_tensorrt(kind: str = "tensorrt") -> TensorRT:
    """Import a runtime, one of RUNTIMES. Raises EngineLoadError that names the package to install."""
    if kind not in _MODULES:
        raise EngineLoadError(f"unknown runtime {kind!r}; expected one of {', '.join(RUNTIMES)}")
    why = "it is not installed"
    for name in _MODULES[kind]:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in _MODULES[kind]:
                why = str(error)
        except (ImportError, OSError) as error:
            # A library that the module links to; the error text names it.
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
