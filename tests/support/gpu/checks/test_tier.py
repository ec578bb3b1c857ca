"""The fake GPU's set-up: the cache, new processes, and machines that cannot build it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gpu import tier as gpu_tier
from tests.support.gpu.fakecuda import build
from tests.support.gpu.fakecuda.generate import generate
from tests.support.gpu.tier import environment, require_fake_gpu

PROGRAM = """
import pycuda.driver as cuda
import tensorrt
cuda.init()
context = cuda.Device(1).retain_primary_context()
context.push()
print(tensorrt.__version__, cuda.Device(1).name(), hasattr(tensorrt.DataType, "FP4"))
try:
    cuda.Event().synchronize()
except cuda.LaunchError as error:
    print(error)
try:
    cuda.Stream()
except cuda.LaunchError as error:
    print(error)
context.detach()
"""


def test_a_new_process_has_fake_gpus_and_reports_broken_rules(tmp_path: Path) -> None:
    report = tmp_path / "report"
    environ = environment("10.0", report=report, inject=[("cuEventSynchronize", 719, 1)], threaded=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "10.0.1 Fake GPU 1 False",
        "cuEventSynchronize failed: unspecified launch failure",
        "cuStreamCreate failed: unspecified launch failure",
    ], done.stderr
    assert report.read_text() == "cuStreamCreate: called after sticky error 719\n"


def test_cached_results_are_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    require_fake_gpu()
    monkeypatch.setattr(build, "run", lambda *_: pytest.fail("it builds"))
    assert build.build().library.is_file()


def test_a_failed_build_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise build.CannotBuildError("no")

    with pytest.raises(build.CannotBuildError):
        build.once("thing", fail)
    assert [path.name for path in build.cache_folder().iterdir()] == ["thing.lock"]
    created = build.once("thing", lambda folder: (folder / "whole").touch())
    assert [path.name for path in created.iterdir()] == ["whole"]


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_headers_the_tier_is_skipped_and_under_ci_it_fails(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(gpu_tier, "_fake_gpu", lambda: (None, "no fake GPU here: needs CUDA's headers"))
    with pytest.raises(outcome, match="needs CUDA's headers"):
        require_fake_gpu()


def test_exactly_the_declared_entry_points_are_generated(tmp_path: Path) -> None:
    require_fake_gpu()
    include = build.cuda_root() / "include"
    text = generate(include, list(build.SOURCES))
    for name in ("cuMemAlloc_v2", "cuMemAlloc", "cuLaunchKernel", "cuProfilerStart", "cuGetProcAddress_v2"):
        assert f"CUresult {name}(" in text or f'__asm__("{name}")' in text
    wrong = tmp_path / "wrong.c"
    wrong.write_text("CUresult fake_cuNoSuchCall(int x) {\n}\n")
    with pytest.raises(ValueError, match="declares no cuNoSuchCall"):
        generate(include, [wrong])
