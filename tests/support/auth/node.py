"""Programs for node that tests start: where node is, and their packages, installed once."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

INSTALL_DEADLINE_S = 300.0
# Ends with status 1 where node lacks what oidc-provider is written with: that came with 22, and later to 20.
TOO_OLD = "process.exit(URL.parse ? 0 : 1)"


def installed(folder: Path) -> str:
    """Install this folder's packages if they are not what its lock file says; node's path.

    Skips the test where that cannot be done, and fails it under CI.
    """
    node, why_not = _installed(folder)
    if why_not and os.environ.get("CI"):
        pytest.fail(why_not)
    if why_not:
        pytest.skip(why_not)
    return node


@functools.cache
def _installed(folder: Path) -> tuple[str, str]:
    """Node, and why it cannot be used. Tried once: npm is slow to find that there is no network."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        return "", "needs node and npm: apt-get install nodejs npm"
    if subprocess.run([node, "-e", TOO_OLD], env=environ(), check=False).returncode:
        return "", "needs node 22 or newer, or a late 20: npm install --global node@22"
    lock = folder / "package-lock.json"
    stamp = folder / "node_modules" / ".cobatch-installed"
    # Of two runs at once one installs and the other waits.
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
    """What npm says where it fails."""
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
    """The environment without what changes how node runs."""
    return {name: value for name, value in os.environ.items() if name != "NODE_OPTIONS"}
