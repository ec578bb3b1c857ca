"""Where a served model's plan comes from: a folder of plans built before, or a build now.

A plan's name in the folder holds the digest of all that it depends on (the model and its weights,
TensorRT's version, the GPU, batch sizes, flags), so that whatever changes asks for another plan and nothing
has to be thrown away. Any number of processes may share the folder: files appear whole, and one process
builds while the others wait for it.

Plans are executable code: the folder is made for its owner alone, and a folder that others may write to is
refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from cobatch.engines.errors import EngineLoadError
from cobatch.engines.tensorrt.api import load_tensorrt
from cobatch.engines.tensorrt.plans import build as building
from cobatch.engines.tensorrt.plans import manifest as manifests
from cobatch.engines.tensorrt.plans.build import BuildOptions, Progress
from cobatch.engines.tensorrt.plans.files import sha256
from cobatch.engines.tensorrt.plans.manifest import Machine, Manifest

log = logging.getLogger("cobatch.tensorrt")

PLAN_SUFFIXES = (".plan", ".engine")


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/cobatch/plans`, by default in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification tells to pass over a relative path.
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "cobatch" / "plans"


def plan_source(
    path: Path, options: BuildOptions, folder: Path | None = None, device: int = 0
) -> Callable[[], bytes]:
    """What an engine calls, on its own thread and with its GPU current, for the plan to load.

    `path` is an ONNX file or a plan. What comes back raises EngineLoadError.
    """

    def load() -> bytes:
        runtime = load_tensorrt(options.runtime)
        machine = manifests.this_machine(runtime, device)
        if path.suffix in PLAN_SUFFIXES:
            return given_plan(path, machine, folder)
        return built_plan(path, options, machine, folder)

    return load


def given_plan(path: Path, machine: Machine, folder: Path | None = None) -> bytes:
    """A plan that the operator named; where it does not fit, one built from the model beside it."""
    plan = _read(path)
    manifest = manifests.read_manifest(path)
    if manifest is None:
        log.warning("%s has no manifest: nothing tells what it was built for, or that it is whole", path)
        return plan
    why = manifests.mismatch(manifest, machine)
    if why is None and sha256(plan) != manifest.plan_sha256:
        why = "its SHA-256 is not the one in its manifest: one of them was damaged or replaced"
    if why is None:
        return plan
    model = path.with_suffix(".onnx")
    same_runtime = manifest.runtime == machine.runtime
    if same_runtime and model.is_file() and manifests.model_digest(model) == manifest.model_sha256:
        log.warning("%s cannot be used: %s; it is built anew from %s", path, why, model)
        return built_plan(model, manifest.options(), machine, folder)
    raise EngineLoadError(f"{path} cannot be used: {why}; build it on this machine with `cobatch build`")


def built_plan(
    model: Path,
    options: BuildOptions,
    machine: Machine,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> bytes:
    """The model's plan for this machine, from the folder or built now and kept there."""
    asked = manifests.wanted(model, machine, options)
    place = _place(folder or default_folder(), f"{model.stem[:64]}-{asked.key}.plan")
    if place is None:
        return building.build(model, options, progress or _logged(model)).plan
    plan = _kept(place, machine)
    if plan is not None:
        return plan
    with _alone(place):
        # Another process may have built it while this one waited.
        plan = _kept(place, machine)
        return plan if plan is not None else _build(model, options, asked, place, progress or _logged(model))


def _build(model: Path, options: BuildOptions, asked: Manifest, place: Path, progress: Progress) -> bytes:
    log.info("building a plan of %s for %s; it is kept in %s", model, asked.gpu, place)
    made = building.build(model, options, progress)
    try:
        manifests.write_plan(place, made.plan, manifests.built(asked, made))
    except OSError as error:
        log.warning("the plan could not be kept in %s: %s; the next start builds anew", place, error.strerror)
    return made.plan


def _kept(place: Path, machine: Machine) -> bytes | None:
    """The plan kept there, if it is whole and fits."""
    if not place.exists():
        return None
    try:
        manifest, plan = manifests.read_manifest(place), _read(place)
    except EngineLoadError as error:
        log.warning("a kept plan is built anew: %s", error)
        return None
    if manifest is None or sha256(plan) != manifest.plan_sha256:
        log.warning("the plan %s is not the one that its manifest describes; it is built anew", place)
        return None
    why = manifests.mismatch(manifest, machine)
    if why is not None:
        log.warning("the plan %s is built anew: %s", place, why)
        return None
    log.info("plan %s", place)
    return plan


def _place(folder: Path, name: str) -> Path | None:
    """The plan's path; None where no folder can be made. Raises EngineLoadError where others may write."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        log.warning("no plans are kept: %s: %s", folder, error.strerror)
        return None
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or found.st_uid not in {os.geteuid(), 0}:
        raise EngineLoadError(
            f"the plan cache {folder} can be written by others, and a plan is executable code; "
            "chmod 700 it, or name another folder"
        )
    return folder / name


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process (and one thread in it) at a time. The kernel lets go when a holder dies."""
    try:
        handle = os.open(place.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        # A folder that can only be read: nothing is written there, so nobody is in the way.
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks: files still appear whole
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineLoadError(f"cannot read {path}: {error.strerror}") from None


def _logged(model: Path) -> Progress:
    """Progress as a line for each tenth."""
    told = 0

    def tell(phase: str, fraction: float) -> bool:
        nonlocal told
        if int(fraction * 10) > told:
            told = int(fraction * 10)
            log.info("building %s: %d %% (%s)", model.name, told * 10, phase)
        return True

    return tell
