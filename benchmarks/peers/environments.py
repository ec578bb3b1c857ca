"""A virtual environment for each server, renewed when its packages change. It cannot be moved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.common.models import OUT
from benchmarks.peers.catalogue import Peer

FOLDER = OUT / "peers"
_PYTHON = (3, 11)


class MissingError(Exception):
    """A server cannot run here; the text says why."""


def python_of(peer: Peer, environments: Path = FOLDER) -> Path:
    """Return the interpreter of a server's environment, made if missing. Raises MissingError."""
    folder = environments.absolute() / peer.name
    python = folder / "venv" / "bin" / "python"
    stamp = folder / "installed.json"
    base = _base(peer)
    key = json.dumps([base, peer.requirements])
    if stamp.exists() and stamp.read_text() == key and python.exists():
        return python
    stamp.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{peer.title}: installing {', '.join(peer.requirements)} into {folder}", flush=True)
    _run([base, "-m", "venv", "--clear", str(folder / "venv")], folder / "pip.log")
    _run([str(python), "-m", "pip", "install", "-q", *peer.requirements], folder / "pip.log")
    stamp.write_text(key)
    return python


def versions_of(peer: Peer, python: Path) -> dict[str, str]:
    """Return the versions of a server's package, the engine and the interpreter."""
    code = (
        "import sys, json, importlib.metadata as m;"
        f"print(json.dumps({{n: m.version(n) for n in {[peer.package, 'onnxruntime', 'numpy']!r}}}"
        "| {'python': sys.version.split()[0]}))"
    )
    output = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    versions: dict[str, str] = json.loads(output)
    return versions


def _base(peer: Peer) -> str:
    if peer.python is None:
        return getattr(sys, "_base_executable", sys.executable)
    program = shutil.which(peer.python)
    if program is None:
        raise MissingError(f"{peer.title} needs {peer.python}, which is not installed")
    return program


def _run(command: list[str], log: Path) -> None:
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise MissingError(f"{' '.join(command[:4])} failed: {' '.join(last)}")
