"""The version of the stand-ins, and the differences between versions."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

VERSIONS = ("10.0.1", "10.16.1.11", "11.4.0.106")
DEFAULT = "10.16.1.11"

_T = TypeVar("_T")
_DATA_TYPES = "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4"
_FORMATS = "LINEAR CHW2 HWC8 CHW4 CHW16 CHW32 DHWC8 CDHW32 HWC DLA_LINEAR DLA_HWC4 HWC16 DHWC"
_PARSER_ERRORS = (
    "SUCCESS INTERNAL_ERROR MEM_ALLOC_FAILED MODEL_DESERIALIZE_FAILED INVALID_VALUE INVALID_GRAPH "
    "INVALID_NODE UNSUPPORTED_GRAPH UNSUPPORTED_NODE UNSUPPORTED_NODE_ATTR UNSUPPORTED_NODE_INPUT "
    "UNSUPPORTED_NODE_DATATYPE UNSUPPORTED_NODE_DYNAMIC UNSUPPORTED_NODE_SHAPE REFIT_FAILED"
)
_ERRORS = (
    "SUCCESS UNSPECIFIED_ERROR INTERNAL_ERROR INVALID_ARGUMENT INVALID_CONFIG FAILED_ALLOCATION "
    "FAILED_INITIALIZATION FAILED_EXECUTION FAILED_COMPUTATION INVALID_STATE UNSUPPORTED_STATE"
)


def _counted(names: str) -> dict[str, int]:
    return {name: value for value, name in enumerate(names.split())}


_FLAGS_10_0 = _counted(
    "FP16 INT8 DEBUG GPU_FALLBACK REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE "
    "OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO REJECT_EMPTY_ALGORITHMS "
    "VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME FP8 ERROR_ON_TIMING_CACHE_MISS BF16 DISABLE_COMPILATION_CACHE "
    "STRIP_PLAN REFIT_IDENTICAL WEIGHT_STREAMING"
) | {"WEIGHTLESS": 19}
# The members' values of each enumeration, in each of VERSIONS.
_ENUMS: dict[str, list[dict[str, int]]] = {
    "DataType": [
        _counted(_DATA_TYPES),
        _counted(_DATA_TYPES + " FP4 E8M0"),
        _counted(_DATA_TYPES + " FP4 E8M0"),
    ],
    "TensorIOMode": [_counted("NONE INPUT OUTPUT")] * 3,
    "TensorLocation": [_counted("DEVICE HOST")] * 3,
    "TensorFormat": [_counted(_FORMATS)] * 3,
    "ExecutionContextAllocationStrategy": [_counted("STATIC ON_PROFILE_CHANGE USER_MANAGED")] * 3,
    "MemoryPoolType": [
        _counted("WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM TACTIC_DRAM TACTIC_SHARED_MEMORY")
    ]
    * 3,
    "ErrorCode": [_counted(_PARSER_ERRORS)] * 3,
    "ErrorCodeTRT": [_counted(_ERRORS)] * 3,
    "BuilderFlag": [
        _FLAGS_10_0,
        _FLAGS_10_0
        | {"INT4": 22, "REFIT_INDIVIDUAL": 23, "STRICT_NANS": 24, "MONITOR_MEMORY": 25, "FP4": 26}
        | {"EDITABLE_TIMING_CACHE": 27, "DISTRIBUTIVE_INDEPENDENCE": 28},
        {"DEBUG": 2, "GPU_FALLBACK": 3, "REFIT": 4, "DISABLE_TIMING_CACHE": 5, "TF32": 6, "SPARSE_WEIGHTS": 7}
        | {"SAFETY_SCOPE": 8, "DIRECT_IO": 11, "VERSION_COMPATIBLE": 12, "EXCLUDE_LEAN_RUNTIME": 13}
        | {"ERROR_ON_TIMING_CACHE_MISS": 15, "DISABLE_COMPILATION_CACHE": 17, "STRIP_PLAN": 18}
        | {"REFIT_IDENTICAL": 19, "WEIGHT_STREAMING": 20, "REFIT_INDIVIDUAL": 22, "STRICT_NANS": 23}
        | {"MONITOR_MEMORY": 24, "EDITABLE_TIMING_CACHE": 26, "DISTRIBUTIVE_INDEPENDENCE": 27},
    ],
    "NetworkDefinitionCreationFlag": [
        {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1},
        {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
        | {"PREFER_JIT_PYTHON_PLUGINS": 2, "PREFER_AOT_PYTHON_PLUGINS": 3},
        {"STRONGLY_TYPED": 0, "PREFER_JIT_PYTHON_PLUGINS": 1, "PREFER_AOT_PYTHON_PLUGINS": 2},
    ],
    "HardwareCompatibilityLevel": [
        _counted("NONE AMPERE_PLUS"),
        _counted("NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY"),
        _counted("NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY"),
    ],
}
_versioned: list[tuple[type, str, Any, tuple[str, ...]]] = []


class Enum(enum.Enum):
    """An enumeration as pybind11's: members are no numbers, but `int` converts them."""

    def __int__(self) -> int:
        return int(self.value)

    def __index__(self) -> int:
        return int(self.value)


def only_in(*versions: str) -> Callable[[_T], _T]:
    """Mark a method or property that other versions lack; the class must have `@with_versions`."""

    def mark(member: _T) -> _T:
        target: Any = member.fget if isinstance(member, property) else member
        target.versions = versions
        return member

    return mark


def with_versions(cls: type[_T]) -> type[_T]:
    """Let `use` add and remove the marked members of this class."""
    for name, member in list(vars(cls).items()):
        target = member.fget if isinstance(member, property) else member
        versions = getattr(target, "versions", None)
        if isinstance(versions, tuple):
            _versioned.append((cls, name, member, versions))
    return cls


def package() -> Any:
    """Return the stand-in module, under the name that it was imported with."""
    return sys.modules[__package__ or "tensorrt"]


def use(version: str | None = None) -> None:
    """Set the version, such as "11.4.0.106" or "11.4"; None: from the environment.

    Modules that copied enumerations or their values must read them again.
    """
    wanted = version or os.environ.get("STAND_IN_TENSORRT") or DEFAULT
    full = next(known for known in VERSIONS if known.startswith(wanted))
    module = package()
    module.__version__ = full
    for name, by_version in _ENUMS.items():
        members = by_version[VERSIONS.index(full)]
        make: Any = Enum
        setattr(module, name, make(name, members, module=module.__name__))
    for cls, name, member, versions in _versioned:
        if full in versions:
            setattr(cls, name, member)
        elif name in vars(cls):
            delattr(cls, name)
