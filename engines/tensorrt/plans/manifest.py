"""What lies beside a plan: what it was made from, for which machine, and the plan's own SHA-256.

A plan runs only where it was built: with that TensorRT and on that GPU, unless it was built to be
compatible. It is executable code, so its bytes are compared with the manifest before they are loaded. That
finds a plan that was cut short or mixed up; against somebody who may write to its folder only the folder's
permissions help.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cobatch.engines.errors import EngineLoadError
from cobatch.engines.tensorrt.api import TensorRT
from cobatch.engines.tensorrt.plans.build import BuildOptions, Built, flags_of
from cobatch.engines.tensorrt.plans.files import sha256, write_file
from cobatch.engines.tensorrt.plans.profiles import as_spec

# The GPU's name where there is none: TensorRT for RTX builds without.
NO_GPU = "none"
# The `location` entry of a tensor whose weights lie in a file of their own, as protobuf writes it.
_LOCATION = re.compile(rb"\x0a\x08location\x12([\x80-\xff]?[\x01-\x7f])")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a plan runs. `version`: TensorRT's; `compute_capability`: such as "9.0", or "none"."""

    runtime: str
    version: str
    gpu: str
    compute_capability: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """`profiles` are specs as in profiles.py; `flags` are TensorRT's names of what was turned on."""

    model_sha256: str
    runtime: str
    version: str
    gpu: str
    compute_capability: str
    max_batch_size: int
    opt_batch_size: int | None
    profiles: tuple[str, ...]
    flags: tuple[str, ...]
    plan_sha256: str
    workspace_mb: int | None = None

    @property
    def key(self) -> str:
        """32 hex digits that stand for everything here but the plan itself."""
        return sha256(msgspec.json.encode(self, order="sorted"))[:32]

    def options(self) -> BuildOptions:
        """What to build it again with."""
        return BuildOptions(
            max_batch_size=self.max_batch_size,
            opt_batch_size=None if self.profiles else self.opt_batch_size,
            profiles=self.profiles,
            workspace_mb=self.workspace_mb,
            hardware_compatible="AMPERE_PLUS" in self.flags,
            version_compatible="VERSION_COMPATIBLE" in self.flags,
            runtime=self.runtime,
        )


def this_machine(runtime: TensorRT, device: int = 0) -> Machine:
    """What this process runs plans with. Raises EngineLoadError where the GPU cannot be asked.

    TensorRT for RTX builds without a GPU, so its absence is told and not refused.
    """
    from cobatch.engines.tensorrt.cuda import gpu_identity  # noqa: PLC0415 - PyCUDA, which building alone may lack

    try:
        gpu, capability = gpu_identity(device)
    except EngineLoadError:
        if not runtime.is_rtx:
            raise
        gpu = capability = NO_GPU
    return Machine(runtime.kind, runtime.version, gpu, capability)


def wanted(model: Path, machine: Machine, options: BuildOptions) -> Manifest:
    """What a plan of this model would be built for; `plan_sha256` is empty. Raises EngineLoadError."""
    return Manifest(
        model_digest(model),
        machine.runtime,
        machine.version,
        machine.gpu,
        machine.compute_capability,
        options.max_batch_size,
        options.opt_batch_size,
        options.profiles,
        flags_of(options),
        "",
        options.workspace_mb,
    )


def built(asked: Manifest, made: Built) -> Manifest:
    """The manifest of a plan that was made for what `asked` says."""
    specs = tuple(as_spec(profile) for profile in made.profiles)
    digest = sha256(made.plan)
    return dataclasses.replace(asked, max_batch_size=made.max_batch_size, profiles=specs, plan_sha256=digest)


def model_digest(model: Path) -> str:
    """SHA-256 of an ONNX file and of the files that its weights lie in. Raises EngineLoadError."""
    try:
        with model.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            if file.tell() == 0:
                return digest.hexdigest()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                names = {_text(content, found) for found in _LOCATION.finditer(content)}
        for name in sorted(names):
            weights = model.parent / name
            if weights.is_file():
                digest.update(name.encode())
                with weights.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise EngineLoadError(f"cannot read {error.filename or model}: {error.strerror}") from None
    return digest.hexdigest()


def _text(content: mmap.mmap, found: re.Match[bytes]) -> str:
    # A number of up to 14 bits, the lower seven first.
    length = (found[1][0] & 127) + (found[1][1] << 7 if len(found[1]) > 1 else 0)
    return content[found.end() : found.end() + length].decode(errors="replace").replace("\0", "")


def manifest_path(plan: Path) -> Path:
    """`model.plan` -> `model.plan.json`."""
    return plan.with_name(plan.name + ".json")


def read_manifest(plan: Path) -> Manifest | None:
    """The manifest beside a plan, or None. Raises EngineLoadError for one that is damaged."""
    path = manifest_path(plan)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EngineLoadError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise EngineLoadError(f"{path} is not a plan's manifest: {error}") from None


def write_plan(plan: Path, content: bytes, manifest: Manifest) -> None:
    """Write both, for the owner alone. Raises OSError.

    Each is replaced in one step. Whoever reads in between finds a digest that does not match.
    """
    write_file(plan, content)
    write_file(manifest_path(plan), msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")


def mismatch(manifest: Manifest, machine: Machine) -> str | None:
    """Why a plan does not run on this machine, in words; None where nothing speaks against it."""
    if manifest.runtime != machine.runtime:
        return f"it was built by {manifest.runtime}, and {machine.runtime} is to run it"
    if not _runs_version(manifest, machine.version):
        return f"it was built by {manifest.runtime} {manifest.version}, and here is {machine.version}"
    if "AMPERE_PLUS" in manifest.flags:
        if machine.compute_capability == NO_GPU or _numbers(machine.compute_capability) >= (8, 0):
            return None
        return f"it needs compute capability 8.0 or later, and {machine.gpu} has {machine.compute_capability}"
    if (manifest.gpu, manifest.compute_capability) != (machine.gpu, machine.compute_capability):
        return (
            f"it was built for {manifest.gpu} (compute capability {manifest.compute_capability}), "
            f"and here is {machine.gpu} ({machine.compute_capability})"
        )
    return None


def _runs_version(manifest: Manifest, version: str) -> bool:
    """Version-compatible plans run on later releases of their major version, and 10's on 11."""
    if manifest.version == version:
        return True
    if "VERSION_COMPATIBLE" not in manifest.flags:
        return False
    built_by, here = _numbers(manifest.version), _numbers(version)
    return built_by <= here and (built_by[0], here[0]) in {(10, 10), (11, 11), (10, 11)}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)) or (0,)
