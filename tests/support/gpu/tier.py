"""Tests without a GPU: real PyCUDA and cuda-bindings over a fake driver, with stand-ins for TensorRT.

`require_fake_gpu()` gives this process two fake GPUs, or skips the test with the reason; under CI it fails
instead. The process keeps them: the driver's library cannot be unloaded.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.gpu.fakecuda.build import Built, CannotBuildError, build
from tests.support.gpu.fakecuda.control import FakeCuda

STAND_INS = Path(__file__).parent / "stand_ins"
# TensorRT version of the stand-ins in a new process, set by `environment`. (Without the prefix COBATCH_,
# since the server refuses unknown settings.)
VERSION_VARIABLE = "STAND_IN_TENSORRT"


def require_fake_gpu() -> FakeCuda:
    """Return the reset fake driver; `pycuda`, `cuda.bindings` and `tensorrt` can be imported."""
    fake = _required()
    fake.reset()
    return fake


def _required() -> FakeCuda:
    fake, why_not = _fake_gpu()
    if fake is None and os.environ.get("CI"):
        pytest.fail(why_not)
    if fake is None:
        pytest.skip(why_not)
    return fake


def environment(
    version: str | None = None,
    *,
    report: Path | None = None,
    inject: Sequence[tuple[str, int, int]] = (),
    threaded: bool = False,
) -> dict[str, str]:
    """Return this process's environment, extended so that a new Python process has fake GPUs.

    `version`: of the stand-ins for TensorRT. `report`: file that broken rules are written to. `inject`:
    errors as of FakeCuda, (call, code, nth) each.
    """
    _required()
    built = _built()[0]
    assert built is not None
    environ = {**os.environ}
    environ["LD_LIBRARY_PATH"] = _joined(str(built.library.parent), environ.get("LD_LIBRARY_PATH"))
    environ["PYTHONPATH"] = _joined(str(built.site), str(STAND_INS), environ.get("PYTHONPATH"))
    if version is not None:
        environ[VERSION_VARIABLE] = version
    if report is not None:
        environ["FAKE_CUDA_REPORT"] = str(report)
    if threaded:
        environ["FAKE_CUDA_THREADED"] = "1"
    environ["FAKE_CUDA_INJECT"] = ",".join(f"{call}={code}={nth}" for call, code, nth in inject)
    return environ


def _joined(*paths: str | None) -> str:
    return os.pathsep.join(path for path in paths if path)


@functools.cache
def _built() -> tuple[Built | None, str]:
    try:
        return build(), ""
    except CannotBuildError as error:
        return None, f"no fake GPU here: {error}"


@functools.cache
def _fake_gpu() -> tuple[FakeCuda | None, str]:
    built, why_not = _built()
    if built is None:
        return None, why_not
    fake = FakeCuda(built.library)
    # In front, since a machine with a GPU may have the real modules.
    sys.path[:0] = [str(built.site), str(STAND_INS)]
    return fake, ""
