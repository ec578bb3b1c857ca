"""`cobatch build`: from an ONNX file to a TensorRT plan for this machine's GPU, with a progress bar.

Ctrl-C ends a build at its next step. The signal's handler only sets a flag: an exception raised inside
TensorRT's calls would end the process without a message.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from cobatch.engines.errors import EngineError
from cobatch.engines.tensorrt.api import load_tensorrt
from cobatch.engines.tensorrt.plans import build as building
from cobatch.engines.tensorrt.plans import manifest as manifests
from cobatch.engines.tensorrt.plans.cache import PLAN_SUFFIXES
from cobatch.engines.tensorrt.plans.manifest import BuildOptions, Manifest
from cobatch.server.console import end, option, switch

_OPT_HELP = "Rows to choose kernels for (default: the largest batch)."
_CACHE_HELP = "File of kernel timings, read and updated; speeds up later builds."
_HARDWARE_HELP = "For every GPU from Ampere on; may run slower."
_VERSION_HELP = "For later TensorRT versions too; serve it with --plan-host-code."
_PROFILE_HELP = (
    "Shapes to build for, once for each profile: MIN/OPT/MAX rows (1/8/64), or "
    "INPUT:MIN/OPT/MAX with commas (ids:1x16/8x64/64x512,mask:…); default: 1/OPT/MAX of the batch sizes."
)


def build(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.")],
    output: Annotated[
        Path | None, option("FILE", "The plan (default: MODEL's .plan).", "-o", "--output")
    ] = None,
    max_batch_size: Annotated[int, option("ROWS", "Largest batch, in rows.", min=1, max=65536)] = 64,
    opt_batch_size: Annotated[int | None, option("ROWS", _OPT_HELP, min=1)] = None,
    profiles: Annotated[list[str] | None, option("SPEC", _PROFILE_HELP, "--profile")] = None,
    workspace_mb: Annotated[int | None, option("MB", "Most scratch memory of a layer.", min=1)] = None,
    timing_cache: Annotated[Path | None, option("FILE", _CACHE_HELP)] = None,
    hardware_compatible: Annotated[bool, switch("--hardware-compatible", _HARDWARE_HELP)] = False,
    version_compatible: Annotated[bool, switch("--version-compatible", _VERSION_HELP)] = False,
    runtime: Annotated[
        str, option("tensorrt|tensorrt-rtx", "Library that builds and runs the plan.")
    ] = "tensorrt",
) -> None:
    """Build a TensorRT plan from an ONNX model, for the GPU of this machine.

    Writes a manifest, FILE.json, beside it: the plan's source, and where it runs. With several GPUs,
    CUDA_VISIBLE_DEVICES selects one.
    """
    logging.basicConfig(level="WARNING", format="cobatch: %(message)s")
    plan = output or model.with_suffix(".plan")
    _check_files(model, plan)
    options = msgspec.convert(context.params | {"profiles": profiles or ()}, BuildOptions)
    start_s = time.monotonic()
    try:
        wanted = manifests.wanted(model, manifests.this_machine(load_tensorrt(options.runtime)), options)
        with _progress(model.name) as progress:
            built = building.build(model, options, progress)
        manifest = manifests.built(wanted, built.plan, built.profiles, built.max_batch_size)
        manifests.write_plan(plan, built.plan, manifest)
    except EngineError as error:
        raise end(str(error), 1) from None
    except OSError as error:
        raise end(f"cannot write {plan}: {error.strerror}", 1) from None
    typer.echo(_summary(plan, manifest, time.monotonic() - start_s))


def _check_files(model: Path, plan: Path) -> None:
    """Refuse early: a build may take minutes."""
    if not model.is_file():
        raise end(f"{model}: {'a folder' if model.is_dir() else 'no file there'}", 1)
    if plan.suffix not in PLAN_SUFFIXES:
        raise end(f"{plan}: a plan's name ends in {' or '.join(PLAN_SUFFIXES)}", 2)
    if not plan.parent.is_dir() or not os.access(plan.parent, os.W_OK):
        raise end(f"cannot write into {plan.parent}", 1)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[str, float], bool]]:
    """Yield a callback that moves a bar, if stderr is a terminal, and returns False after Ctrl-C."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    console = Console(stderr=True)
    phase_column = TextColumn("{task.fields[phase]}", markup=False)
    columns = TextColumn(escape(name)), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), phase_column
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(name, total=1.0, phase="")

            def progress(phase: str, fraction: float) -> bool:
                bar.update(task, completed=fraction, phase=phase)
                return not interrupts

            yield progress
    except Exception:
        if interrupts:
            raise end("interrupted", 130) from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _summary(plan: Path, manifest: Manifest, seconds: float) -> str:
    gpus = f"{manifest.gpu} (compute capability {manifest.compute_capability})"
    if "AMPERE_PLUS" in manifest.flags:
        gpus = "GPUs from Ampere on"
    size = f"{plan.stat().st_size / 1e6:.1f} MB in {seconds:.1f} s"
    lines = [f"{plan}: {size}, for {manifest.runtime} {manifest.version}, {gpus}"]
    lines += [f"  profile {profile}" for profile in manifest.profiles]
    if not manifest.profiles:
        lines.append(f"  batch fixed at {manifest.max_batch_size} rows")
    return "\n".join(lines)
