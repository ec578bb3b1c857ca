"""`cobatch build`: from an ONNX file to a plan for this machine's GPU, with a progress bar.

Ctrl-C ends a build at its next step. The signal's handler only notes it: an exception raised while
TensorRT is above on the stack would end the process without a word.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from cobatch.server.console import end

if TYPE_CHECKING:
    from cobatch.engines.tensorrt.plans.build import BuildOptions
    from cobatch.engines.tensorrt.plans.manifest import Manifest

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
        int, typer.Option(metavar="ROWS", min=1, max=65536, help="Most rows in a batch.")
    ] = 64,
    opt_batch_size: Annotated[
        int | None,
        typer.Option(metavar="ROWS", min=1, help="Rows to choose kernels for (default: the most)."),
    ] = None,
    profile: Annotated[list[str] | None, typer.Option(metavar="SPEC", help=_PROFILE_HELP)] = None,
    workspace_mb: Annotated[
        int | None, typer.Option(metavar="MB", min=1, help="Most memory a layer may take to work in.")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measured kernels, read and written back: later builds are quicker."
        ),
    ] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="For every GPU from Ampere on; may run slower.")
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option("--version-compatible", help="For later TensorRTs too; serve it with --plan-host-code."),
    ] = False,
    runtime: Annotated[
        str, typer.Option(metavar="tensorrt|tensorrt-rtx", help="What builds, and is to run it.")
    ] = "tensorrt",
) -> None:
    """Build a TensorRT plan from an ONNX model, for the GPU of this machine.

    A manifest, FILE.json, is written beside it: what the plan was made from and where it runs. With several
    GPUs, CUDA_VISIBLE_DEVICES says which.
    """
    from cobatch.engines.errors import EngineError
    from cobatch.engines.tensorrt.plans.build import BuildOptions

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
    began = time.monotonic()
    try:
        manifest = _build(model, plan, options)
    except EngineError as error:
        raise end(str(error), 1) from None
    except OSError as error:
        raise end(f"cannot write {plan}: {error.strerror}", 1) from None
    typer.echo(_told(plan, manifest, time.monotonic() - began))


def _check_files(model: Path, plan: Path) -> None:
    """What can be known before a build that may take minutes."""
    from cobatch.engines.tensorrt.plans.cache import PLAN_SUFFIXES

    if not model.is_file():
        raise end(f"{model}: {'a folder' if model.is_dir() else 'no file there'}", 1)
    if plan.suffix not in PLAN_SUFFIXES:
        raise end(f"{plan}: a plan's name ends in {' or '.join(PLAN_SUFFIXES)}", 2)
    if not plan.parent.is_dir() or not os.access(plan.parent, os.W_OK):
        raise end(f"cannot write into {plan.parent}", 1)


def _build(model: Path, plan: Path, options: "BuildOptions") -> "Manifest":
    from cobatch.engines.tensorrt.api import load_tensorrt
    from cobatch.engines.tensorrt.plans import build as building
    from cobatch.engines.tensorrt.plans import manifest as manifests

    machine = manifests.this_machine(load_tensorrt(options.runtime))
    asked = manifests.wanted(model, machine, options)
    with _interruptible() as interrupted, _bar(model.name) as show:

        def progress(phase: str, fraction: float) -> bool:
            show(phase, fraction)
            return not interrupted()

        try:
            made = building.build(model, options, progress)
        except Exception:
            if interrupted():
                raise end("interrupted", 130) from None
            raise
    manifest = manifests.built(asked, made)
    manifests.write_plan(plan, made.plan, manifest)
    return manifest


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT has come; it interrupts nothing by itself."""
    came = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr; nothing where that is not a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

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


def _told(plan: Path, manifest: "Manifest", seconds: float) -> str:
    where = f"{manifest.runtime} {manifest.version}"
    if "AMPERE_PLUS" in manifest.flags:
        where += ", GPUs from Ampere on"
    else:
        where += f", {manifest.gpu} (compute capability {manifest.compute_capability})"
    lines = [f"{plan}: {plan.stat().st_size / 1e6:.1f} MB in {seconds:.1f} s, for {where}"]
    if manifest.profiles:
        lines += [f"  profile {profile}" for profile in manifest.profiles]
    else:
        lines.append(f"  batch fixed at {manifest.max_batch_size} rows")
    return "\n".join(lines)
