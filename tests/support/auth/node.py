"""Find node and install the packages of the node programs that tests start."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

INSTALL_DEADLINE_S = 300.0
# Exits with status 1 where node lacks an API that oidc-provider needs (in 22, and in late versions of 20).
TOO_OLD = "process.exit(URL.parse ? 0 : 1)"


def installed(folder: Path) -> str:
    """Install this folder's packages unless they match its lock file; return node's path.

    Skips the test where that is not possible; under CI it fails.
    """
    node, why_not = _installed(folder)
    if why_not and os.environ.get("CI"):
        pytest.fail(why_not)
    if why_not:
        pytest.skip(why_not)
    return node


@functools.cache
def _installed(folder: Path) -> tuple[str, str]:
    """Return node's path and the reason why it cannot be used, if any. Tried once: npm is slow offline."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        return "", "needs node and npm: apt-get install nodejs npm"
    if subprocess.run([node, "-e", TOO_OLD], env=environ(), check=False).returncode:
        return "", "needs node 22 or newer, or a late 20: npm install --global node@22"
    lock = folder / "package-lock.json"
    stamp = folder / "node_modules" / ".cobatch-installed"
    # Of two test runs one installs and the other waits.
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        wanted = lock.read_text()
        if stamp.exists() and stamp.read_text() == wanted:
            return node, ""
        why_not = _install(npm, folder)
        if not why_not:
            stamp.write_text(wanted)
    return node, why_not


def _install(npm: str, folder: Path) -> str:
    """Run npm; return its output if it fails, else ""."""
    done = subprocess.run(
        [npm, "ci", "--prefer-offline", "--fetch-retries=1"],
        cwd=folder,
        env=environ(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=INSTALL_DEADLINE_S,
        check=False,
    )
    return f"npm ci failed in {folder}:\n{done.stdout[-2000:]}" if done.returncode else ""


def environ() -> dict[str, str]:
    """Return the environment without NODE_OPTIONS."""
    return {name: value for name, value in os.environ.items() if name != "NODE_OPTIONS"}
