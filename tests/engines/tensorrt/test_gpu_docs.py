"""docs/gpu.md, deploy/Dockerfile.gpu and scripts/gpu-check, as far as they can be checked without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from inspect import signature
from pathlib import Path

import pytest
import typer

from cobatch.engines.loader import EngineOptions
from cobatch.server.cli.build import build
from cobatch.server.settings.schema import MODEL_FIELDS, env_name
from tests.support.paths import ROOT

DOCS = (ROOT / "docs" / "gpu.md").read_text()
DOCKERFILE = (ROOT / "deploy" / "Dockerfile.gpu").read_text()


def options_of_build() -> set[str]:
    app = typer.Typer(add_completion=False)
    app.command()(build)
    return {
        option
        for parameter in typer.main.get_command(app).params
        for option in parameter.opts
        if option.startswith("--") and option not in {"--output", "--help"}
    }


def test_all_flags_of_build_are_documented() -> None:
    documented = set(re.findall(r"^\| `(--[a-z-]+)", DOCS, re.MULTILINE))
    assert documented == options_of_build()
    assert len(signature(build).parameters) == len(documented) + 3  # typer's context, MODEL and -o


def test_all_settings_are_documented_by_name() -> None:
    documented = set(re.findall(r"^\| `(\w+) = ", DOCS, re.MULTILINE))
    others = {"engine", "devices", "instances"}
    of_python = {"name", "folder", "in_thread", "reload"}
    of_other_engines = {"threads", "device", "batching", "providers", "own"} | of_python
    mine = set(EngineOptions.__dataclass_fields__) - of_other_engines | others
    assert documented == mine
    assert documented <= set(MODEL_FIELDS)


def test_the_image_is_built_from_existing_files() -> None:
    for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
    (variable,) = re.findall(r"^ENV (COBATCH_\w+)=", DOCKERFILE, re.MULTILINE)
    assert variable in {env_name(setting) for setting in MODEL_FIELDS}
    (tag,) = re.findall(r"^ARG TAG=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert f"nvcr.io/nvidia/tensorrt:{tag}" in DOCS


@pytest.mark.slow
def test_the_image_has_all_files_that_the_package_is_built_from(tmp_path: Path) -> None:
    source, dist = tmp_path / "src", tmp_path / "dist"
    source.mkdir()
    for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
        for name in line.split():
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, symlinks=True)
            else:
                shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(dist), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = dist.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    for room in ("server", "batcher", "engines"):
        files = {f"cobatch/{path.relative_to(ROOT)}" for path in (ROOT / room).rglob("*.py")}
        assert files
        assert files <= packed


def test_the_script_runs_all_gpu_tests() -> None:
    script = (ROOT / "scripts" / "gpu-check").read_text()
    (listed,) = re.findall(r"^tests=\((.*)\)$", script, re.MULTILINE)
    mark = "pytest.mark." + "gpu"
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if mark in path.read_text()}
    assert {ROOT / path for path in listed.split()} == marked


def test_links_have_targets() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", DOCS):
        assert (ROOT / "docs" / target).is_file(), target


@pytest.mark.slow
def test_the_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    """Run it with only the programs on the path that it needs before nvidia-smi."""
    for tool in ("bash", "dirname", "env"):
        located = subprocess.run(
            ["sh", "-c", f"command -v {tool}"], capture_output=True, text=True, check=True
        )
        (tmp_path / tool).symlink_to(located.stdout.strip())
    done = subprocess.run(
        [ROOT / "scripts" / "gpu-check"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "cobatch: needs an NVIDIA GPU with its driver: there is no nvidia-smi here"
