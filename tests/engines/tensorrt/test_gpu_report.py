"""The measurements and report of the GPU check, exercised with ONNX Runtime on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.common.models import model_path
from cobatch.engines.base import Array, RowShapes, TensorSpec
from cobatch.engines.onnxruntime.engine import OnnxRuntimeEngine
from tests.support.models import models

# As TensorRT 10.2 prints it (NVIDIA/TensorRT, issues 4036 and 4177).
TRTEXEC = """
[10/03/2024-10:47:59] [I] === Performance summary ===
[10/03/2024-10:47:59] [I] Throughput: 130.298 qps
[10/03/2024-10:47:59] [I] Latency: min = 5.38672 ms, max = 13.3664 ms, mean = 7.60628 ms
"""


class Counting(OnnxRuntimeEngine):
    """Counts batches, and refuses to enqueue in a busy slot."""

    def __init__(self, path: str) -> None:
        super().__init__(path, 8, 1)
        self.busy: set[int] = set()
        self.most = 0
        self.batches = 0

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        assert slot not in self.busy
        self.busy.add(slot)
        self.most = max(self.most, len(self.busy))
        super().enqueue(slot, rows, row_shapes)

    def wait(self, slot: int) -> tuple[Array, ...]:
        self.busy.remove(slot)
        self.batches += 1
        return super().wait(slot)


@pytest.fixture
def engine() -> Counting:
    counting = Counting(str(model_path("tiny")))
    counting.open()
    return counting


def test_all_slots_are_busy_and_all_batches_are_counted(engine: Counting) -> None:
    (spec,) = engine.signature.inputs
    rows = [gpu.random_rows(spec, 8)]
    assert gpu.pipelined(engine, rows, 0.0) > 0
    assert (engine.busy, engine.most, engine.batches) == (set(), 2, 2)
    assert len(gpu.sustained(engine, rows, 3, 0.0).windows) == 3
    assert gpu.latency_us(engine, rows, 3) > 0
    assert engine.busy == set()


def test_a_batch_and_its_difference_from_another(engine: Counting) -> None:
    (spec,) = engine.signature.inputs
    rows = gpu.random_rows(spec, 5)
    (outputs,) = gpu.run(engine, [rows])
    assert gpu.difference("FP32", outputs, outputs) == 0
    changed = outputs.copy()
    changed[3, 2] += np.abs(outputs).max() / 10
    assert gpu.difference("FP32", changed, outputs) == pytest.approx(0.1, rel=1e-3)
    changed[0, 0] = np.nan
    assert gpu.difference("FP32", changed, outputs) == float("inf")
    assert gpu.difference("FP32", outputs[:4], outputs) == float("inf")
    assert gpu.difference("INT64", np.array([1, 2]), np.array([1, 2])) == 0
    assert gpu.difference("FP32", np.zeros((0, 2)), np.zeros((0, 2))) == 0


def test_bf16_is_carried_as_bits() -> None:
    values = np.array([1.0, -2.5, 0.0, 3.0e38], np.float32)
    bits = gpu.to_bf16(values)
    assert bits.dtype == np.uint16
    assert gpu.from_bf16(bits) == pytest.approx(values, rel=2**-7)
    assert gpu.difference("BF16", bits, gpu.from_bf16(bits)) == 0


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16", "INT64", "INT32", "UINT8", "INT8", "BOOL"])
def test_rows_of_every_type(datatype: str) -> None:
    rows = gpu.random_rows(TensorSpec("x", datatype, (3, 2)), 4)
    assert (rows.shape, rows.dtype) == ((4, 3, 2), TensorSpec("x", datatype, ()).dtype)
    assert np.array_equal(rows, gpu.random_rows(TensorSpec("x", datatype, (3, 2)), 4))


def test_steadiness_is_the_slowest_window_over_the_median() -> None:
    assert gpu.Sustained((100.0, 80.0, 120.0)).steadiness == 0.8


@pytest.mark.parametrize(
    ("version", "graphs", "alike"),
    [
        ("10.16.1.11", True, ["--useCudaGraph"]),
        ("10.16.1.11", False, []),
        ("11.4.0.106", True, ["--includeDataTransfers", "--noSpinWait"]),
        ("11.4.0.106", False, ["--includeDataTransfers", "--noSpinWait", "--noCudaGraph"]),
    ],
)
def test_trtexec_runs_the_same_load_as_the_engine(version: str, graphs: bool, alike: list[str]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"x": (8, 3), "m:0": (8, 1)}
    command = gpu.trtexec_command(
        Path("/bin/trtexec"), Path("m.plan"), shapes, 3, version=version, graphs=graphs, streams=2
    )
    assert command == [
        "/bin/trtexec",
        "--loadEngine=m.plan",
        "--shapes=x:8x3,m:0:8x1",
        "--duration=3",
        "--warmUp=500",
        "--infStreams=2",
        *alike,
    ]


def test_trtexecs_throughput_is_parsed(tmp_path: Path) -> None:
    assert gpu.trtexec_qps(TRTEXEC) == 130.298
    with pytest.raises(ValueError, match=r"no throughput: one \| two"):
        gpu.trtexec_qps("one\ntwo")
    program = tmp_path / "trtexec"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{TRTEXEC}\nEND\n")
    program.chmod(0o755)
    assert gpu.trtexec_rows_per_s([str(program)], 8) == pytest.approx(8 * 130.298)


def test_trtexec_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRTEXEC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "_TRTEXEC_AT", (tmp_path / "none", tmp_path))
    assert gpu.find_trtexec() is None
    (tmp_path / "trtexec").touch()
    assert gpu.find_trtexec() == tmp_path / "trtexec"
    monkeypatch.setenv("TRTEXEC", "/mine")
    assert gpu.find_trtexec() == Path("/mine")


def test_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines"
    monkeypatch.delenv(gpu.REPORT, raising=False)
    gpu.note("build", "lost")
    assert not lines.exists()
    monkeypatch.setenv(gpu.REPORT, str(lines))
    gpu.note("throughput", "8 rows: 100 rows/s")
    gpu.note("build", "1 s")
    monkeypatch.setattr(gpu, "_nvidia_smi", lambda: "NVIDIA H100, 580.1")
    assert gpu.main([str(lines)]) == 0
    shown = capsys.readouterr().out
    assert "  GPU: NVIDIA H100, 580.1\n" in shown
    assert "\nbuild\n  1 s\n\nbatching\n  (no lines: see the tests above)\n" in shown
    assert "\nthroughput\n  8 rows: 100 rows/s\n" in shown
    assert gpu.report([json.dumps(["new", "x"])], []).endswith("\nnew\n  x\n")
    assert gpu.main([]) == 2


def test_several_inputs(tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine(models.write(tmp_path, models.two_inputs()), 4, 1)
    engine.open()
    rows = [gpu.random_rows(spec, 3) for spec in engine.signature.inputs]
    total, count = gpu.run(engine, rows)
    assert np.array_equal(count, rows[1] * 2)
    assert gpu.difference("FP32", total, rows[0] + rows[1].astype(np.float32)) == 0
