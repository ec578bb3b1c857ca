"""Run test_gpu.py in a process with the fake GPU, so that its logic is exercised without a real one.

Speed is measured there but not judged: it would be a property of this machine's load.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.gpu.tier import environment
from tests.support.paths import ROOT

# Left out: tests that the stand-ins cannot run (BF16 through ONNX Runtime, our own kernel for the illegal
# access) and tests that only take long.
PARTS = "batching or cache or compatible or types or profiles or steady or memory"


@pytest.mark.slow
def test_the_gpu_tests_pass_on_the_fake_gpu(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    environ = environment() | {
        "GPU_CHECK": "1",
        "GPU_FAKE": "1",
        "GPU_SECONDS": "1",
        "GPU_SUSTAINED_SECONDS": "0.12",
        "GPU_REPORT": str(lines),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-m",
        "gpu",
        "-q",
        "-k",
        PARTS,
        "tests/engines/tensorrt/test_gpu.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    noted = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {section for section, _ in noted} == {
        "batching",
        "build",
        "accuracy",
        "profiles",
        "sustained",
        "faults",
    }
