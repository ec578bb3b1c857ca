"""The built distributions: one import name, each module once, and a server beside hostile modules."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cobatch
from tests.support.http.process import Cobatch
from tests.support.models import models
from tests.support.paths import ROOT

ROOMS = {"server", "batcher", "engines"}
INSTALLED = {"cobatch", f"cobatch-{cobatch.__version__}.dist-info"}
# In the environment of the installed package: hides the packages that it does not depend on, without extras.
ONLY_DEPENDENCIES = """
import sys
from importlib.metadata import packages_distributions, requires
from packaging.requirements import Requirement

needed, open_ = set(), ["cobatch"]
while open_:
    name = open_.pop().lower().replace("_", "-")
    base, _, extras = name.partition("[")
    if name not in needed:
        needed |= {name, base}
        for text in requires(base) or ():
            one = Requirement(text)
            if one.marker is None or any(
                one.marker.evaluate({"extra": extra}) for extra in ["", *extras.rstrip("]").split(",")]
            ):
                open_ += [one.name, *(f"{one.name}[{extra}]" for extra in one.extras)]
hidden = {
    module for module, names in packages_distributions().items()
    if not needed & {name.lower().replace("_", "-") for name in names}
}


class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in hidden:
            raise ModuleNotFoundError(f"{name} is no dependency of cobatch", name=name)


sys.meta_path.insert(0, Hide)
"""


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    """Run a command to its end; return its output."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_in(folder: Path) -> list[str]:
    """Return the files of the package in a folder, through links and without caches."""
    files: list[str] = []
    for parent, folders, names in os.walk(folder / "cobatch", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        files += [str((Path(parent) / name).relative_to(folder)) for name in names]
    return sorted(files)


def build(kind: str, folder: Path) -> Path:
    """Build the sdist or the wheel from the repository; check its members."""
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", folder, ROOT)
    (built,) = folder.iterdir()
    if kind == "wheel":
        with zipfile.ZipFile(built) as archive:
            prefix, names = "cobatch/", sorted(archive.namelist())
        assert {name.partition("/")[0] for name in names} == {
            "cobatch",
            f"cobatch-{cobatch.__version__}.dist-info",
        }
    else:
        with tarfile.open(built) as archive:
            top = f"cobatch-{cobatch.__version__}/"
            prefix, names = "src/cobatch/", sorted(name.removeprefix(top) for name in archive.getnames())
        assert not {name.partition("/")[0] for name in names} & ROOMS
    assert len(set(names)) == len(names)
    package = [f"cobatch/{name.removeprefix(prefix)}" for name in names if name.startswith(prefix)]
    assert package == files_in(ROOT / "src")
    return built


def environment(folder: Path) -> tuple[Path, Path]:
    """Create a virtual environment with the dependencies of this one; return its `bin` and site-packages."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in dependencies))
    return folder / "bin", site


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installed_distribution_serves_beside_hostile_modules(kind: str, tmp_path: Path) -> None:
    built = build(kind, tmp_path / "dist")
    scripts, site = environment(tmp_path / "venv")
    before = set(site.iterdir())
    python = scripts / "python"
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    run(python, "-m", "pip", "install", *offline, "--no-compile", built)
    assert {path.name for path in set(site.iterdir()) - before} == INSTALLED
    assert files_in(site) == files_in(ROOT / "src")
    (site / "sitecustomize.py").write_text(ONLY_DEPENDENCIES)
    hides = "try: import pytest\nexcept ModuleNotFoundError as error: print(error)"
    assert run(python, "-c", hides) == "pytest is no dependency of cobatch\n"

    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ROOMS:
        (hostile / f"{name}.py").write_text("raise AssertionError(__name__)\n")
    model = models.write(tmp_path, models.negate())
    env = {"PYTHONPATH": str(hostile)}
    version = "import cobatch, importlib.metadata; print(cobatch.__version__, cobatch.__file__)"
    assert run(python, "-c", version, cwd=hostile, **env).split() == [
        cobatch.__version__,
        str(site / "cobatch" / "__init__.py"),
    ]
    assert "FP32" in run(scripts / "cobatch", "inspect", model, cwd=hostile, **env)
    for number, command in enumerate([(scripts / "cobatch",), (python, "-m", "cobatch")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with Cobatch(folder, model, "--port", "0", command=command, cwd=hostile, env=env) as running:
            assert running.ready().connect().infer("model", [[1.0, 2.0, 3.0]]).rows == [[-1.0, -2.0, -3.0]]
            assert running.stop() == 0


def test_no_module_is_imported_under_its_bare_name(tmp_path: Path) -> None:
    """In the repository's root the rooms could be imported a second time, as `server` and so on."""
    model = models.write(tmp_path, models.negate())
    command = (sys.executable, "-X", "importtime", "-m", "cobatch")
    with Cobatch(tmp_path, model, "--port", "0", command=command, cwd=ROOT) as running:
        assert running.ready().connect().infer("model", [[1.0, 2.0, 3.0]]).status == 200
        assert running.stop() == 0
    imported = {line.rpartition("|")[2].strip() for line in running.stderr.splitlines()}
    assert {"cobatch.server.app", "cobatch.batcher.batcher", "cobatch.engines.worker"} <= imported
    assert not {name.partition(".")[0] for name in imported} & ROOMS
