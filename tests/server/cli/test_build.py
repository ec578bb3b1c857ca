"""`cobatch build`: the plan, its manifest, the progress bar and the error messages."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cobatch.server.cli import app
from tests.support.models import models
from tests.support.models.plan_models import RTX, convolution, magika_path, require_builder, unsupported

require_builder()


def build(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["build", *map(str, arguments), "--runtime", RTX])


def refused(result: Result, status: int = 1) -> str:
    assert result.exit_code == status, result.output
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    return line


def test_magika_with_its_manifest(tmp_path: Path) -> None:
    plan = tmp_path / "magika.plan"
    result = build(magika_path(), "-o", plan, "--profile", "1/1/8", "--profile", "8/32/64")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert re.fullmatch(rf"{re.escape(str(plan))}: \d\.\d MB in \d+\.\d s, for tensorrt-rtx .*", lines[0])
    assert lines[1:] == ["  profile bytes:1x2048/1x2048/8x2048", "  profile bytes:8x2048/32x2048/64x2048"]
    manifest = json.loads((tmp_path / "magika.plan.json").read_text())
    assert manifest["runtime"] == RTX
    assert manifest["max_batch_size"] == 64
    assert manifest["flags"] == ["AMPERE_PLUS"]
    assert len(manifest["model_sha256"]) == len(manifest["plan_sha256"]) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["magika.plan", "magika.plan.json"]


def test_the_plan_lies_beside_the_model_by_default(tmp_path: Path) -> None:
    model = models.write(tmp_path, models.negate(batch=4))
    result = build(model)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1] == "  batch fixed at 4 rows"
    assert (tmp_path / "model.plan").stat().st_mode & 0o777 == 0o600


def test_error_messages(tmp_path: Path) -> None:
    conv = models.write(tmp_path, convolution(), "conv.onnx")
    assert "--profile image:Nx3xNxN/Nx3xNxN/Nx3xNxN" in refused(build(conv))
    assert "did you mean 'image'" in refused(build(conv, "--profile", "imag:1x3x8x8/2x3x8x8/4x3x8x8"))
    odd = models.write(tmp_path, unsupported(), "odd.onnx")
    assert "node 'blocks.0/det' (Det): unsupported node" in refused(build(odd))
    assert refused(build(tmp_path / "gone.onnx")) == f"cobatch: {tmp_path}/gone.onnx: no file there"
    assert refused(build(tmp_path)) == f"cobatch: {tmp_path}: a folder"
    output = refused(build(conv, "-o", tmp_path / "x.bin"), 2)
    assert output.endswith("x.bin: a plan's name ends in .plan or .engine")
    output = refused(build(conv, "-o", tmp_path / "none" / "x.plan"))
    assert output == f"cobatch: cannot write into {tmp_path}/none"
    assert "tensorrt-rtx has no timing cache" in refused(
        build(magika_path(), "-o", tmp_path / "x.plan", "--timing-cache", "t")
    )
    assert not list(tmp_path.glob("*.plan*"))


def test_a_row_profile_out_of_order(tmp_path: Path) -> None:
    model = models.write(tmp_path, models.negate())
    output = refused(build(model, "--profile", "4/2/8"))
    assert "axis 0 of input 'x': min 4, opt 2, max 8 are not in ascending order" in output


@pytest.mark.parametrize("arguments", [("--max-batch-size", "0"), ("--workspace-mb", "x"), ()])
def test_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    model = [models.write(tmp_path, models.negate())] if arguments else []
    assert build(*model, *arguments).exit_code == 2


def test_an_unknown_or_missing_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.write(tmp_path, models.negate())
    result = CliRunner().invoke(app, ["build", model, "--runtime", "cuda"])
    assert (
        refused(result)
        == "cobatch: unknown runtime 'cuda'; expected one of tensorrt, tensorrt-lean, tensorrt-rtx"
    )
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "pip install 'cobatch[tensorrt]'" in refused(CliRunner().invoke(app, ["build", model]))


# Sends itself SIGINT when the build has begun, so that the handler runs inside TensorRT's calls.
INTERRUPTED = """
import os, signal, sys
import cobatch.engines.tensorrt.plans.build as progress
start = progress.Phases.start
def begun(self, *arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return start(self, *arguments)
progress.Phases.start = begun
from cobatch.server.cli import main
sys.argv[1:] = sys.argv[1:]
main()
"""


def test_ctrl_c_ends_a_build_cleanly(tmp_path: Path) -> None:
    plan = tmp_path / "magika.plan"
    command = [
        sys.executable,
        "-c",
        INTERRUPTED,
        "build",
        str(magika_path()),
        "-o",
        str(plan),
        "--runtime",
        RTX,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "cobatch: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_the_bar_on_a_terminal(tmp_path: Path) -> None:
    """Run with a terminal as stderr; TensorRT's progress reports move the bar."""
    ours, theirs = pty.openpty()
    plan = tmp_path / "magika.plan"
    command = [
        sys.executable,
        "-m",
        "cobatch",
        "build",
        str(magika_path()),
        "-o",
        str(plan),
        "--runtime",
        RTX,
    ]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = _read_all(ours)
        assert process.stdout is not None
        printed = process.stdout.read().decode()
    assert process.returncode == 0
    assert str(plan) in printed
    assert "model.onnx" in shown
    assert "100%" in shown
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _read_all(terminal: int) -> str:
    parts = []
    with os.fdopen(terminal, "rb", buffering=0) as stream:
        while True:
            try:
                part = stream.read(4096)
            except OSError:  # Linux's way to say that the other side is closed
                break
            if not part:
                break
            parts.append(part)
    return b"".join(parts).decode()
