"""From a model's settings to the options of each of its engines."""

from pathlib import Path
from typing import NamedTuple

from cobatch.engines.base import Batching, available_cores
from cobatch.engines.loader import EngineOptions
from cobatch.server.settings.schema import ModelSettings


class Place(NamedTuple):
    """The place of one of a model's engines: the GPU, and its number there. `alone`: it is the only one."""

    device: int
    instance: int
    alone: bool

    @property
    def suffix(self) -> str:
        """The end of the thread's name."""
        return "" if self.alone else f"-{self.device}.{self.instance}"


def places(settings: ModelSettings) -> list[Place]:
    """Return a place for each engine: `instances` on each of the `devices`."""
    alone = len(settings.devices) * settings.instances == 1
    return [
        Place(device, number, alone) for number in range(settings.instances) for device in settings.devices
    ]


def engine_options(settings: ModelSettings, place: Place, batching: Batching | None = None) -> EngineOptions:
    """Return an engine's options. Several engines share the cores; a single one decides itself.

    `batching`: as decided by an earlier engine of the model.
    """
    share = None if settings.instances == 1 else max(1, (available_cores() - 1) // settings.instances)
    return EngineOptions(
        threads=settings.threads or share,
        device=place.device,
        slots=settings.slots,
        batch_buckets=settings.batch_buckets,
        tensorrt_runtime=settings.tensorrt_runtime,
        cuda_graphs=settings.cuda_graphs,
        plan_cache=None if settings.plan_cache is None else Path(settings.plan_cache).expanduser(),
        plan_host_code=settings.plan_host_code,
        batching=batching or Batching(settings.batching),
        name=settings.name,
        folder=settings.python_path,
        reload=settings.reload,
        in_thread=settings.run_in == "thread",
        providers={name: settings.provider_options.get(name, {}) for name in settings.providers or ()},
        own=settings.engine_options,
    )
