"""The tier itself: the cache, processes of their own, and where it cannot be had."""

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


def test_a_process_of_its_own_has_fake_gpus_and_tells_what_broke_a_rule(tmp_path: Path) -> None:
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


def test_what_is_there_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    require_fake_gpu()
    monkeypatch.setattr(build, "run", lambda *_: pytest.fail("it builds"))
    assert build.build().library.is_file()


def test_what_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise build.CannotBuildError("no")

    with pytest.raises(build.CannotBuildError):
        build.once("thing", fail)
    assert [path.name for path in build.cache_folder().iterdir()] == ["thing.lock"]
    made = build.once("thing", lambda folder: (folder / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_headers_the_tier_is_skipped_and_under_ci_it_fails(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(gpu_tier, "_fake_gpu", lambda: (None, "no fake GPU here: needs CUDA's headers"))
    with pytest.raises(outcome, match="needs CUDA's headers"):
        require_fake_gpu()


def test_every_entry_point_is_generated_and_none_is_made_up(tmp_path: Path) -> None:
    require_fake_gpu()
    include = build.cuda_root() / "include"
    text = generate(include, list(build.SOURCES))
    for name in ("cuMemAlloc_v2", "cuMemAlloc", "cuLaunchKernel", "cuProfilerStart", "cuGetProcAddress_v2"):
        assert f"CUresult {name}(" in text or f'__asm__("{name}")' in text
    wrong = tmp_path / "wrong.c"
    wrong.write_text("CUresult fake_cuNoSuchCall(int x) {\n}\n")
    with pytest.raises(ValueError, match="declares no cuNoSuchCall"):
        generate(include, [wrong])
