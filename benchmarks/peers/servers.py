"""The servers compared: started, paused between their turns, and ended with all their processes."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.offline import default_threads
from benchmarks.common.processes import ROOT, free_ports, stop
from benchmarks.common.procstat import descendants, memory_bytes
from benchmarks.peers.catalogue import Body, Peer
from benchmarks.peers.environments import FOLDER, MissingError

_APPS = Path(__file__).parent / "apps"
_COUNTS = struct.Struct("=qq")
_STOP_S = 30.0
OUR_PYTHON = Path(sys.executable)


@dataclass(frozen=True, slots=True)
class Counts:
    """Runs and rows of the model so far."""

    runs: int
    rows: int


@dataclass(frozen=True, slots=True)
class Running:
    """A server with one model, ready to answer."""

    peer: Peer
    model: str
    pid: int
    address: str
    counts_file: Path

    def path(self, body: Body) -> str:
        return self.peer.paths[body].format(model=self.model)

    def url(self, body: Body) -> str:
        return f"http://{self.address}{self.path(body)}"

    def counts(self) -> Counts:
        """Return the model's counts: from cobatch's statistics, or from the file of a server's app."""
        if self.peer.is_ours:
            stats = json.loads(wire.get(self.address, f"/v2/models/{self.model}/stats")[1])["model_stats"][0]
            return Counts(stats["execution_count"], stats["inference_count"])
        return Counts(*_COUNTS.unpack(self.counts_file.read_bytes()))

    def memory(self) -> int:
        """Return the memory of all its processes in bytes, shared memory counted once."""
        return sum(memory_bytes(each) for each in descendants(self.pid))

    def pause(self) -> None:
        """Stop all its processes, so that they use no CPU while others are measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self.peer.frozen:
            for each in descendants(self.pid):
                _kill(each, number)


@contextmanager
def started(
    peer: Peer, model: str, python: Path, max_batch: int, deadline_ms: int = 0, max_queue: int = 0
) -> Iterator[Running]:
    """Start a server with this model. Raises MissingError if it does not start.

    `deadline_ms` and `max_queue` (concurrent requests) are set in the server's own way; 0: not set.
    """
    folder = FOLDER / peer.name
    folder.mkdir(parents=True, exist_ok=True)
    counts, log = folder / f"{model}.counts", folder / f"{model}.log"
    counts.write_bytes(bytes(_COUNTS.size))
    port, *spare = free_ports(3)
    settings = {
        "PEER_PORT": str(port),
        "PEER_SPARE_PORT": str(spare[0]),
        "PEER_SPARE_PORT_2": str(spare[1]),
        "PEER_FOLDER": str(folder),
        "PEER_MODEL": str(model_path(model)),
        "PEER_MODEL_NAME": model,
        "PEER_MAX_BATCH": str(max_batch),
        "PEER_DEADLINE_MS": str(deadline_ms),
        "PEER_MAX_QUEUE": str(max_queue),
        "PEER_THREADS": str(default_threads()),
        "PEER_COUNTS": str(counts),
    }
    command = [str(python), peer.app]
    if peer.is_ours:
        command = [str(python), "-m", "cobatch", "serve", settings["PEER_MODEL"], f"--name={model}"]
        command += [f"--port={port}", f"--max-batch-size={max_batch}", *peer.flags]
        command += [f"--max-queue-rows={max_queue}"] if max_queue else []
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT if peer.is_ours else _APPS,
            env=_environment(python) | settings,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        running = Running(peer, model, process.pid, f"127.0.0.1:{port}", counts)
        _wait_until_ready(running, process, log)
        yield running
    finally:
        _end(process)


def _environment(python: Path) -> dict[str, str]:
    """Return the environment without settings of the user, and with the server's programs first in PATH."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("COBATCH_", "PYTHON", "VIRTUAL_ENV"))
    }
    path = f"{python.parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"PATH": path, "PYTHONUNBUFFERED": "1", "BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1"}


def _wait_until_ready(running: Running, process: subprocess.Popen[bytes], log: Path) -> None:
    peer = running.peer
    give_up = time.monotonic() + peer.start_s
    while process.poll() is None and time.monotonic() < give_up:
        if wire.get(running.address, peer.ready.format(model=running.model))[0] == 200:
            return
        time.sleep(0.05)
    status = process.poll()
    why = f"exited with status {status}" if status is not None else f"was not ready in {peer.start_s:.0f} s"
    last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-4:])
    raise MissingError(f"{peer.title} {why}: {last} ({log})")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a server, and kill the processes that it leaves."""
    pids = descendants(process.pid)
    began = {each: _start_time(each) for each in pids}
    for each in pids:
        _kill(each, signal.SIGCONT)
    stop(process, _STOP_S)
    for each in pids[1:]:
        # The same pid may be that of another process by now, with another start time.
        if began[each] is not None and _start_time(each) == began[each]:
            _kill(each, signal.SIGKILL)


def _start_time(pid: int) -> str | None:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
