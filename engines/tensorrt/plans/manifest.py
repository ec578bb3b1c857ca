"""A plan's build options, and its manifest: the file beside it with its model, machine and SHA-256.

A plan runs only with the TensorRT version and GPU that it was built with, unless it was built to be
compatible. It is executable code, so its bytes are compared with the manifest before they are loaded. That
finds truncated and mixed-up plans; only the folder's permissions protect against an attacker who can write to
it.
"""

import contextlib
import dataclasses
import hashlib
import mmap
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cobatch.engines.errors import EngineLoadError
from cobatch.engines.tensorrt.api import TensorRT
from cobatch.engines.tensorrt.cuda import gpu_identity
from cobatch.engines.tensorrt.plans.profiles import Profile, as_spec

# What decoding a damaged file raises.
NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError)
NO_GPU = "none"  # TensorRT for RTX builds without a GPU
# The `location` entry of a tensor with external weights, as protobuf encodes it.
_LOCATION = re.compile(rb"\x0a\x08location\x12([\x80-\xff]?[\x01-\x7f])")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of a build. `profiles`: specs as in profiles.py; default: 1 to `max_batch_size` rows.

    `opt_batch_size`: batch size that kernels are chosen for (default: the largest). `hardware_compatible`:
    runs on all GPUs since Ampere; `version_compatible`: runs with later TensorRT versions.
    """

    max_batch_size: int = 64
    opt_batch_size: int | None = None
    profiles: tuple[str, ...] = ()
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    runtime: str = "tensorrt"

    @property
    def flags(self) -> tuple[str, ...]:
        """TensorRT's names of the flags that are set.

        Plans of TensorRT for RTX always run on all GPUs since Ampere: kernels are compiled at load.
        """
        hardware = self.hardware_compatible or self.runtime == "tensorrt-rtx"
        flags = {"AMPERE_PLUS": hardware, "VERSION_COMPATIBLE": self.version_compatible}
        return tuple(name for name, is_set in flags.items() if is_set)


@dataclass(frozen=True, slots=True)
class Machine:
    """TensorRT and GPU. `version`: of TensorRT; `compute_capability`: such as "9.0", or "none"."""

    runtime: str
    version: str
    gpu: str
    compute_capability: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A plan's description. `profiles`: specs as in profiles.py; `flags`: as of BuildOptions."""

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
        """32 hex digits that identify all fields."""
        return sha256(msgspec.json.encode(self, order="sorted"))[:32]

    def options(self) -> BuildOptions:
        """Return the options to build the plan again."""
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
    """Return the machine of this process. Raises EngineLoadError if the GPU cannot be queried.

    TensorRT for RTX builds without a GPU, so a missing one is no error for it.
    """
    try:
        gpu, capability = gpu_identity(device)
    except EngineLoadError:
        if not runtime.is_rtx:
            raise
        gpu = capability = NO_GPU
    return Machine(runtime.kind, runtime.version, gpu, capability)


def wanted(model: Path, machine: Machine, options: BuildOptions) -> Manifest:
    """Return the manifest of a plan to build, with an empty `plan_sha256`. Raises EngineLoadError."""
    return Manifest(
        model_digest(model),
        machine.runtime,
        machine.version,
        machine.gpu,
        machine.compute_capability,
        options.max_batch_size,
        options.opt_batch_size,
        options.profiles,
        options.flags,
        "",
        options.workspace_mb,
    )


def built(manifest: Manifest, plan: bytes, profiles: Sequence[Profile], max_batch_size: int) -> Manifest:
    """Complete the manifest of a plan that was built."""
    return dataclasses.replace(
        manifest,
        max_batch_size=max_batch_size,
        profiles=tuple(as_spec(profile) for profile in profiles),
        plan_sha256=sha256(plan),
    )


def model_digest(model: Path) -> str:
    """Return the SHA-256 of an ONNX file and its external weights. Raises EngineLoadError."""
    try:
        with model.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            if file.tell() == 0:
                return digest.hexdigest()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                names = {_location(content, match) for match in _LOCATION.finditer(content)}
        for name in sorted(names):
            weights = model.parent / name
            if weights.is_file():
                digest.update(name.encode())
                with weights.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise EngineLoadError(f"cannot read {error.filename or model}: {error.strerror}") from None
    return digest.hexdigest()


def _location(content: mmap.mmap, match: re.Match[bytes]) -> str:
    # A varint of up to 14 bits, the lower seven first.
    length = (match[1][0] & 127) + (match[1][1] << 7 if len(match[1]) > 1 else 0)
    return content[match.end() : match.end() + length].decode(errors="replace").replace("\0", "")


def manifest_path(plan: Path) -> Path:
    """Return the manifest's path: `model.plan.json` for `model.plan`."""
    return plan.with_name(plan.name + ".json")


def read_manifest(plan: Path) -> Manifest | None:
    """Read the manifest beside a plan; None if there is none. Raises EngineLoadError if it is damaged."""
    path = manifest_path(plan)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EngineLoadError(f"cannot read {path}: {error.strerror}") from None
    except NOT_JSON as error:
        raise EngineLoadError(f"{path} is not a plan's manifest: {error}") from None


def write_plan(plan: Path, content: bytes, manifest: Manifest) -> None:
    """Write both, readable by the owner only. Raises OSError.

    Each file is replaced atomically; a reader in between finds a digest that does not match.
    """
    write_file(plan, content)
    write_file(manifest_path(plan), msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")


def write_file(path: Path, content: bytes) -> None:
    """Replace a file atomically; only its owner may read or write it. Raises OSError."""
    # mkstemp creates files with mode 0600, for any umask.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def sha256(content: bytes) -> str:
    """Return the SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def mismatch(manifest: Manifest, machine: Machine) -> str | None:
    """Return the reason why a plan does not run on this machine, or None."""
    lean = machine.runtime == "tensorrt-lean"
    if manifest.runtime != machine.runtime and not (lean and manifest.runtime == "tensorrt"):
        return f"it was built with {manifest.runtime}, but {machine.runtime} is configured"
    if lean and "VERSION_COMPATIBLE" not in manifest.flags:
        return "tensorrt-lean runs version-compatible plans only; build it with --version-compatible"
    if not _runs_version(manifest, machine.version):
        return f"it was built with {manifest.runtime} {manifest.version}, but this is {machine.version}"
    if "AMPERE_PLUS" in manifest.flags:
        if machine.compute_capability == NO_GPU or _numbers(machine.compute_capability) >= (8, 0):
            return None
        return f"it needs compute capability 8.0 or later, but {machine.gpu} has {machine.compute_capability}"
    if (manifest.gpu, manifest.compute_capability) != (machine.gpu, machine.compute_capability):
        return (
            f"it was built for {manifest.gpu} (compute capability {manifest.compute_capability}), "
            f"but this is {machine.gpu} ({machine.compute_capability})"
        )
    return None


def _runs_version(manifest: Manifest, version: str) -> bool:
    """Return True if the version fits: version-compatible plans run on later releases, 10's on 11 too."""
    if manifest.version == version:
        return True
    if "VERSION_COMPATIBLE" not in manifest.flags:
        return False
    built_by, here = _numbers(manifest.version), _numbers(version)
    return built_by <= here and (built_by[0], here[0]) in {(10, 10), (11, 11), (10, 11)}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)) or (0,)
