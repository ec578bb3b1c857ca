"""TensorRT on a real GPU: `pytest -m gpu`, or ./scripts/gpu-check, which prints a report too.

Skipped without a GPU; with GPU_CHECK set, as in ./scripts/gpu-check, that is a failure. Not yet run on a real
GPU: docs/gpu.md lists the runs on real hardware.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from benchmarks import gpu
from benchmarks.common.models import model_path
from cobatch.engines.base import Array, Engine
from cobatch.engines.errors import EngineLoadError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.engines.onnxruntime.engine import OnnxRuntimeEngine
from cobatch.engines.tensorrt.api import load_tensorrt
from tests.support.http.process import COBATCH, Cobatch
from tests.support.models import axis_models, models
from tests.support.models.plan_models import convolution, magika_path

# Warnings of NVIDIA's modules are no failures of ours.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

SIZES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = int(os.environ.get("GPU_SECONDS", "3"))
SUSTAINED_S = float(os.environ.get("GPU_SUSTAINED_SECONDS", "60"))
CALLERS = 64
# Set by test_gpu_dry.py.
FAKE_GPU = "GPU_FAKE" in os.environ

_ASK = (
    "from cobatch.engines.tensorrt.cuda import gpu_identity; "
    "from cobatch.engines.tensorrt.api import load_tensorrt; "
    "load_tensorrt(); print(*gpu_identity(0))"
)


@cache
def why_not() -> str:
    """Return why there is no GPU to test, asked in a new process, as this one may have a fake GPU."""
    answer = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=False)
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"the question ended with status {answer.returncode}"]
        return lines[-1].removeprefix("cobatch.engines.errors.EngineLoadError: ")
    from cobatch.engines.tensorrt.cuda import gpu_identity  # noqa: PLC0415 - PyCUDA is there

    here = " ".join(gpu_identity(0))
    if here != answer.stdout.strip():
        return f"a fake GPU ({here}) is loaded in this process; run `pytest -m gpu` by itself"
    return ""


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if why_not():
        (pytest.fail if os.environ.get("GPU_CHECK") else pytest.skip)(why_not())


def built_with_lean_runtime(model: Path, plan: Path) -> None:
    """Build a version-compatible plan, whose runtime is missing in NVIDIA's wheels of TensorRT."""
    try:
        cobatch_build(model, plan, "--version-compatible")
    except AssertionError as error:
        if "nvinfer_lean" not in str(error):
            raise
        gpu.note("build", "--version-compatible: libnvinfer_lean is not installed (docs/gpu.md)")
        pytest.skip("libnvinfer_lean is not installed (docs/gpu.md)")


def cobatch_build(model: Path, plan: Path, *arguments: str) -> tuple[float, dict[str, Any]]:
    """Run `cobatch build`; return its seconds and the manifest."""
    began = time.monotonic()
    command = [str(COBATCH), "build", str(model), "-o", str(plan), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest: dict[str, Any] = json.loads(plan.with_name(plan.name + ".json").read_text())
    return time.monotonic() - began, manifest


def judge_speed(holds: bool, *figures: object) -> None:
    """Assert a claim on speed, on a real GPU only: a fake one is as fast as the machine is idle."""
    assert holds or FAKE_GPU, figures


@contextlib.contextmanager
def opened(path: Path, max_batch_size: int = 64, **options: Any) -> Iterator[Engine]:
    engine = load_engine("tensorrt", path, max_batch_size, EngineOptions(**options))
    try:
        engine.open()
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def reference(path: Path | str, max_batch_size: int = 64) -> Iterator[Engine]:
    engine = OnnxRuntimeEngine(str(path), max_batch_size)
    engine.open()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def magika_plan(folder: Path) -> Path:
    plan = folder / "magika.plan"
    seconds, manifest = cobatch_build(magika_path(), plan)
    assert (manifest["gpu"], manifest["compute_capability"]) != ("none", "none")
    assert manifest["profiles"] == ["bytes:1x2048/64x2048/64x2048"]
    where = f"{manifest['runtime']} {manifest['version']} on {manifest['gpu']}"
    gpu.note("build", f"magika: {seconds:.1f} s, {plan.stat().st_size / 1e6:.1f} MB, {where}")
    return plan


# Batching


def test_batching_is_proven_or_disproved(folder: Path) -> None:
    """Verdicts that ONNX Runtime has too; whole tensors, and an output whose shape depends on the data."""
    cases = {
        "negate": (models.negate(), "proven"),
        "cumulative": (axis_models.cumulative(), "disproved"),
        "softmax": (axis_models.chain(["softmax"], 3, 0), "disproved"),
        "found": (axis_models.nonzero(4, 3), "disproved"),
    }
    for name, (data, verdict) in cases.items():
        path = Path(models.write(folder, data, f"{name}.onnx"))
        with opened(path, 8, plan_cache=folder / "batching") as engine, reference(path, 8) as expected:
            assert engine.signature.batching.verdict == expected.signature.batching.verdict == verdict
            spec = engine.signature.inputs[0]
            for seed in range(3):
                shape = (1, *(5 if size == -1 else size for size in spec.shape))
                x = np.random.default_rng(seed).integers(0, 2, shape).astype(np.float32)
                ours, theirs = (gpu.run(one, [x])[0] for one in (engine, expected))
                assert ours.shape == theirs.shape, name
                assert np.allclose(ours, theirs, atol=1e-5), name
        gpu.note("batching", f"{name}: {engine.signature.batching_note}")


# Build


def test_a_timing_cache_makes_the_second_build_faster(folder: Path) -> None:
    timings = folder / "timings"
    taken = [
        cobatch_build(magika_path(), folder / "timed.plan", "--timing-cache", str(timings))[0]
        for _ in range(2)
    ]
    assert timings.stat().st_size > 0
    gpu.note("build", f"magika with a timing cache: {taken[0]:.1f} s, then {taken[1]:.1f} s")
    judge_speed(taken[1] < taken[0] * 1.2, taken)


def test_a_hardware_compatible_plan_builds_and_runs(folder: Path) -> None:
    model = Path(models.write(folder, convolution(height=32, width=32), "hardware.onnx"))
    plan = folder / "hardware.plan"
    seconds, manifest = cobatch_build(model, plan, "--hardware-compatible")
    assert manifest["flags"] == ["AMPERE_PLUS"]
    gpu.note("build", f"small convolution, --hardware-compatible: {seconds:.1f} s")
    assert worst_difference(plan, model, (1, 8)) <= gpu.TOLERANCES["FP32"]


def test_a_version_compatible_plan_builds_and_runs_with_consent(folder: Path) -> None:
    model = Path(models.write(folder, convolution(height=32, width=32), "version.onnx"))
    plan = folder / "version.plan"
    built_with_lean_runtime(model, plan)
    with pytest.raises(EngineLoadError), opened(plan):
        pass
    assert worst_difference(plan, model, (1, 8), plan_host_code=True) <= gpu.TOLERANCES["FP32"]
    gpu.note("build", "--version-compatible: built, refused without --plan-host-code, run with it")


def test_a_model_is_built_on_first_use_and_then_from_the_cache(folder: Path) -> None:
    model = Path(models.write(folder, convolution(height=32, width=32), "first.onnx"))
    taken = []
    for _ in range(2):
        began = time.monotonic()
        with opened(model, 8, plan_cache=folder / "cache") as engine:
            assert engine.platform == "tensorrt_plan"
        taken.append(time.monotonic() - began)
    assert len(list((folder / "cache").glob("*.plan"))) == 1
    gpu.note(
        "build", f"small convolution, opened from ONNX: {taken[0]:.1f} s, from the cache {taken[1]:.1f} s"
    )
    judge_speed(taken[1] < taken[0], taken)


# Accuracy


def worst_difference(plan: Path, onnx: Path, sizes: tuple[int, ...], **options: Any) -> float:
    worst = 0.0
    with opened(plan, **options) as ours, reference(onnx) as theirs:
        assert [spec.name for spec in ours.signature.inputs] == [s.name for s in theirs.signature.inputs]
        specs = {spec.name: at for at, spec in enumerate(theirs.signature.outputs)}
        for rows in sizes:
            arrays = [gpu.random_rows(spec, rows, seed=rows) for spec in ours.signature.inputs]
            got, expected = gpu.run(ours, arrays), gpu.run(theirs, arrays)
            for spec, output in zip(ours.signature.outputs, got, strict=True):
                part = gpu.difference(spec.datatype, output, expected[specs[spec.name]])
                allowed = gpu.TOLERANCES.get(spec.datatype, 0.0)
                assert part <= allowed, f"{spec.name}, {rows} rows: {part:.2e} > {allowed:.0e}"
                worst = max(worst, part)
    return worst


def test_magika_agrees_with_onnx_runtime(magika_plan: Path) -> None:
    # Includes sizes between the buckets: batches are padded and the outputs cut.
    worst = worst_difference(magika_plan, magika_path(), (1, 3, 8, 33, 64))
    gpu.note("accuracy", f"magika, FP32: {worst:.1e} of the largest value (allowed {gpu.TOLERANCES['FP32']})")


CASES = {
    "convolution FP32": convolution(height=32, width=32),
    "convolution FP16": convolution(height=32, width=32, kind=TensorProto.FLOAT16),
    "FP32 and INT64 in and out": models.two_inputs(),
    "INT32": models.negate(datatype=TensorProto.INT32),
    "INT64": models.negate(datatype=TensorProto.INT64),
    "BOOL": models.identity(TensorProto.BOOL),
    "fixed batch": convolution(8, 32, 32),
}


@pytest.mark.parametrize("case", CASES)
def test_types_agree_with_onnx_runtime(folder: Path, case: str) -> None:
    onnx = Path(models.write(folder, CASES[case], f"{case}.onnx"))
    plan = onnx.with_suffix(".plan")
    cobatch_build(onnx, plan)
    worst = worst_difference(plan, onnx, (8,) if case == "fixed batch" else (1, 5, 64))
    gpu.note("accuracy", f"{case}: {worst:.1e}")


def test_bf16_agrees_with_fp32_on_the_same_values(folder: Path) -> None:
    """ONNX Runtime has no BF16 on the CPU."""
    kind = TensorProto.BFLOAT16
    onnx = Path(models.write(folder, convolution(height=32, width=32, kind=kind), "bf16.onnx"))
    plain = models.write(folder, convolution(height=32, width=32), "plain.onnx")
    cobatch_build(onnx, folder / "bf16.plan")
    with opened(folder / "bf16.plan") as ours, reference(plain) as theirs:
        (spec,) = ours.signature.inputs
        assert spec.datatype == "BF16"
        bits = gpu.random_rows(spec, 7)
        (got,), (expected,) = gpu.run(ours, [bits]), gpu.run(theirs, [gpu.from_bf16(bits)])
    worst = gpu.difference("BF16", got, expected)
    assert worst <= gpu.TOLERANCES["BF16"]
    gpu.note("accuracy", f"convolution BF16: {worst:.1e}")


def test_several_profiles(folder: Path) -> None:
    onnx = Path(models.write(folder, convolution(), "profiles.onnx"))
    specs = ("image:1x3x32x32/8x3x64x64/16x3x64x64", "image:1x3x224x224/1x3x224x224/4x3x256x256")
    plan = folder / "profiles.plan"
    cobatch_build(onnx, plan, *(part for spec in specs for part in ("--profile", spec)))
    rng = np.random.default_rng(3)
    with opened(plan) as ours, reference(onnx) as theirs:
        for shape in ((16, 3, 64, 64), (5, 3, 32, 48), (1, 3, 224, 224), (4, 3, 256, 256), (3, 3, 64, 64)):
            image = rng.standard_normal(shape, np.float32)
            (got,), (expected,) = gpu.run(ours, [image]), gpu.run(theirs, [image])
            assert gpu.difference("FP32", got, expected) <= gpu.TOLERANCES["FP32"], shape
    gpu.note("profiles", "two profiles, five shapes: as ONNX Runtime")


# Speed


def test_outputs_are_equal_with_and_without_graphs(magika_plan: Path) -> None:
    if not gpu._has("cuda.bindings"):
        pytest.skip("cuda-bindings is not installed, so there are no CUDA graphs")
    answers: dict[bool, list[Array]] = {}
    for graphs in (True, False):
        with opened(magika_plan, cuda_graphs=graphs) as engine:
            (spec,) = engine.signature.inputs
            answers[graphs] = [gpu.run(engine, [gpu.random_rows(spec, rows)])[0] for rows in (1, 3, 8, 64)]
            for rows in (1, 8, 64):
                alone = gpu.latency_us(engine, [gpu.random_rows(spec, rows)])
                gpu.note(
                    "graphs", f"{'on ' if graphs else 'off'} {rows:3} rows: {alone:8.1f} us a batch alone"
                )
    for on, off in zip(answers[True], answers[False], strict=True):
        assert gpu.difference("FP32", on, off) <= 1e-6


def test_throughput_at_each_batch_size_against_trtexec(magika_plan: Path) -> None:
    program = gpu.find_trtexec()
    if program is None:
        gpu.note("throughput", "trtexec was not found (TRTEXEC=/path/to/it): nothing to compare with")
    ratios, tensorrt = {}, load_tensorrt()
    for rows in SIZES:
        with opened(magika_plan) as engine:
            (spec,) = engine.signature.inputs
            ours = gpu.pipelined(engine, [gpu.random_rows(spec, rows)], SECONDS)
            slots = engine.slots
        line = f"{rows:3} rows: {ours:10,.0f} rows/s"
        if program is not None:
            shapes = {spec.name: (rows, *spec.shape)}
            graphs = gpu._has("cuda.bindings")
            command = gpu.trtexec_command(
                program, magika_plan, shapes, SECONDS, version=tensorrt.version, graphs=graphs, streams=slots
            )
            theirs = gpu.trtexec_rows_per_s(command, rows)
            ratios[rows] = ours / theirs
            line += f", trtexec {theirs:10,.0f}, ratio {ratios[rows]:.2f}"
        gpu.note("throughput", f"magika, {line}")
    if program is None:
        pytest.skip("trtexec was not found; its place can be given as TRTEXEC")
    judge_speed(ratios[SIZES[-1]] > 0.8, ratios)


def test_full_load_is_steady_and_leaks_no_memory(folder: Path) -> None:
    from cobatch.engines.tensorrt.cuda import load_pycuda  # noqa: PLC0415 - PyCUDA is there

    model = "tiny" if FAKE_GPU else "wide"  # whose megabytes take ten seconds to build without a GPU
    plan = folder / f"{model}.plan"
    cobatch_build(model_path(model), plan)
    with opened(plan) as engine:
        (spec,) = engine.signature.inputs
        rows = [gpu.random_rows(spec, 64)]
        gpu.pipelined(engine, rows, min(1.0, SUSTAINED_S))
        free, _ = load_pycuda().mem_get_info()
        seen = gpu.sustained(engine, rows, 12, SUSTAINED_S / 12)
        left, _ = load_pycuda().mem_get_info()
    rate = float(np.median(seen.windows))
    lost = (free - left) / 1e6
    gpu.note(
        "sustained",
        f"{model}, 64 rows, {SUSTAINED_S:g} s: {rate:,.0f} rows/s, "
        f"slowest window {seen.steadiness:.2f} of it, {lost:.1f} MB of GPU memory lost",
    )
    judge_speed(seen.steadiness > 0.7, seen.windows)
    assert lost < 64


# Served


async def call(port: int, model: str, rows: Array, seconds: float) -> tuple[int, list[float]]:
    """Send rows from CALLERS clients at once; return the number of answers and their differences."""
    from tritonclient.http.aio import InferenceServerClient, InferInput  # noqa: PLC0415 - slow to import

    with reference(magika_path()) as theirs:
        (expected,) = gpu.run(theirs, [rows])
    client = InferenceServerClient(f"127.0.0.1:{port}", conn_limit=CALLERS)
    ends, differences = time.monotonic() + seconds, []

    async def caller(at: int) -> int:
        answered = 0
        request = InferInput("bytes", [1, rows.shape[1]], "INT32")
        request.set_data_from_numpy(rows[at : at + 1])
        while time.monotonic() < ends:
            answer = (await client.infer(model, [request])).as_numpy("target_label")
            differences.append(gpu.difference("FP32", answer, expected[at : at + 1]))
            answered += 1
        return answered

    try:
        return sum(await asyncio.gather(*(caller(at) for at in range(CALLERS)))), differences
    finally:
        await client.close()


def test_served_to_many_callers(magika_plan: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 256, (CALLERS, 2048)).astype(np.int32)
    arguments = (magika_plan, "--port", "0", "--name", "magika")
    with Cobatch(tmp_path, *arguments, env={"PYTHONWARNINGS": "default"}) as server:
        server.ready()
        answered, differences = asyncio.run(call(server.port, "magika", rows, SECONDS * 3))
        assert server.stop() == 0, server.stderr
    assert max(differences) <= gpu.TOLERANCES["FP32"]
    rate = answered / (SECONDS * 3)
    gpu.note(
        "served",
        f"magika over HTTP, {CALLERS} callers (one Python client): {rate:,.0f} requests/s, all right",
    )


# Faults


def fault(kind: str, plan: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.gpu.fault", kind, str(plan)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout, f"the process ended with status {done.returncode}: {done.stderr[-2000:]}"
    errors: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    errors["status"] = done.returncode
    return errors


def test_an_illegal_access_ends_the_engine_and_a_new_one_opens(magika_plan: Path) -> None:
    errors = fault("illegal", magika_plan)
    gpu.note("faults", f"illegal access: {errors['first']['error']}: {errors['first']['text']}")
    again = errors["again"]["text"] or "a batch ran"
    gpu.note("faults", f"opened again in the same process: {again}; exit status {errors['status']}")
    assert errors["before"]["error"] == ""
    assert "EngineDeadError" in (errors["first"]["error"], errors["second"]["error"])
    assert errors["second"]["error"] == "EngineDeadError"


def test_no_memory_at_load_is_a_clear_error(magika_plan: Path) -> None:
    errors = fault("memory", magika_plan)
    gpu.note("faults", f"no memory left: {errors['full']['text']}")
    assert errors["full"]["error"] == "EngineLoadError"
    assert "memory" in errors["full"]["text"]
    assert errors["after"]["error"] == ""
    assert errors["status"] == 0
