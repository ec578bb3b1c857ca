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
from cobatch.server.console import end

_PROFILE_HELP = (
    "Shapes to build for, once for each profile: MIN/OPT/MAX rows (1/8/64), or "
    "INPUT:MIN/OPT/MAX with commas (ids:1x16/8x64/64x512,mask:…); default: 1/OPT/MAX of the batch sizes."
)


def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The plan (default: MODEL's .plan).")
    ] = None,
    max_batch_size: Annotated[
        int, typer.Option(metavar="ROWS", min=1, max=65536, help="Largest batch, in rows.")
    ] = 64,
    opt_batch_size: Annotated[
        int | None,
        typer.Option(metavar="ROWS", min=1, help="Rows to choose kernels for (default: the largest batch)."),
    ] = None,
    profile: Annotated[list[str] | None, typer.Option(metavar="SPEC", help=_PROFILE_HELP)] = None,
    workspace_mb: Annotated[
        int | None, typer.Option(metavar="MB", min=1, help="Most scratch memory of a layer.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File of kernel timings, read and updated; speeds up later builds."
        ),
    ] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="For every GPU from Ampere on; may run slower.")
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="For later TensorRT versions too; serve it with --plan-host-code."
        ),
    ] = False,
    runtime: Annotated[
        str, typer.Option(metavar="tensorrt|tensorrt-rtx", help="Library that builds and runs the plan.")
    ] = "tensorrt",
) -> None:
    """Build a TensorRT plan from an ONNX model, for the GPU of this machine.

    Writes a manifest, FILE.json, beside it: the plan's source, and where it runs. With several GPUs,
    CUDA_VISIBLE_DEVICES selects one.
    """
    logging.basicConfig(level="WARNING", format="cobatch: %(message)s")
    plan = output or model.with_suffix(".plan")
    _check_files(model, plan)
    options = BuildOptions(
        max_batch_size=max_batch_size,
        opt_batch_size=opt_batch_size,
        profiles=tuple(profile or ()),
        workspace_mb=workspace_mb,
        timing_cache=timing_cache,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
        runtime=runtime,
    )
    start_s = time.monotonic()
    try:
        manifest = _build(model, plan, options)
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


def _build(model: Path, plan: Path, options: BuildOptions) -> Manifest:
    machine = manifests.this_machine(load_tensorrt(options.runtime))
    wanted = manifests.wanted(model, machine, options)
    with _interruptible() as interrupts, _bar(model.name) as show:

        def progress(phase: str, fraction: float) -> bool:
            show(phase, fraction)
            return not interrupts

        try:
            built = building.build(model, options, progress)
        except Exception:
            if interrupts:
                raise end("interrupted", 130) from None
            raise
    manifest = manifests.built(wanted, built.plan, built.profiles, built.max_batch_size)
    manifests.write_plan(plan, built.plan, manifest)
    return manifest


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yield the list of SIGINTs that have arrived; they interrupt nothing by themselves."""
    signals: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[str, float], None]]:
    """Show a bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn(escape(name)),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[phase]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=1.0, phase="")
        yield lambda phase, fraction: progress.update(task, completed=fraction, phase=phase)


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
