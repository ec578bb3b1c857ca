"""A package with an engine, as pip installs it: a module, and metadata with an entry point."""

from __future__ import annotations

from pathlib import Path

# An engine for files with a number: it adds the number to each row. `times` is its only option.
ENGINE = """
from pathlib import Path

import numpy as np

from cobatch import EngineLoadError, Signature, TensorSpec


class Adding:
    platform = "adding"
    slots = 2

    def __init__(self, path, max_batch_size, options):
        unknown = options.own.keys() - {"times"}
        if unknown:
            raise EngineLoadError(f"engine_options: unknown key {min(unknown)!r}; expected times")
        self.path = path
        self.max_batch_size = max_batch_size
        self.times = options.own.get("times", 1)
        spec = TensorSpec("x", "FP32", (3,))
        self.signature = Signature((spec,), (TensorSpec("y", "FP32", (3,)),))

    def open(self):
        self.number = float(Path(self.path).read_text()) * self.times
        self.buffers = [np.zeros((self.max_batch_size, 3), np.float32) for _ in range(self.slots)]
        self.rows = [0] * self.slots

    def inputs(self, slot, rows, row_shapes):
        return (self.buffers[slot],)

    def enqueue(self, slot, rows, row_shapes):
        self.rows[slot] = rows

    def wait(self, slot):
        return (self.buffers[slot][: self.rows[slot]] + self.number,)

    def close(self):
        self.buffers = []
"""


def install(folder: Path, module: str, code: str, entries: str, version: str = "1.0") -> None:
    """Write a package of one module into a folder that modules are found in."""
    (folder / f"{module}.py").write_text(code)
    metadata = folder / f"{module}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(f"[cobatch.engines]\n{entries}\n")
