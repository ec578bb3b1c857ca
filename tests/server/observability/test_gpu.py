"""The GPUs' metrics, with a stand-in for NVML."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cobatch.server.observability.gpu import Gpus
from tests.support.http.scraping import scrape
from tests.support.http.serving import gated


class NvmlError(Exception):
    pass


class Nvml:
    """Two GPUs: one reports its utilization, the other does not.

    `lost` ones do not answer, `sharing` ones have no memory of their own.
    """

    NVMLError = NvmlError

    def __init__(self) -> None:
        self.open = 0
        self.lost: set[int] = set()
        self.sharing: set[int] = set()

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name, like those below
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        assert self.open
        if handle in self.lost | self.sharing:
            raise NvmlError("Not Supported")
        return SimpleNamespace(total=80_000, used=20_000 + handle)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        if handle == 1:
            raise NvmlError("Not Supported")
        return SimpleNamespace(gpu=35, memory=1)

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        if handle in self.lost:
            raise NvmlError("GPU is lost")
        return "Old" if handle else "New"

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    stand_in = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    return stand_in


def test_each_gpu_is_there(nvml: Nvml) -> None:
    with gated(True) as (served, _):
        now = scrape(served)
        assert now.value("gpu_info", gpu="0", name="New", uuid="GPU-0") == 1
        assert now.value("gpu_info", gpu="1", name="Old", uuid="GPU-1") == 1
        assert now.value("gpu_memory_bytes", gpu="1") == 80_000
        assert now.value("gpu_memory_used_bytes", gpu="1") == 20_001
        assert now.value("gpu_utilization_ratio", gpu="0") == 0.35
        assert now.value("gpu_utilization_ratio", gpu="1") is None
        nvml.sharing.add(0)
        now = scrape(served)
        assert now.value("gpu_memory_bytes", gpu="0") is None
        assert now.value("gpu_utilization_ratio", gpu="0") == 0.35
        nvml.lost.add(0)
        now = scrape(served)
        assert now.value("gpu_info", gpu="0", name="New", uuid="GPU-0") is None
        assert now.value("gpu_memory_bytes", gpu="1") == 80_000
    assert nvml.open == 0


def test_none_where_the_driver_is_missing(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NvmlError("NVML Shared Library Not Found")

    monkeypatch.setattr(nvml, "nvmlInit", missing)
    with gated(True) as (served, _):
        assert not scrape(served).of("gpu_memory_bytes")


def test_none_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpus = Gpus()
    gpus.open()
    assert not gpus.available
    assert gpus.read() == []
    gpus.close()


@pytest.mark.gpu
def test_a_real_one() -> None:
    gpus = Gpus()
    gpus.open()
    if not gpus.available:
        # In ./scripts/gpu-check there is one.
        why_not = pytest.fail if os.environ.get("GPU_CHECK") else pytest.skip
        why_not("needs a GPU of NVIDIA's, its driver and nvidia-ml-py")
    try:
        found = gpus.read()
    finally:
        gpus.close()
    for gpu in found:
        if gpu.memory_bytes is not None:
            assert gpu.used_bytes is not None
            assert 0 < gpu.used_bytes <= gpu.memory_bytes
        assert gpu.utilization is None or 0 <= gpu.utilization <= 1
        assert gpu.name
        assert gpu.uuid.startswith(("GPU-", "MIG-"))
