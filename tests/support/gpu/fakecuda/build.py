"""Build the fake driver, and PyCUDA against it, once, into a cache outside the repository.

Run by `./scripts/fake-gpu`, and by the tests that need it. A folder's name is a hash of its sources, so a
change leads to a new folder; of two concurrent runs one builds and the other waits.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.gpu.fakecuda.generate import generate

HERE = Path(__file__).parent
PYCUDA = "pycuda==2026.1"
# PyCUDA's dependencies besides NumPy, which is the environment's.
REQUIRES = ("pytools>=2025.2", "platformdirs>=4", "mako>=1.3")
BUILDS_WITH = ("setuptools>=80", "wheel>=0.45")
SOURCES = tuple(
    HERE / f"{name}.c" for name in ("calls", "devices", "contexts", "memory", "work", "streams", "graphs")
)
LIBRARY = "libcuda.so.1"
# Increase it when the result of the code below changes.
RECIPE = "1"
_ROOTS = ("/usr/local/cuda", "/usr/local/cuda-13.0")


class CannotBuildError(Exception):
    """The fake driver cannot be built; the text is the reason or the last lines of output."""


@dataclass(frozen=True, slots=True)
class Built:
    """`library`: the fake driver. `site`: the folder to import PyCUDA from."""

    library: Path
    site: Path


def cache_folder() -> Path:
    """Return the cache folder; its contents can be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cobatch" / "fake-gpu"


def cuda_root() -> Path:
    """Return the folder of the CUDA toolkit. Raises CannotBuildError."""
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    # The headers only, from wheels of the development dependencies.
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
    named = os.environ.get("CUDA_ROOT")
    for root in [*([named] if named else []), *beside, str(wheels), *_ROOTS]:
        if (Path(root) / "include" / "cuda.h").is_file():
            return Path(root)
    raise CannotBuildError("needs CUDA's headers (cuda.h): install a CUDA toolkit, or set CUDA_ROOT")


def build(say: Callable[[str], None] = lambda _line: None) -> Built:
    """Return both, from the cache or built. Raises CannotBuildError."""
    root = cuda_root()
    for tool in ("gcc", "g++"):
        if shutil.which(tool) is None:
            raise CannotBuildError(f"needs {tool}: apt-get install g++")
    library = build_library(root)
    return Built(library, _build_pycuda(root, library, say))


def build_library(root: Path) -> Path:
    """Build the fake driver in about half a second. Raises CannotBuildError."""
    header = root / "include" / "cuda.h"
    key = _hash([*SOURCES, HERE / "fake.h", HERE / "generate.py", header])
    return once(f"driver-{key}", lambda folder: _compile(root, folder)) / LIBRARY


def _compile(root: Path, folder: Path) -> None:
    include = root / "include"
    generated = folder / "generated.c"
    generated.write_text(generate(include, list(SOURCES)))
    library = folder / LIBRARY
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"]
    paths = [f"-I{HERE}", f"-I{include}", *map(str, SOURCES), str(generated)]
    run(["gcc", *flags, f"-Wl,-soname,{LIBRARY}", *paths, "-o", str(library), "-ldl"])
    # The library name that PyCUDA's build links to.
    (folder / "libcuda.so").symlink_to(LIBRARY)


def _build_pycuda(root: Path, library: Path, say: Callable[[str], None]) -> Path:
    import numpy as np  # noqa: PLC0415 - only its version counts, and only here

    about = [PYCUDA, *REQUIRES, sys.version, sysconfig.get_platform(), np.__version__]
    key = _hash([root / "include" / "cuda.h"], about)

    def make(folder: Path) -> None:
        say(f"cobatch: building {PYCUDA} against the fake driver, which takes a minute or two")
        with tempfile.TemporaryDirectory() as scratch:
            wheel = _wheel(root, library, Path(scratch), np.__version__)
            pip("install", "--target", str(folder / "site"), "--no-deps", str(wheel))
        # Their requirements are small pure Python packages without NumPy.
        pip("install", "--target", str(folder / "site"), *REQUIRES)

    return once(f"pycuda-{key}", make) / "site"


def _wheel(root: Path, library: Path, scratch: Path, numpy: str) -> Path:
    """Build PyCUDA in a new environment, since its build needs NumPy and setuptools installed first."""
    run([sys.executable, "-m", "venv", str(scratch / "venv")])
    python = str(scratch / "venv" / "bin" / "python")
    pip("install", f"numpy=={numpy}", *BUILDS_WITH, python=python)
    # PyCUDA's build reads settings from the home folder, and some toolkits have no curand.h.
    (scratch / ".aksetup-defaults.py").write_text(
        f"CUDA_ENABLE_CURAND = False\nCUDA_ROOT = {str(root)!r}\n"
        f"CUDADRV_LIB_DIR = [{str(library.parent)!r}]\n"
    )
    for settings in (".config", ".pip"):  # pip's settings, such as the package index
        (scratch / settings).symlink_to(Path.home() / settings)
    environ = {
        **os.environ,
        "HOME": str(scratch),
        "CUDA_ROOT": str(root),
        "CUDA_INC_DIR": str(root / "include"),
    }
    pip(
        "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "-w", str(scratch), PYCUDA,
        python=python, environ=environ,
    )  # fmt: skip
    return next(scratch.glob("pycuda-*.whl"))


def pip(*arguments: str, python: str = sys.executable, environ: dict[str, str] | None = None) -> None:
    run([python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], environ)


def run(command: list[str], environ: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotBuildError(f"{' '.join(command[:4])} … failed:\n{done.stdout[-2000:]}")


def _hash(files: list[Path], words: list[str] | None = None) -> str:
    digest = hashlib.sha256(RECIPE.encode())
    for file in files:
        digest.update(file.read_bytes())
    digest.update("\0".join(words or []).encode())
    return digest.hexdigest()[:16]


def once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of this name in the cache; `make` creates it if it is missing."""
    folder = cache_folder() / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not folder.exists():
            part = Path(tempfile.mkdtemp(prefix=f"{name}.part-", dir=folder.parent))
            try:
                make(part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def main() -> int:
    """Build and print the folders; exit status 1 with the reason on failure."""
    try:
        built = build(lambda line: print(line, file=sys.stderr))  # noqa: T201 - a program
    except CannotBuildError as error:
        print(f"fake-gpu: {error}", file=sys.stderr)  # noqa: T201 - a program
        return 1
    print(f"driver  {built.library}\nPyCUDA  {built.site}")  # noqa: T201 - a program
    return 0


if __name__ == "__main__":
    sys.exit(main())
