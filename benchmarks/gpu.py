"""The measurements of ./scripts/gpu-check (with tests/engines/tensorrt/test_gpu.py), and its report.

They work with any engine, so that ONNX Runtime on the CPU tests them without a GPU.

`python -m benchmarks.gpu LINES` prints the report from the lines that the tests recorded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from cobatch.engines.base import Array, Engine, RowShapes, TensorSpec

# The variable with the file of the recorded lines; ./scripts/gpu-check sets it.
REPORT = "GPU_REPORT"
# The largest difference from the reference, relative to the reference's largest value. FP32 products are
# rounded to TF32 (10 bits) on the GPU.
TOLERANCES = {"FP32": 5e-3, "FP16": 1e-2, "BF16": 5e-2}
_TRTEXEC_AT = (Path("/usr/src/tensorrt/bin"), Path("/opt/tensorrt/bin"), Path("/usr/local/tensorrt/bin"))
_THROUGHPUT = re.compile(r"Throughput: ([\d.]+) qps")
_SECTIONS = [
    "build",
    "batching",
    "accuracy",
    "graphs",
    "throughput",
    "profiles",
    "sustained",
    "served",
    "faults",
]


# Batches


def to_bf16(values: Array) -> Array:
    """Return FP32 as the bits of BF16, truncated (the values of the tests need no rounding)."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """Return the bits of BF16 as FP32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random_rows(spec: TensorSpec, rows: int, seed: int = 1) -> Array:
    """Return random rows for an input; integers are below 128, valid as bytes and as tokens."""
    rng = np.random.default_rng(seed)
    shape = (rows, *spec.shape)
    if spec.datatype == "BF16":
        return to_bf16(rng.standard_normal(shape, np.float32))
    if spec.dtype.kind == "f":
        return rng.standard_normal(shape, np.float32).astype(spec.dtype)
    if spec.dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(spec.dtype)
    return rng.integers(0, 128, shape).astype(spec.dtype)


def row_shapes(arrays: Sequence[Array]) -> RowShapes:
    """Return the shapes of a row of each input."""
    return tuple(tuple(array.shape[1:]) for array in arrays)


def pack(engine: Engine, slot: int, arrays: Sequence[Array]) -> None:
    """Write rows into a slot, without keeping a reference to its buffers."""
    rows = len(arrays[0])
    for buffer, array in zip(engine.inputs(slot, rows, row_shapes(arrays)), arrays, strict=True):
        buffer[:rows] = array


def run(engine: Engine, arrays: Sequence[Array], slot: int = 0) -> tuple[Array, ...]:
    """Run a batch as the worker does, and return copies of its outputs."""
    rows, shapes = len(arrays[0]), row_shapes(arrays)
    pack(engine, slot, arrays)
    engine.enqueue(slot, rows, shapes)
    return tuple(np.array(output) for output in engine.wait(slot))


def difference(datatype: str, ours: Array, theirs: Array) -> float:
    """Return the largest difference relative to the reference's largest value; infinity for NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    a, b = ((from_bf16(x) if datatype == "BF16" and x.dtype == np.uint16 else x) for x in (ours, theirs))
    a, b = a.astype(np.float64), b.astype(np.float64)
    if a.size == 0:
        return 0.0
    scale = float(np.abs(b).max()) or 1.0
    worst = float(np.abs(a - b).max()) / scale
    return worst if np.isfinite(worst) else float("inf")


# Speed


def pipelined(engine: Engine, arrays: Sequence[Array], seconds: float) -> float:
    """Return rows per second with all slots busy: a batch is enqueued before the previous one ends.

    The buffers are packed once: copies and execution are measured, as by trtexec.
    """
    rows, shapes = len(arrays[0]), row_shapes(arrays)
    for slot in range(engine.slots):
        pack(engine, slot, arrays)
    batches, slot = 0, 0
    began = time.perf_counter()
    ends = began + seconds
    for first in range(engine.slots - 1):
        engine.enqueue(first, rows, shapes)
    slot = engine.slots - 1
    while batches == 0 or time.perf_counter() < ends:
        engine.enqueue(slot, rows, shapes)
        slot = (slot + 1) % engine.slots
        engine.wait(slot)
        batches += 1
    for _ in range(engine.slots - 1):
        slot = (slot + 1) % engine.slots
        engine.wait(slot)
        batches += 1
    return batches * rows / (time.perf_counter() - began)


def latency_us(engine: Engine, arrays: Sequence[Array], runs: int = 200) -> float:
    """Return the median time of a single batch, from enqueue to outputs."""
    rows, shapes = len(arrays[0]), row_shapes(arrays)
    run(engine, arrays)
    taken = []
    for _ in range(runs):
        began = time.perf_counter()
        engine.enqueue(0, rows, shapes)
        engine.wait(0)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)) * 1e6


@dataclass(frozen=True, slots=True)
class Sustained:
    """Rows per second in consecutive windows."""

    windows: tuple[float, ...]

    @property
    def steadiness(self) -> float:
        """The rate of the slowest window relative to the median."""
        return min(self.windows) / float(np.median(self.windows))


def sustained(engine: Engine, arrays: Sequence[Array], windows: int, seconds: float) -> Sustained:
    """Measure the rate at full load in several windows."""
    return Sustained(tuple(pipelined(engine, arrays, seconds) for _ in range(windows)))


# trtexec


def find_trtexec() -> Path | None:
    """Find trtexec: `$TRTEXEC`, PATH, or the folders of NVIDIA's packages and images."""
    named = os.environ.get("TRTEXEC") or shutil.which("trtexec")
    if named:
        return Path(named)
    return next((at / "trtexec" for at in _TRTEXEC_AT if (at / "trtexec").is_file()), None)


def trtexec_command(
    program: Path,
    plan: Path,
    shapes: dict[str, tuple[int, ...]],
    seconds: int,
    *,
    version: str,
    graphs: bool,
    streams: int,
) -> list[str]:
    """Return a command that runs the plan as the engine does: with copies, asleep while it waits, and with a
    stream for each slot.

    `version`: of TensorRT. By default trtexec of 11 leaves out the copies, spins, and uses graphs.
    """
    if int(version.partition(".")[0]) >= 11:
        alike = ["--includeDataTransfers", "--noSpinWait", *([] if graphs else ["--noCudaGraph"])]
    else:
        alike = ["--useCudaGraph"] if graphs else []
    sizes = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return [
        str(program),
        f"--loadEngine={plan}",
        f"--shapes={sizes}",
        f"--duration={seconds}",
        "--warmUp=500",
        f"--infStreams={streams}",
        *alike,
    ]


def trtexec_qps(output: str) -> float:
    """Parse batches per second from trtexec's output. Raises ValueError."""
    rates = _THROUGHPUT.findall(output)
    if not rates:
        raise ValueError("trtexec reported no throughput: " + " | ".join(output.splitlines()[-5:]))
    return float(rates[-1])


def trtexec_rows_per_s(command: Sequence[str], rows: int) -> float:
    """Run trtexec. Raises ValueError."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return trtexec_qps(done.stdout + done.stderr) * rows


# The report


def note(section: str, text: str) -> None:
    """Record a line of the report for ./scripts/gpu-check; without it, do nothing."""
    path = os.environ.get(REPORT)
    if path:
        with Path(path).open("a") as lines:
            lines.write(json.dumps([section, text]) + "\n")


def machine(ask: Callable[[], str] | None = None) -> list[str]:
    """Return a description of the machine."""
    versions = []
    for package in (
        "cobatch",
        "tensorrt-cu13",
        "tensorrt-cu12",
        "tensorrt",
        "pycuda",
        "cuda-bindings",
        "onnxruntime",
    ):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return [
        f"date: {datetime.now(UTC):%d %b %Y, %H:%M} UTC",
        f"GPU: {(ask or _nvidia_smi)()}",
        f"host: {platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        f"packages: {', '.join(versions)}",
        f"trtexec: {find_trtexec() or 'not found'}",
        f"CUDA graphs: {'cuda-bindings is installed' if _has('cuda.bindings') else 'no cuda-bindings'}",
    ]


def _nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none (no nvidia-smi)"
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    done = subprocess.run(
        [program, query, "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return " | ".join(done.stdout.strip().splitlines()) or f"nvidia-smi: {done.stderr.strip()}"


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def report(lines: Sequence[str], about: Sequence[str]) -> str:
    """Return the report from the recorded lines, section by section."""
    noted: dict[str, list[str]] = {section: [] for section in _SECTIONS}
    for line in lines:
        section, text = json.loads(line)
        noted.setdefault(section, []).append(text)
    parts = ["cobatch on a GPU", *(f"  {line}" for line in about)]
    for section, texts in noted.items():
        parts += [
            "",
            section,
            *(f"  {text}" for text in texts or ["(no lines: see the tests above)"]),
        ]
    return "\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    """Print the report."""
    if len(arguments) != 1:
        print("usage: python -m benchmarks.gpu LINES", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    lines = path.read_text().splitlines() if path.exists() else []
    print(report(lines, machine()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
