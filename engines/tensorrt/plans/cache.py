"""The plan cache: a served model's plan is read from a folder, or built and stored there.

A plan's file name has the digest of all that it depends on (model and weights, TensorRT's version, GPU, batch
sizes, flags), so a change leads to another plan and nothing has to be invalidated. Processes may share the
folder: files are written atomically, and one process builds while the others wait for it.

Plans are executable code: the folder is created for its owner only, and a folder that others may write to is
refused.
"""

import contextlib
import dataclasses
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from cobatch.engines.base import Batching
from cobatch.engines.errors import EngineLoadError
from cobatch.engines.tensorrt.api import load_tensorrt
from cobatch.engines.tensorrt.plans import build as building
from cobatch.engines.tensorrt.plans import manifest as manifests
from cobatch.engines.tensorrt.plans.build import Progress
from cobatch.engines.tensorrt.plans.manifest import BuildOptions, Machine, Manifest, sha256

log = logging.getLogger("cobatch.tensorrt")

PLAN_SUFFIXES = (".plan", ".engine")
_PROOF = 2  # raise it when the proof changes, so that it runs again


def default_folder() -> Path:
    """Return `$XDG_CACHE_HOME/cobatch/plans`, by default in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "cobatch" / "plans"


def plan_source(
    path: Path, options: BuildOptions, folder: Path | None = None, device: int = 0
) -> Callable[[], bytes]:
    """Return a function that an engine calls on its thread, with its GPU current, for the plan's bytes.

    `path` is an ONNX file or a plan. The function raises EngineLoadError.
    """

    def load() -> bytes:
        runtime = load_tensorrt(options.runtime)
        machine = manifests.this_machine(runtime, device)
        if path.suffix in PLAN_SUFFIXES:
            return given_plan(path, machine, folder)
        return built_plan(path, options, machine, folder)

    return load


def given_plan(path: Path, machine: Machine, folder: Path | None = None) -> bytes:
    """Read a plan given by the operator; if it does not fit, build one from the model beside it."""
    plan = _read(path)
    manifest = manifests.read_manifest(path)
    if manifest is None:
        log.warning("%s has no manifest: its machine and integrity are not checked", path)
        return plan
    why = manifests.mismatch(manifest, machine)
    if why is None and sha256(plan) != manifest.plan_sha256:
        why = "its SHA-256 is not that of its manifest: one of the files was damaged or replaced"
    if why is None:
        return plan
    model = path.with_suffix(".onnx")
    same_runtime = manifest.runtime == machine.runtime
    if same_runtime and model.is_file() and manifests.model_digest(model) == manifest.model_sha256:
        log.warning("%s cannot be used: %s; it is rebuilt from %s", path, why, model)
        return built_plan(model, manifest.options(), machine, folder)
    raise EngineLoadError(f"{path} cannot be used: {why}; build it on this machine with `cobatch build`")


def built_plan(
    model: Path,
    options: BuildOptions,
    machine: Machine,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> bytes:
    """Return the model's plan for this machine, from the folder or built and stored there."""
    manifest = manifests.wanted(model, machine, options)
    cached = _cache_path(folder or default_folder(), f"{model.stem[:64]}-{manifest.key}.plan")
    progress = progress or _log_progress(model)
    if cached is None:
        return building.build(model, options, progress).plan
    plan = _read_cached(cached, machine)
    if plan is not None:
        return plan
    with _lock(cached):
        # Another process may have built it while this one waited.
        plan = _read_cached(cached, machine)
        return plan if plan is not None else _build(model, options, manifest, cached, progress)


class Verdicts:
    """Outcomes of the proof of batching (`engines.proof`), each in a file beside the cached plans."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def recall(self, plan: bytes) -> Batching | None:
        """Return the outcome for these plan's bytes, if it is known."""
        path = self._path(plan)
        try:
            return None if path is None else msgspec.json.decode(path.read_bytes(), type=Batching)
        except (OSError, *manifests.NOT_JSON):
            return None

    def remember(self, plan: bytes, batching: Batching) -> None:
        """Keep the outcome; without a folder to write to, the next load runs the proof again."""
        path = self._path(plan)
        if path is not None:
            with contextlib.suppress(OSError):
                manifests.write_file(path, msgspec.json.encode(batching))

    def _path(self, plan: bytes) -> Path | None:
        try:
            return _cache_path(self._folder or default_folder(), f"{sha256(plan)[:32]}.batching{_PROOF}.json")
        except EngineLoadError:
            return None  # others can write there


def _build(model: Path, options: BuildOptions, manifest: Manifest, cached: Path, progress: Progress) -> bytes:
    log.info("building a plan of %s for %s, to be stored in %s", model, manifest.gpu, cached)
    built = building.build(model, _with_timings(options, manifest, cached.parent), progress)
    try:
        manifest = manifests.built(manifest, built.plan, built.profiles, built.max_batch_size)
        manifests.write_plan(cached, built.plan, manifest)
    except OSError as error:
        log.warning("cannot store the plan in %s: %s; the next start builds it again", cached, error.strerror)
    return built.plan


def _with_timings(options: BuildOptions, manifest: Manifest, folder: Path) -> BuildOptions:
    """Let all builds of a GPU share a timing cache beside their plans; TensorRT for RTX has none."""
    if options.runtime != "tensorrt" or options.timing_cache is not None:
        return options
    machine = (manifest.version, manifest.gpu, manifest.compute_capability)
    path = folder / f"timings-{sha256(repr(machine).encode())[:16]}"
    return dataclasses.replace(options, timing_cache=path)


def _read_cached(path: Path, machine: Machine) -> bytes | None:
    """Return the cached plan if it is intact and fits."""
    if not path.exists():
        return None
    try:
        manifest, plan = manifests.read_manifest(path), _read(path)
    except EngineLoadError as error:
        log.warning("a cached plan is rebuilt: %s", error)
        return None
    if manifest is None or sha256(plan) != manifest.plan_sha256:
        log.warning("the cached plan %s does not match its manifest; it is rebuilt", path)
        return None
    why = manifests.mismatch(manifest, machine)
    if why is not None:
        log.warning("the cached plan %s is rebuilt: %s", path, why)
        return None
    log.info("cached plan %s", path)
    return plan


def _cache_path(folder: Path, name: str) -> Path | None:
    """Return the plan's path; None without a folder. Raises EngineLoadError if others can write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        log.warning("plans are not cached: %s: %s", folder, error.strerror)
        return None
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in {os.geteuid(), 0}:
        raise EngineLoadError(
            f"others can write to the plan cache {folder}, and a plan is executable code: "
            "chmod 700 it, or set another folder"
        )
    return folder / name


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lock the plan for one thread of one process. The kernel releases it if the process dies."""
    try:
        handle = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        # A read-only folder: no process writes there, so no lock is needed.
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks; writes are atomic anyway
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineLoadError(f"cannot read {path}: {error.strerror}") from None


def _log_progress(model: Path) -> Progress:
    """Return a function that logs a line for each tenth."""
    tenths = 0

    def progress(phase: str, fraction: float) -> bool:
        nonlocal tenths
        if int(fraction * 10) > tenths:
            tenths = int(fraction * 10)
            log.info("building %s: %d %% (%s)", model.name, tenths * 10, phase)
        return True

    return progress
