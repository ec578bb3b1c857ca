"""Compare the builder's stand-ins with the real builder of TensorRT for RTX."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from tests.support.gpu.tier import require_fake_gpu
from tests.support.models import models

Shape = tuple[int, ...]


def _stand_in() -> Any:
    require_fake_gpu()
    return importlib.import_module("tensorrt")


def _real() -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings", reason="needs tensorrt-rtx-cu13-bindings and -libs")


class Build:
    """One build with a module, with its log and progress."""

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.errors: list[str] = []
        errors = self.errors

        class Logger(trt.ILogger):  # type: ignore[misc]  # its base is known at run time only
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in {trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR}:
                    errors.append(msg)

        self.logger = Logger()
        self.builder = trt.Builder(self.logger)
        typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self.network = self.builder.create_network(1 << int(typed))
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.config = self.builder.create_builder_config()

    def profile(self, name: str, *shapes: Shape) -> Any:
        profile = self.builder.create_optimization_profile()
        profile.set_shape(name, *shapes)
        return profile

    def serialized(self) -> bytes | None:
        plan = self.builder.build_serialized_network(self.network, self.config)
        return None if plan is None else bytes(plan)

    def watch(self, step: Callable[[str], bool]) -> list[tuple[str, str]]:
        """Let `step` decide if the build goes on; the returned list receives (event, phase)."""
        events: list[tuple[str, str]] = []
        base = self.trt.IProgressMonitor

        class Monitor(base):  # type: ignore[misc, valid-type]  # as above
            def __init__(self) -> None:
                base.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                events.append(("start" if parent_phase else "outermost", phase_name))

            def step_complete(self, phase_name: str, step_number: int) -> bool:
                events.append(("step", phase_name))
                return step(phase_name)

            def phase_finish(self, phase_name: str) -> None:
                events.append(("finish", phase_name))

        self.monitor = self.config.progress_monitor = Monitor()
        return events


@pytest.fixture(params=["stand-in", "real"])
def build(request: pytest.FixtureRequest) -> Build:
    return Build(_stand_in() if request.param == "stand-in" else _real())


def test_a_parsed_network_has_the_models_inputs_and_outputs(build: Build) -> None:
    assert build.parser.parse(models.negate())
    assert build.parser.num_errors == 0
    assert (build.network.num_inputs, build.network.num_outputs) == (1, 1)
    tensor = build.network.get_input(0)
    assert (tensor.name, tuple(tensor.shape), tensor.is_shape_tensor) == ("x", (-1, 3), False)


def test_a_missing_file_is_not_parsed(build: Build, tmp_path: Path) -> None:
    assert build.parser.parse_from_file(models.write(tmp_path, models.negate()))
    assert not Build(build.trt).parser.parse_from_file(str(tmp_path / "none.onnx"))


def test_an_operator_that_is_not_supported_is_named(build: Build) -> None:
    node = helper.make_node("BitShift", ["x", "x"], ["y"], name="shift", direction="LEFT")
    shape = ("batch", 3)
    model = models.model([node], [("x", TensorProto.UINT8, shape)], [("y", TensorProto.UINT8, shape)])
    assert not build.parser.parse(model)
    error = build.parser.get_error(build.parser.num_errors - 1)
    assert (error.node_operator(), error.node_name(), error.node()) == ("BitShift", "shift", 0)
    assert str(error.code()).rpartition(".")[2].startswith("UNSUPPORTED_NODE")


def test_a_model_builds_with_a_profile(build: Build) -> None:
    build.parser.parse(models.negate())
    profile = build.profile("x", (1, 3), (4, 3), (8, 3))
    assert profile
    assert [tuple(shape) for shape in profile.get_shape("x")] == [(1, 3), (4, 3), (8, 3)]
    assert build.config.add_optimization_profile(profile) == 0
    assert build.config.add_optimization_profile(build.profile("x", (1, 3), (1, 3), (1, 3))) == 1
    assert build.config.num_optimization_profiles == 2
    assert build.serialized()
    assert build.errors == []


def test_a_dynamic_model_does_not_build_without_a_profile(build: Build) -> None:
    build.parser.parse(models.negate())
    assert build.serialized() is None
    assert "no optimization profile has been defined" in " ".join(build.errors)


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (((1, 3), (4, 3), (8, 3)), "other"),  # any name is accepted, and only the build fails
        (((1, 4), (4, 4), (8, 4)), "x"),  # an axis that is fixed in the model
        (((1,), (4,), (8,)), "x"),  # too few axes
    ],
)
def test_a_model_does_not_build_with_a_profile_that_does_not_fit(
    build: Build, shapes: tuple[Shape, ...], name: str
) -> None:
    build.parser.parse(models.negate())
    build.config.add_optimization_profile(build.profile(name, *shapes))
    assert build.serialized() is None
    assert build.errors


def test_a_profile_out_of_order_is_false_and_is_not_added(build: Build) -> None:
    build.parser.parse(models.negate())
    profile = build.profile("x", (4, 3), (1, 3), (8, 3))
    assert not profile
    assert build.config.add_optimization_profile(profile) == -1


def test_a_smallest_batch_of_zero_is_accepted(build: Build) -> None:
    assert build.profile("x", (0, 3), (4, 3), (8, 3))


def test_a_model_without_dynamic_axes_needs_no_profile(build: Build) -> None:
    build.parser.parse(models.negate(batch=2))
    assert build.serialized()


def test_a_monitor_receives_nested_phases(build: Build) -> None:
    build.parser.parse(models.negate(batch=2))
    events = build.watch(lambda _phase: True)
    assert build.serialized()
    outermost = next(phase for event, phase in events if event == "outermost")
    assert ("finish", outermost) in events
    assert ("step", outermost) in events
    assert any(event == "start" for event, _ in events)


def test_a_monitor_can_end_a_build(build: Build) -> None:
    build.parser.parse(models.negate(batch=2))
    build.watch(lambda _phase: False)
    assert build.serialized() is None


def test_timings_of_another_version_do_not_fit() -> None:
    build = Build(_stand_in())
    build.parser.parse(models.negate(batch=2))
    assert build.config.set_timing_cache(build.config.create_timing_cache(b""), False)
    build.serialized()
    kept = bytes(build.config.get_timing_cache().serialize())
    versions: Any = importlib.import_module("tensorrt.versions")
    again = Build(build.trt)
    assert again.config.set_timing_cache(again.config.create_timing_cache(kept), False)
    versions.use("11.4")
    try:
        later = Build(build.trt)
        assert not later.config.set_timing_cache(later.config.create_timing_cache(kept), False)
        assert later.config.set_timing_cache(later.config.create_timing_cache(kept), True)
    finally:
        versions.use()
