"""GPU memory and utilization from NVML, if there is NVML and `nvidia-ml-py` (the extra `nvml`)."""

import contextlib
import importlib
import logging
from typing import Any, NamedTuple

log = logging.getLogger("cobatch.gpu")


class Gpu(NamedTuple):
    """The state of one GPU; `utilization` is from 0 to 1. A figure that the GPU does not report is None."""

    number: int
    name: str
    uuid: str
    memory_bytes: int | None
    used_bytes: int | None
    utilization: float | None


class Gpus:
    """All GPUs, none without NVML. Calls take milliseconds: make them on another thread."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []

    def open(self) -> None:
        """Look for GPUs. Having none is no error."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return
        try:
            nvml.nvmlInit()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            log.info("no GPU metrics: %s", error)
            return
        self._nvml = nvml

    def close(self) -> None:
        nvml, self._nvml, self._handles = self._nvml, None, []
        if nvml is not None:
            nvml.nvmlShutdown()

    @property
    def available(self) -> bool:
        """There is at least one GPU."""
        return bool(self._handles)

    def read(self) -> list[Gpu]:
        """Return the present state of each GPU that answers."""
        gpus = []
        for index, handle in enumerate(self._handles):
            try:
                gpus.append(self._read(index, handle))
            except self._nvml.NVMLError as error:
                log.debug("GPU %d does not answer: %s", index, error)
        return gpus

    def _read(self, index: int, handle: Any) -> Gpu:
        nvml = self._nvml
        name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
        total = used = utilization = None
        # A GPU that shares the machine's memory reports no memory, a MIG instance no utilization.
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            total, used = int(memory.total), int(memory.used)
        with contextlib.suppress(nvml.NVMLError):
            utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return Gpu(index, name, uuid, total, used, utilization)
