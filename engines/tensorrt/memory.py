"""What an engine asks of its GPU's memory, and what would fit where it is too much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cobatch.engines.errors import EngineLoadError

_SHARE = 0.95
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


class OutOfMemoryError(EngineLoadError):
    """An allocation at load failed. `what` and how many bytes."""

    def __init__(self, what: str, size: int) -> None:
        super().__init__(f"{show_bytes(size)} for {what}")


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes on the GPU, beside the weights. `working`: TensorRT's own, of a slot's execution contexts;
    `buffers`: a slot's inputs and outputs, at `rows` rows."""

    slots: int
    rows: int
    working: int
    buffers: int

    @property
    def total(self) -> int:
        """Of all slots."""
        return self.slots * (self.working + self.buffers)

    def fitting_rows(self, free: int) -> int:
        """The largest batch that would fit. Both kinds of memory grow about as the rows do; a little is left
        for what grows otherwise."""
        return min(self.rows, int(free * _SHARE) * self.rows // max(1, self.total))

    def refusal(self, gpu: str, failed: str, free: int) -> str:
        """What to tell who asked for the model. `free`: before anything of this was allocated."""
        rows = self.fitting_rows(free)
        if rows >= self.rows:
            hint = "which should have been enough: another process may have taken it meanwhile"
        elif rows:
            hint = f"max_batch_size = {rows} would fit, with a plan that is built for it"
        else:
            hint = "not even one row would fit"
        return (
            f"{gpu} is out of memory: {failed}. Beside its weights the model needs {show_bytes(self.total)} "
            f"for batches of {self.rows} rows ({self.slots} slots, each {show_bytes(self.working)} for "
            f"TensorRT and {show_bytes(self.buffers)} for inputs and outputs); {show_bytes(free)} were free; "
            f"{hint}"
        )


def working_memory(engine: Any, profile: int) -> int:
    """Bytes that an execution context of this profile takes; 0 where this TensorRT does not say."""
    for name in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
        if hasattr(engine, name):
            return max(0, int(getattr(engine, name)(profile)))
    return 0


def show_bytes(size: int) -> str:
    """Such as "1.5 GiB"."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"
