"""The machine's GPUs as NVML tells of them, where there is NVML and `nvidia-ml-py` (the extra `nvml`)."""

from __future__ import annotations

import contextlib
import importlib
import logging
from typing import Any, NamedTuple

log = logging.getLogger("cobatch.gpu")


class Gpu(NamedTuple):
    """One GPU now; `utilization` is from 0 to 1. None is what the GPU does not say."""

    number: int
    name: str
    uuid: str
    memory_bytes: int | None
    used_bytes: int | None
    utilization: float | None


class Gpus:
    """All GPUs; none where NVML is missing. Its calls take milliseconds: make them on another thread."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []

    def open(self) -> None:
        """Look for GPUs. That there are none is no error."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return
        try:
            nvml.nvmlInit()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            log.info("no metrics of GPUs: %s", error)
            return
        self._nvml = nvml

    def close(self) -> None:
        """Let go of the driver."""
        nvml, self._nvml, self._handles = self._nvml, None, []
        if nvml is not None:
            nvml.nvmlShutdown()

    @property
    def some(self) -> bool:
        """Whether there are any."""
        return bool(self._handles)

    def read(self) -> list[Gpu]:
        """As they are now; those that do not answer are left out."""
        found = []
        for index, handle in enumerate(self._handles):
            try:
                found.append(self._read(index, handle))
            except self._nvml.NVMLError as error:
                log.debug("GPU %d does not answer: %s", index, error)
        return found

    def _read(self, index: int, handle: Any) -> Gpu:
        nvml = self._nvml
        name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
        total = used = utilization = None
        # A GPU that shares the machine's memory has no figures of its own, a part of one (MIG) does not say
        # how busy it is.
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            total, used = int(memory.total), int(memory.used)
        with contextlib.suppress(nvml.NVMLError):
            utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return Gpu(index, _text(name), _text(uuid), total, used, utilization)


def _text(value: str | bytes) -> str:
    """Older versions of the library answer with bytes."""
    return value.decode() if isinstance(value, bytes) else value
