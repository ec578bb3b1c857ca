"""Real builds with TensorRT for RTX on the CPU, and the errors of builds that fail."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from onnx import TensorProto

from cobatch.engines.errors import EngineLoadError
from cobatch.engines.tensorrt.api import load_tensorrt
from cobatch.engines.tensorrt.diagnostics import make_log
from cobatch.engines.tensorrt.plans import build as building
from cobatch.engines.tensorrt.plans.build import Built, Phases, build, build_plan
from cobatch.engines.tensorrt.plans.manifest import BuildOptions
from cobatch.engines.tensorrt.plans.profiles import as_spec, make_profiles
from tests.support.models import models
from tests.support.models.plan_models import RTX, convolution, magika_path, require_builder, unsupported

require_builder()


def built(model: Path | str, progress: Any = None, **options: Any) -> Built:
    return build(Path(model), BuildOptions(runtime=RTX, **options), progress)


def refusal(model: Path | str, **options: Any) -> str:
    with pytest.raises(EngineLoadError) as refused:
        built(model, **options)
    return str(refused.value)


def test_magika_builds_with_progress_from_0_to_1() -> None:
    seen: list[tuple[str, float]] = []

    def progress(phase: str, fraction: float) -> bool:
        seen.append((phase, fraction))
        return True

    result = built(magika_path(), progress, opt_batch_size=16)
    assert [as_spec(profile) for profile in result.profiles] == ["bytes:1x2048/16x2048/64x2048"]
    assert result.max_batch_size == 64
    assert len(result.plan) > 1_000_000
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert len({phase for phase, _ in seen}) > 3


def test_several_profiles_of_a_convolutional_model(tmp_path: Path) -> None:
    path = models.write(tmp_path, convolution())
    specs = ("image:1x3x32x32/8x3x64x64/16x3x64x64", "image:1x3x224x224/1x3x224x224/4x3x256x256")
    result = built(path, profiles=specs)
    assert tuple(as_spec(profile) for profile in result.profiles) == specs
    assert result.max_batch_size == 16
    one = built(path, profiles=specs[:1])
    assert len(result.plan) > len(one.plan)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_the_precision_is_that_of_the_model(tmp_path: Path, kind: int) -> None:
    path = models.write(tmp_path, convolution(height=32, width=32, kind=kind))
    assert build_plan(Path(path), BuildOptions(runtime=RTX))


def test_a_fixed_batch_needs_no_profile_and_takes_none(tmp_path: Path) -> None:
    path = models.write(tmp_path, convolution(4, 32, 32))
    result = built(path)
    assert (result.profiles, result.max_batch_size) == ((), 4)
    assert "every axis of the model's inputs is fixed" in refusal(path, profiles=("1/4/4",))


def test_a_dynamic_axis_besides_the_batch_needs_a_profile(tmp_path: Path) -> None:
    path = models.write(tmp_path, convolution(width=32))
    message = refusal(path)
    assert "input 'image' [?, 3, ?, 32] is dynamic in axis 2 too, not only in the batch" in message
    spec = message.rpartition("--profile ")[2]
    assert spec == "image:Nx3xNx32/Nx3xNx32/Nx3xNx32"
    assert built(path, profiles=(spec.replace("N", "8"),)).max_batch_size == 8


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "image:9x3x32x32/8x3x32x32/64x3x32x32",
            "axis 0 of input 'image': min 9, opt 8, max 64 are not in asc",
        ),
        (
            "image:1x3x32x32/8x3x32x32/4x3x32x32",
            "axis 0 of input 'image': min 1, opt 8, max 4 are not in asc",
        ),
        ("images:1x3x32x32/8x3x32x32/64x3x32x32", "the model has no input 'images'; did you mean 'image'?"),
        ("q:1x3x32x32/8x3x32x32/64x3x32x32", "the model has no input 'q'; it has 'image'"),
        ("image:1x3x32/8x3x32/64x3x32", "min of input 'image' has 3 axes, but the model's is [?, 3, ?, ?]"),
        ("image:1x4x32x32/8x4x32x32/64x4x32x32", "axis 1 of input 'image' is fixed at 3, not 4/4/4"),
        ("image:0x3x32x32/8x3x32x32/64x3x32x32", "axis 0 of input 'image': min must be at least 1"),
        ("image:1x3x32x32/8x3x32x32", "expected MIN/OPT/MAX rows"),
        ("image:1x3x32x32/8x3x32x32/64x3x32x32,", "expected MIN/OPT/MAX rows"),
        ("1/8", "expected MIN/OPT/MAX rows"),
        ("", "expected MIN/OPT/MAX rows"),
    ],
)
def test_a_bad_profile_is_refused_before_it_is_built(tmp_path: Path, spec: str, words: str) -> None:
    message = refusal(models.write(tmp_path, convolution()), profiles=(spec,))
    assert message.startswith(f"profile {spec!r}: ")
    assert words in message


def test_profiles_of_several_inputs() -> None:
    inputs = {"ids:0": (-1, -1), "mask": (-1, -1), "table": (4, 4)}
    spec = "ids:0:1x16/8x64/64x512,mask:1x16/8x64/64x512"
    (profile,) = make_profiles((spec,), inputs, 64, None)
    assert as_spec(profile) == spec
    for bad, words in (
        ("ids:0:1x16/8x64/64x512", "input 'mask' [?, ?] is missing"),
        ("ids:0:1x1/2x1/4x1,ids:0:1x1/3x1/4x1", "input 'ids:0' is given twice"),
    ):
        with pytest.raises(EngineLoadError) as refused:
            make_profiles((bad,), inputs, 64, None)
        assert words in str(refused.value)
    with pytest.raises(EngineLoadError, match="opt batch size 65 is not within 1 and the max batch size 64"):
        make_profiles((), {"x": (-1, 3)}, 64, 65)


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ({"other": ((1, 2048), (8, 2048), (64, 2048))}, "Dynamic input tensor bytes is missing dimensions"),
        ({"bytes": ((9, 2048), (8, 2048), (64, 2048))}, "satisfy MIN<=OPT<=MAX"),
        ({"bytes": ((1, 5), (8, 5), (64, 5))}, "Dimension mismatch for tensor bytes and profile 0"),
    ],
)
def test_tensorrts_own_reason_against_a_profile_is_in_the_error(
    monkeypatch: pytest.MonkeyPatch, ranges: Any, reason: str
) -> None:
    monkeypatch.setattr(building, "make_profiles", lambda *_: [ranges])
    assert reason in refusal(magika_path())


def test_the_error_of_a_failed_build_quotes_the_log() -> None:
    assert "no tactics to implement the operation within workspace limit" in refusal(
        magika_path(), workspace_mb=1
    )


def test_an_unsupported_operator_is_named_with_its_node(tmp_path: Path) -> None:
    message = refusal(models.write(tmp_path, unsupported()))
    assert "node 'blocks.0/det' (Det): unsupported node" in message


def test_strings_are_refused_by_name(tmp_path: Path) -> None:
    message = refusal(models.write(tmp_path, models.identity(TensorProto.STRING)))
    assert "cannot parse" in message
    assert "Failed to convert" in message


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x09"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "cannot parse" in refusal(models.write(tmp_path, content))


def test_a_build_can_be_cancelled_and_another_begun() -> None:
    with pytest.raises(EngineLoadError, match="the build was cancelled"):
        built(magika_path(), lambda _phase, fraction: fraction < 0.1)
    assert built(magika_path()).plan


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_of_progress_ends_the_build_not_the_process(error: type[BaseException]) -> None:
    calls = 0

    def progress(_phase: str, _fraction: float) -> bool:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(error):
        built(magika_path(), progress)
    assert calls == 1


def test_options_that_this_runtime_lacks_are_refused_by_name(tmp_path: Path) -> None:
    assert "tensorrt-rtx has no timing cache" in refusal(magika_path(), timing_cache=tmp_path / "timings")
    assert "libnvinfer_lean" in refusal(magika_path(), version_compatible=True)


def test_flags_are_listed_by_name() -> None:
    assert BuildOptions().flags == ()
    assert BuildOptions(hardware_compatible=True, version_compatible=True).flags == (
        "AMPERE_PLUS",
        "VERSION_COMPATIBLE",
    )
    assert BuildOptions(runtime=RTX).flags == ("AMPERE_PLUS",)


def test_nested_phases_fill_the_step_of_their_parent() -> None:
    phases = Phases()
    assert phases.start("all", None, 2) == 0
    assert phases.start("half", "all", 4) == 0
    assert phases.step("half", 0) == 1 / 8
    assert phases.step("half", 1) == 2 / 8
    # It ends early and is entered again; the fraction does not fall.
    assert phases.finish("half") == 1 / 2
    assert phases.start("half", "all", 4) == 1 / 2
    assert phases.step("all", 0) == 1 / 2
    assert phases.start("second", "all", 1) == 1 / 2
    assert phases.step("never begun", 3) == 1 / 2
    assert phases.finish("all") == 1


def test_the_log_keeps_the_last_errors(caplog: pytest.LogCaptureFixture) -> None:
    trt = load_tensorrt(RTX).trt
    kept = make_log(trt)
    severity = trt.ILogger.Severity
    with caplog.at_level(logging.WARNING, "cobatch.tensorrt"):
        kept.logger.log(severity.WARNING, "only a warning")
        kept.logger.log(severity.INTERNAL_ERROR, "first\n  of many")
    assert kept.reason("none") == "first of many"
    for number in range(40):
        message = f"error {number}"
        kept.logger.log(severity.ERROR, message)
    assert kept.take() == [f"error {number}" for number in range(24, 40)]
    assert kept.reason("none") == "none"
    assert [record.levelname for record in caplog.records[:2]] == ["WARNING", "ERROR"]
    kept.logger.log(severity.ERROR, object())  # an object that is no string must not raise


def on_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_errors_go_to_the_log_of_their_thread_or_to_builds() -> None:
    trt = load_tensorrt(RTX).trt
    mine, building_log, errors = make_log(trt), make_log(trt, threads=True), []
    builder = trt.Builder(mine.logger)  # while it exists, TensorRT uses no other logger

    def fail_elsewhere() -> None:
        with pytest.raises(EngineLoadError) as refused:
            built(magika_path(), workspace_mb=1)
        errors.append(str(refused.value))

    on_a_thread(fail_elsewhere)
    assert "within workspace limit" in errors[0]
    assert mine.take() == []
    on_a_thread(lambda: mine.logger.log(trt.ILogger.Severity.ERROR, "from within"))
    assert mine.take() == []
    assert building_log.take() == ["from within"]
    del builder


def test_the_lean_runtime_builds_nothing() -> None:
    with pytest.raises(EngineLoadError, match="tensorrt-lean builds no plans"):
        build(magika_path(), BuildOptions(runtime="tensorrt-lean"))


def test_a_missing_broken_or_old_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineLoadError, match=r"not installed; pip install 'cobatch\[tensorrt\]'"):
        load_tensorrt()
    old = ModuleType("tensorrt")
    old.__dict__["__version__"] = "8.6.1"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(EngineLoadError, match=r"tensorrt 8\.6\.1 is too old; 10 or newer is needed"):
        load_tensorrt()
    with pytest.raises(EngineLoadError, match="expected one of tensorrt, tensorrt-lean, tensorrt-rtx"):
        load_tensorrt("openvino")
    assert load_tensorrt(RTX).flag("BuilderFlag", "FP16") is None
    assert load_tensorrt(RTX).flag("NoSuchEnum", "FP16") is None


def test_a_module_without_its_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EngineLoadError, match=r"libnvinfer\.so\.11: cannot open shared object"):
        load_tensorrt()
