"""The tier without a GPU: real PyCUDA and cuda-bindings over a fake driver, TensorRT stood in for.

`require_fake_gpu()` makes this process one with two fake GPUs, or skips the test and says why; under CI it
fails instead. A process stays that way: the driver's library cannot be unloaded.
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
# Which TensorRT the stand-ins are, in a new process: what `environment` hands on. (The server would refuse a
# COBATCH_… that it does not know.)
VERSION_VARIABLE = "STAND_IN_TENSORRT"


def require_fake_gpu() -> FakeCuda:
    """The fake driver as new, with `pycuda`, `cuda.bindings` and `tensorrt` ready to be imported."""
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
    """This process's environment, and what makes a new Python process one with fake GPUs.

    `version`: which TensorRT the stand-ins are there. `report`: a file that each broken rule is written to.
    `inject`: as FakeCuda's, (call, code, nth) each.
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
    # In front: a machine with a GPU may have the real ones, and these tests are about the others.
    sys.path[:0] = [str(built.site), str(STAND_INS)]
    return fake, ""
