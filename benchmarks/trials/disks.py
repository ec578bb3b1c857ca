"""Full disks behind commands and the plan cache, and damaged plans.

Plans need TensorRT for RTX, which builds without a GPU; a full disk is a tiny tmpfs, which only root mounts.
What cannot be tried is counted as skipped.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common.models import model_path
from benchmarks.common.processes import ROOT
from benchmarks.trials.damaged_files import damaged
from benchmarks.trials.trial import Report
from cobatch.engines.errors import EngineLoadError
from cobatch.engines.tensorrt.plans.cache import built_plan, given_plan
from cobatch.engines.tensorrt.plans.manifest import BuildOptions, Machine, read_manifest

_RUNTIME = "tensorrt-rtx"
_TIMEOUT_S = 120
_TINY_BYTES = 16 << 10


def try_disks(report: Report, rng: random.Random, count: int) -> None:
    """Run commands on a full disk, and load `count` damaged plans."""
    with (
        tempfile.TemporaryDirectory(prefix="cobatch-disks-") as text,
        _full_folder(Path(text, "full")) as full,
    ):
        model = model_path("tiny", Path(text))
        if full is None:
            report.counts["skipped: no tmpfs, which needs root"] += 1
        _commands(report, model, full)
        if find_spec("tensorrt_rtx_bindings") is None and find_spec("tensorrt_rtx") is None:
            report.counts["skipped: no TensorRT for RTX"] += 1
        else:
            _plans(report, rng, count, model, full)


@contextlib.contextmanager
def _full_folder(path: Path) -> Iterator[Path | None]:
    """Mount a tmpfs without space; yields None where that is not allowed."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_TINY_BYTES}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    with contextlib.suppress(OSError), (path / "filling").open("wb", buffering=0) as filling:
        while filling.write(bytes(4096)):
            pass
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def _commands(report: Report, model: Path, full: Path | None) -> None:
    """Each command names the fault in one line: to a full stdout, and to files on a full disk."""
    printing = (["inspect", str(model)], ["simulate", "--list"], ["--version"], ["serve", "--help"])
    writing: list[list[str]] = []
    if full is not None:
        writing = [
            ["profile", str(model), "--seconds", "0.1", "-o", str(full / "profile.json")],
            ["token", "init", str(full / "dev"), "--model", str(model)],
            ["token", "api-key", "--tenant", "a", "--scope", "infer", "--file", str(full / "keys.toml")],
        ]
        if find_spec("tensorrt_rtx_bindings") is not None:
            writing.append(["build", str(model), "--runtime", _RUNTIME, "-o", str(full / "m.plan")])
    with Path("/dev/full").open("wb") as nowhere:
        for arguments in (*printing, *writing):
            line = [sys.executable, "-m", "cobatch", *arguments]
            stdout = nowhere if arguments in printing else subprocess.DEVNULL
            done = subprocess.run(
                line,
                cwd=ROOT,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                timeout=_TIMEOUT_S,
            )
            report.counts["commands on a full disk"] += 1
            said = "No space left on device" in done.stderr and "Traceback" not in done.stderr
            if done.returncode == 0 or not said:
                report.find("a command on a full disk", f"{arguments}: {done.returncode} {done.stderr}")


def _plans(report: Report, rng: random.Random, count: int, model: Path, full: Path | None) -> None:
    folder = model.parent / "plans"
    folder.mkdir(mode=0o700)
    path = folder / "m.plan"
    line = [sys.executable, "-m", "cobatch", "build", str(model), "--runtime", _RUNTIME, "-o", str(path)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True, timeout=_TIMEOUT_S)
    manifest = read_manifest(path)
    assert manifest is not None
    machine = Machine(manifest.runtime, manifest.version, manifest.gpu, manifest.compute_capability)
    files = {one: one.read_bytes() for one in folder.iterdir()}
    for _ in range(count):
        broken = rng.choice(list(files))
        broken.write_bytes(damaged(files[broken], rng))
        try:
            plan = given_plan(path, machine, folder)
        except EngineLoadError:
            report.counts["damaged plans and manifests refused"] += 1
        except Exception as error:  # noqa: BLE001 - the trial looks for any
            report.find("a damaged plan is not refused in words", f"{error!r}: {broken.read_bytes()!r}")
        else:
            report.counts["damaged plans and manifests, the plan sound"] += 1
            if plan != files[path]:
                report.find("a damaged plan is used", f"{broken}: {broken.read_bytes()!r}")
        broken.write_bytes(files[broken])
    options = BuildOptions(max_batch_size=4, runtime=_RUNTIME)
    cache = model.parent / "cache"
    sound = built_plan(model, options, machine, cache)
    for _ in range(max(1, count // 100)):
        (cached,) = cache.glob("*.plan")
        cached.write_bytes(damaged(cached.read_bytes(), rng))
        harmed = cached.read_bytes()
        report.counts["damaged cached plans"] += 1
        if built_plan(model, options, machine, cache) == harmed != sound:
            report.find("a damaged plan of the cache is used", harmed)
    if full is not None:
        report.counts["plans built beside a full cache"] += 1
        full.chmod(0o700)
        if not built_plan(model, options, machine, full):
            report.find("no plan is built where the cache is full", "")
