"""Builds with the stand-ins of TensorRT 10.0, 10.16 and 11.4, and from a file to an engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import gpu
from cobatch.engines.errors import EngineLoadError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.engines.tensorrt.api import load_tensorrt
from cobatch.engines.tensorrt.plans import build as building
from cobatch.engines.tensorrt.plans.build import build
from cobatch.engines.tensorrt.plans.cache import built_plan, given_plan, plan_source
from cobatch.engines.tensorrt.plans.manifest import (
    BuildOptions,
    Machine,
    mismatch,
    read_manifest,
    this_machine,
)
from cobatch.server.cli import app
from tests.support.gpu.fakecuda.control import FakeCuda
from tests.support.gpu.tier import environment, require_fake_gpu
from tests.support.http.process import Cobatch
from tests.support.models import models
from tests.support.models.plan_models import unsupported

VERSIONS = ("10.0.1", "10.16.1.11", "11.4.0.106")


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    fake = require_fake_gpu()
    load_tensorrt().trt.versions.use(None)
    yield fake
    load_tensorrt().trt.versions.use(None)
    assert fake.violations() == []


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, fake: FakeCuda) -> str:
    use(request.param)
    return str(request.param)


def use(version: str) -> None:
    load_tensorrt().trt.versions.use(version)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(models.write(tmp_path, models.negate()))


def settings_in(plan: bytes) -> dict[str, Any]:
    """Return the builder's settings, from the second line of a stand-in's plan."""
    answer: dict[str, Any] = json.loads(plan.split(b"\n", 2)[1])
    return answer


def test_every_option_reaches_the_builder(
    version: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = settings_in(build(model, BuildOptions()).plan)
    assert plain["profiles"] == [{"x": [[1, 3], [64, 3], [64, 3]]}]
    assert not plain["hardware_compatible"]
    assert not plain["version_compatible"]
    options = BuildOptions(
        profiles=("1/2/4", "4/8/16"),
        workspace_mb=16,
        timing_cache=tmp_path / "timings",
        hardware_compatible=True,
        version_compatible=True,
    )
    everything = settings_in(build(model, options).plan)
    assert everything["profiles"] == [{"x": [[1, 3], [2, 3], [4, 3]]}, {"x": [[4, 3], [8, 3], [16, 3]]}]
    assert everything["hardware_compatible"]
    assert everything["version_compatible"]
    assert everything["version"] == version
    # A flag's number that this version lacks would be an error in the log.
    assert caplog.records == []


def test_timings_are_reused_unless_they_are_of_another_gpu(
    version: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timings = tmp_path / "timings"
    options = BuildOptions(timing_cache=timings)
    build(model, options)
    kept = timings.read_bytes()
    assert version.encode() in kept
    build(model, options)
    assert caplog.records == []
    timings.write_bytes(b"another GPU's")
    build(model, options)
    assert timings.read_bytes() == kept
    assert "does not fit" in caplog.text
    timings.unlink()
    timings.mkdir()
    with pytest.raises(EngineLoadError, match="cannot read the timing cache"):
        build(model, options)


def test_the_parsers_errors(version: str, tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError) as refused:
        build(Path(models.write(tmp_path, unsupported())), BuildOptions())
    assert "node 'blocks.0/det' (Det): unsupported node: No importer registered for op: Det" in str(
        refused.value
    )


def test_a_builder_that_cannot_be_created(
    model: Path, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = load_tensorrt().trt

    def nothing(logger: Any) -> None:
        logger.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Builder", nothing)
    with pytest.raises(
        EngineLoadError, match="cannot build here: CUDA initialization failure with error: 35"
    ):
        build(model, BuildOptions())


def test_the_driver_describes_this_machine(version: str) -> None:
    runtime = load_tensorrt()
    assert this_machine(runtime) == Machine("tensorrt", version, "Fake GPU 0", "9.0")
    assert this_machine(runtime, 1).gpu == "Fake GPU 1"
    with pytest.raises(EngineLoadError, match="there is no GPU 2"):
        this_machine(runtime, 2)


def test_served_models_share_timings(version: str, model: Path, tmp_path: Path) -> None:
    folder, machine = tmp_path / "plans", this_machine(load_tensorrt())
    source = plan_source(model, BuildOptions(), folder)
    source()
    (timings,) = folder.glob("timings-*")
    first = timings.read_bytes()
    timings.write_bytes(first + b"older")
    built_plan(model, BuildOptions(max_batch_size=3), machine, folder)
    assert list(folder.glob("timings-*")) == [timings]
    assert timings.read_bytes() == first, "read, and written again"


@pytest.mark.parametrize(("flag", "runs"), [("--version-compatible", True), ("--hardware-compatible", False)])
def test_a_plan_of_10_on_11(fake: FakeCuda, model: Path, tmp_path: Path, flag: str, runs: bool) -> None:
    """Load the plan from a folder without its model, so that it cannot be rebuilt."""
    use("10.16")
    plan = tmp_path / "apart" / "m.plan"
    plan.parent.mkdir()
    built = CliRunner().invoke(app, ["build", str(model), "-o", str(plan), flag])
    assert built.exit_code == 0, built.output
    use("11.4")
    machine, manifest = this_machine(load_tensorrt()), read_manifest(plan)
    assert manifest is not None
    assert (mismatch(manifest, machine) is None) == runs
    why = mismatch(manifest, dataclasses.replace(machine, runtime="tensorrt-lean"))
    assert why is None if runs else why and "version-compatible plans only" in why
    if runs:
        assert given_plan(plan, machine) == plan.read_bytes()
        return
    with pytest.raises(
        EngineLoadError, match=r"was built with tensorrt 10\.16\.1\.11, but this is 11\.4\.0\.106"
    ):
        load_and_run(plan, EngineOptions())


def load_and_run(path: Path, options: EngineOptions) -> None:
    engine = load_engine("tensorrt", path, 8, options)
    try:
        engine.open()
        x = np.arange(9, dtype=np.float32).reshape(3, 3)
        (y,) = gpu.run(engine, [x])
        assert np.array_equal(y, -x)
    finally:
        engine.close()


def test_a_model_is_built_on_first_use_and_then_read_from_the_cache(
    version: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def counted(model: Path, *arguments: Any) -> Any:
        built.append(model)
        return build(model, *arguments)

    monkeypatch.setattr(building, "build", counted)
    options = EngineOptions(plan_cache=tmp_path / "plans")
    load_and_run(model, options)
    load_and_run(model, options)
    assert built == [model]
    # A GPU with another name is another machine: the name is part of the key.
    load_and_run(model, EngineOptions(plan_cache=tmp_path / "plans", device=1))
    assert built == [model, model]
    use("11.4" if version.startswith("10") else "10.16")
    load_and_run(model, options)
    assert built == [model] * 3


def test_a_version_compatible_plan_needs_the_operators_consent(
    fake: FakeCuda, model: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "m.plan"
    built = CliRunner().invoke(app, ["build", str(model), "-o", str(plan), "--version-compatible"])
    assert built.exit_code == 0, built.output
    load_and_run(plan, EngineOptions(plan_host_code=True))
    with pytest.raises(EngineLoadError):
        load_and_run(plan, EngineOptions())


def test_inspect_shows_the_tensors_of_a_plan(fake: FakeCuda, model: Path) -> None:
    plan = model.with_suffix(".plan")
    assert CliRunner().invoke(app, ["build", str(model), "--max-batch-size", "4"]).exit_code == 0
    shown = CliRunner().invoke(app, ["inspect", str(plan), "--json"])
    assert shown.exit_code == 0, shown.output
    described = json.loads(shown.stdout)
    assert (described["platform"], described["inputs"][0]["shape"]) == ("tensorrt_plan", [-1, 3])


def test_the_plans_bytes_are_checked_before_they_are_loaded(
    fake: FakeCuda, model: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "apart" / "m.plan"
    plan.parent.mkdir()
    assert CliRunner().invoke(app, ["build", str(model), "-o", str(plan)]).exit_code == 0
    plan.write_bytes(plan.read_bytes() + b" ")
    with pytest.raises(EngineLoadError, match="SHA-256"):
        plan_source(plan, BuildOptions())()


def test_serve_builds_on_first_use_and_then_reads_from_the_cache(
    fake: FakeCuda, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plans"
    arguments = (
        model,
        "--engine",
        "tensorrt",
        "--plan-cache",
        folder,
        "--max-batch-size",
        "8",
        "--port",
        "0",
    )
    for word in ("building a plan of", f"plan {folder}"):
        with Cobatch(tmp_path, *arguments, env=environment()) as server:
            connection = server.ready().connect()
            assert connection.infer("model", [[1.0, 2.0, 3.0]]).rows == [[-1.0, -2.0, -3.0]]
            assert server.stop() == 0, server.stderr
        assert word in server.stderr
    assert "building" not in server.stderr
    assert folder.stat().st_mode & 0o777 == 0o700
