"""The generated tables in docs/ are up to date."""

import subprocess
import sys

from tests.support.paths import ROOT


def test_generated_tables_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
