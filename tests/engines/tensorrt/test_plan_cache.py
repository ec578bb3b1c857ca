"""Sources of plans: the cache folder, plans given by the operator, and their manifests."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cobatch.engines.errors import EngineLoadError
from cobatch.engines.tensorrt.api import load_tensorrt
from cobatch.engines.tensorrt.plans import build as building
from cobatch.engines.tensorrt.plans.build import build
from cobatch.engines.tensorrt.plans.cache import (
    PLAN_SUFFIXES,
    built_plan,
    default_folder,
    given_plan,
    plan_source,
)
from cobatch.engines.tensorrt.plans.manifest import (
    BuildOptions,
    Machine,
    Manifest,
    built,
    manifest_path,
    mismatch,
    model_digest,
    read_manifest,
    wanted,
    write_file,
    write_plan,
)
from tests.support.models import models
from tests.support.models.plan_models import RTX, require_builder, write_with_weights_apart

require_builder()

OPTIONS = BuildOptions(runtime=RTX, max_batch_size=8)
MACHINE = Machine(RTX, load_tensorrt(RTX).version, "Fake GPU", "8.9")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(models.write(tmp_path, models.negate()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "plans"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record the models that are built."""
    models: list[Path] = []

    def counted(model: Path, *arguments: Any) -> Any:
        models.append(model)
        return build(model, *arguments)

    monkeypatch.setattr(building, "build", counted)
    return models


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level("WARNING", "cobatch.tensorrt"):
        yield caplog


def plan_in(folder: Path) -> Path:
    (plan,) = folder.glob("*.plan")
    return plan


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_model_is_built_once_and_then_read_from_the_folder(
    model: Path, folder: Path, builds: list[Path]
) -> None:
    plan = built_plan(model, OPTIONS, MACHINE, folder)
    assert plan == plan_in(folder).read_bytes()
    assert built_plan(model, OPTIONS, MACHINE, folder) == plan
    assert builds == [model]
    manifest = read_manifest(plan_in(folder))
    assert manifest is not None
    assert (manifest.gpu, manifest.profiles, manifest.max_batch_size) == (
        "Fake GPU",
        ("x:1x3/8x3/8x3",),
        8,
    )


def test_only_the_owner_can_read_plans(model: Path, folder: Path) -> None:
    before = os.umask(0)
    try:
        built_plan(model, OPTIONS, MACHINE, folder)
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    assert {mode(path) for path in folder.iterdir()} == {0o600}
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock", ".plan"]


@pytest.mark.parametrize(
    "other",
    [
        {"options": dataclasses.replace(OPTIONS, max_batch_size=9)},
        {"options": dataclasses.replace(OPTIONS, opt_batch_size=4)},
        {"options": dataclasses.replace(OPTIONS, profiles=("1/2/8",))},
        {"options": dataclasses.replace(OPTIONS, workspace_mb=64)},
        {"machine": dataclasses.replace(MACHINE, gpu="Another GPU")},
        {"machine": dataclasses.replace(MACHINE, compute_capability="9.0")},
        {"machine": dataclasses.replace(MACHINE, version="1.0.0")},
    ],
)
def test_each_dependency_of_a_plan_changes_its_name(
    model: Path, folder: Path, builds: list[Path], other: dict[str, Any]
) -> None:
    built_plan(model, OPTIONS, MACHINE, folder)
    built_plan(model, other.get("options", OPTIONS), other.get("machine", MACHINE), folder)
    assert len(builds) == 2
    assert len(list(folder.glob("*.plan"))) == 2


def test_another_model_under_the_same_name_is_built(model: Path, folder: Path, builds: list[Path]) -> None:
    built_plan(model, OPTIONS, MACHINE, folder)
    models.write(model.parent, models.negate(width=4))
    built_plan(model, OPTIONS, MACHINE, folder)
    assert len(builds) == 2


@pytest.mark.parametrize("location", ["model.weights", "w" * 200 + ".weights"])
def test_external_weights_are_part_of_the_digest(
    tmp_path: Path, folder: Path, builds: list[Path], location: str
) -> None:
    digests = []
    for scale in (1.0, 2.0):
        model = write_with_weights_apart(tmp_path, scale, location)
        digests.append((model.read_bytes(), model_digest(model)))
        built_plan(model, OPTIONS, MACHINE, folder)
    (first, one), (second, two) = digests
    assert first == second
    assert one != two
    assert len(builds) == 2


def damage_plan(plan: Path) -> None:
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)


def lose_manifest(plan: Path) -> None:
    manifest_path(plan).unlink()


def cut_manifest(plan: Path) -> None:
    manifest_path(plan).write_bytes(manifest_path(plan).read_bytes()[:40])


def garble_manifest(plan: Path) -> None:
    path = manifest_path(plan)
    path.write_bytes(path.read_bytes().replace(b'256": "', b'256": "\xff'))


def empty_plan(plan: Path) -> None:
    plan.write_bytes(b"")


def forge_version(plan: Path) -> None:
    manifest = read_manifest(plan)
    assert manifest is not None
    write_plan(plan, plan.read_bytes(), dataclasses.replace(manifest, version="0.0.1"))


@pytest.mark.parametrize(
    "damage", [damage_plan, lose_manifest, cut_manifest, garble_manifest, empty_plan, forge_version]
)
def test_a_cached_plan_that_does_not_match_its_manifest_is_rebuilt(
    model: Path, folder: Path, builds: list[Path], warnings: pytest.LogCaptureFixture, damage: Any
) -> None:
    built_plan(model, OPTIONS, MACHINE, folder)
    damage(plan_in(folder))
    plan = built_plan(model, OPTIONS, MACHINE, folder)
    assert len(builds) == 2
    assert "rebuilt" in warnings.records[0].getMessage()
    assert built_plan(model, OPTIONS, MACHINE, folder) == plan
    assert len(builds) == 2


def test_a_folder_that_others_can_write_to_is_refused(model: Path, folder: Path, builds: list[Path]) -> None:
    for loose in (0o720, 0o702):
        folder.mkdir(exist_ok=True)
        folder.chmod(loose)
        with pytest.raises(
            EngineLoadError, match=r"others can write to the plan cache .*, and a plan is executable code"
        ):
            built_plan(model, OPTIONS, MACHINE, folder)
    assert builds == []


def test_without_a_folder_the_model_is_built_and_served(
    model: Path, tmp_path: Path, builds: list[Path], warnings: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert built_plan(model, OPTIONS, MACHINE, tmp_path / "file" / "plans")
    assert builds == [model]
    assert "plans are not cached" in warnings.records[0].getMessage()


def test_a_full_disk_means_that_the_next_start_builds_again(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cobatch.engines.tensorrt.plans.manifest.write_file", full)
    assert built_plan(model, OPTIONS, MACHINE, folder)
    assert "cannot store the plan" in warnings.records[0].getMessage()
    assert list(folder.glob("*.plan")) == []


def test_a_failed_write_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()

    def interrupted(_: Path, __: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(folder / "x.plan", b"plan")
    assert list(folder.iterdir()) == []


def test_two_concurrent_processes_build_once(model: Path, folder: Path) -> None:
    folder.mkdir(mode=0o700)
    plan = folder / f"model-{wanted(model, MACHINE, OPTIONS).key}.plan"
    program = (
        "import logging, sys, tests.engines.tensorrt.test_plan_cache as t\n"
        "logging.basicConfig(level='INFO', stream=sys.stdout, format='%(message)s')\n"
        "from pathlib import Path\n"
        "print('begun', flush=True)\n"
        f"t.built_plan(Path({str(model)!r}), t.OPTIONS, t.MACHINE, Path({str(folder)!r}))\n"
    )
    # Both are held before the second looks for a cached plan.
    with plan.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = [
            subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
        assert not plan.exists()
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum("building a plan of" in text for text in outputs) == 1, outputs
    assert sum(f"plan {plan}\n" in text for text in outputs) == 1, outputs


def made_plan(model: Path, plan: Path, machine: Machine = MACHINE, **changed: Any) -> bytes:
    """Write a plan as `cobatch build -o` does, as if on another machine."""
    result = build(model, OPTIONS)
    manifest = built(wanted(model, machine, OPTIONS), result.plan, result.profiles, result.max_batch_size)
    write_plan(plan, result.plan, dataclasses.replace(manifest, **changed))
    return result.plan


def test_a_plan_that_fits_is_loaded(model: Path, tmp_path: Path, builds: list[Path]) -> None:
    plan = tmp_path / "ready.plan"
    content = made_plan(model, plan)
    assert given_plan(plan, MACHINE) == content
    assert builds == []


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"version": "1.0.0"}, f"it was built with tensorrt-rtx 1.0.0, but this is {MACHINE.version}"),
        ({"runtime": "tensorrt"}, "it was built with tensorrt, but tensorrt-rtx is configured"),
        (
            {"flags": (), "gpu": "NVIDIA A10", "compute_capability": "8.6"},
            "it was built for NVIDIA A10 (compute capability 8.6), but this is Fake GPU (8.9)",
        ),
        ({"plan_sha256": "0" * 64}, "its SHA-256 is not that of its manifest"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_the_reason(
    model: Path, tmp_path: Path, changed: dict[str, Any], why: str
) -> None:
    plan = tmp_path / "ready.plan"
    made_plan(model, plan, **changed)
    with pytest.raises(EngineLoadError) as refused:
        given_plan(plan, MACHINE)
    assert f"{plan} cannot be used: {why}" in str(refused.value)
    assert "`cobatch build`" in str(refused.value)


def test_a_plan_that_does_not_fit_is_rebuilt_from_the_model_beside_it(
    model: Path, folder: Path, builds: list[Path], warnings: pytest.LogCaptureFixture
) -> None:
    plan = model.with_suffix(".plan")
    made_plan(model, plan, version="1.0.0")
    anew = given_plan(plan, MACHINE, folder)
    assert builds == [model]
    assert anew == plan_in(folder).read_bytes()
    manifest = read_manifest(plan_in(folder))
    assert manifest is not None
    assert manifest.profiles == ("x:1x3/8x3/8x3",)
    assert "is rebuilt from" in warnings.records[0].getMessage()
    # Another model with the same name is not used.
    models.write(model.parent, models.negate(width=4))
    with pytest.raises(EngineLoadError, match="cannot be used"):
        given_plan(plan, MACHINE, folder)


def test_a_plan_without_a_manifest_is_loaded_with_a_warning(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    plan = tmp_path / "trtexec.engine"
    plan.write_bytes(b"anything")
    assert given_plan(plan, MACHINE) == b"anything"
    assert "has no manifest" in warnings.records[0].getMessage()


def test_a_plan_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"cannot read .*gone\.plan: No such file"):
        given_plan(tmp_path / "gone.plan", MACHINE)
    (tmp_path / "x.plan").write_bytes(b"plan")
    for manifest in (b"{}", b'{"model_sha256": "\xff"}'):
        (tmp_path / "x.plan.json").write_bytes(manifest)
        with pytest.raises(EngineLoadError, match=r"x\.plan\.json is not a plan's manifest"):
            given_plan(tmp_path / "x.plan", MACHINE)
    with pytest.raises(EngineLoadError, match="No such file"):
        model_digest(tmp_path / "gone.onnx")


def test_the_plan_source_of_an_engine(
    model: Path, folder: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[int] = []

    def identity(runtime: Any, device: int) -> Machine:
        devices.append(device)
        return MACHINE

    monkeypatch.setattr("cobatch.engines.tensorrt.plans.manifest.this_machine", identity)
    source = plan_source(model, OPTIONS, folder, device=1)
    assert (builds, devices) == ([], [])  # creating it does nothing yet
    plan = source()
    assert (builds, devices) == ([model], [1])
    for suffix in PLAN_SUFFIXES:
        named = model.parent / f"named{suffix}"
        write_plan(named, plan, read_manifest(plan_in(folder)) or pytest.fail("no manifest"))
        assert plan_source(named, OPTIONS, folder)() == plan


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "cobatch" / "plans"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert default_folder() == Path.home() / ".cache" / "cobatch" / "plans"


PLAIN = Manifest("m", "tensorrt", "10.13.3", "NVIDIA H100", "9.0", 64, None, ("1/64/64",), (), "p")
HERE = Machine("tensorrt", "10.13.3", "NVIDIA H100", "9.0")


@pytest.mark.parametrize(
    ("built_by", "flags", "here", "runs"),
    [
        ("10.13.3", (), "10.13.3", True),
        ("10.13.3", (), "10.13.4", False),
        ("10.13.3", ("VERSION_COMPATIBLE",), "10.14.0", True),
        ("10.13.3", ("VERSION_COMPATIBLE",), "10.9.0", False),
        ("10.13.3", ("VERSION_COMPATIBLE",), "11.4.0", True),
        ("11.0.0", ("VERSION_COMPATIBLE",), "11.4.0", True),
        ("11.0.0", ("VERSION_COMPATIBLE",), "10.16.0", False),
        ("11.0.0", ("VERSION_COMPATIBLE",), "12.0.0", False),
    ],
)
def test_versions_that_run_a_plan(built_by: str, flags: tuple[str, ...], here: str, runs: bool) -> None:
    manifest = dataclasses.replace(PLAIN, version=built_by, flags=flags)
    why = mismatch(manifest, dataclasses.replace(HERE, version=here))
    assert why == (None if runs else f"it was built with tensorrt {built_by}, but this is {here}")


@pytest.mark.parametrize(
    ("flags", "gpu", "capability", "runs"),
    [
        ((), "NVIDIA H100", "9.0", True),
        ((), "NVIDIA H200", "9.0", False),
        ((), "NVIDIA H100", "8.9", False),
        (("AMPERE_PLUS",), "NVIDIA A100", "8.0", True),
        (("AMPERE_PLUS",), "NVIDIA B200", "10.0", True),
        (("AMPERE_PLUS",), "Tesla T4", "7.5", False),
        (("AMPERE_PLUS",), "none", "none", True),  # no GPU to compare with; loading checks it
    ],
)
def test_gpus_that_run_a_plan(flags: tuple[str, ...], gpu: str, capability: str, runs: bool) -> None:
    machine = dataclasses.replace(HERE, gpu=gpu, compute_capability=capability)
    why = mismatch(dataclasses.replace(PLAIN, flags=flags), machine)
    assert (why is None) == runs
    assert runs or (why is not None and gpu in why)
