"""The servers under test: processes on free loopback ports, with their output in files."""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import wire
from benchmarks.common.models import OUT

ROOT = Path(__file__).parents[2]
_LISTENING = re.compile(r"listening on http://(\S+)")
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 40.0


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of comma-separated names for argparse."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := sorted(set(names) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return names

    return parse


class StartError(Exception):
    """A server did not start; the text has its last lines."""


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that were free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def stop(process: subprocess.Popen[bytes], limit_s: float) -> None:
    """Terminate a process, and kill it if it has not ended within the limit."""
    process.terminate()
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, its HOST:PORT and the file with its output."""

    pid: int
    address: str
    log: Path


@contextmanager
def floor(size: int, content_type: str) -> Iterator[Server]:
    """Start bare uvicorn that answers with `size` fixed bytes."""
    with _running("floor", ["benchmarks.request_cost.floor_app", str(size), content_type], None) as server:
        yield server


@contextmanager
def cobatch(
    model: Path | None,
    name: str | None,
    fast_path: bool,
    config: Path | None = None,
    flags: Sequence[str] = (),
) -> Iterator[Server]:
    """Start `cobatch serve` with a model, or those of `config`, and the settings there and in `flags`."""
    switch = "--fast-path" if fast_path else "--no-fast-path"
    command = ["cobatch", "serve", *([] if model is None else [str(model)]), "--port", "0", switch]
    if name is not None:
        command += ["--name", name]
    if config is not None:
        command += ["--config", str(config)]
    command += flags
    with _running("cobatch" if fast_path else "cobatch-asgi", command, "/v2/health/ready") as server:
        yield server


@contextmanager
def configured(name: str, config: Path, flags: Sequence[str] = ()) -> Iterator[Server]:
    """Start `cobatch serve --config CONFIG` on a free port; `name` is that of its log."""
    command = ["cobatch", "serve", "--config", str(config), "--port", "0", *flags]
    with _running(name, command, "/v2/health/ready") as server:
        yield server


@contextmanager
def _running(name: str, module: list[str], ready: str | None) -> Iterator[Server]:
    log = OUT / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # The settings of the user's own server must not change the measurement.
    environ = {key: value for key, value in os.environ.items() if not key.startswith("COBATCH_")}
    environ["PYTHONUNBUFFERED"] = "1"
    # An installed package has its bytecode; to compile it takes longer than all the rest of a start.
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    environ["PYTHONPYCACHEPREFIX"] = str(OUT / "bytecode")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Server(process.pid, _wait_until_up(name, process, log, ready), log)
    finally:
        stop(process, _STOP_TIMEOUT_S)


def _wait_until_up(name: str, process: subprocess.Popen[bytes], log: Path, ready: str | None) -> str:
    """Return HOST:PORT once the server listens and answers 200 at `ready`."""
    give_up = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up:
        line = _LISTENING.search(log.read_text(errors="replace"))
        if line and (ready is None or wire.get(line[1], ready)[0] == 200):
            return line[1]
        time.sleep(0.02)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    status = process.poll()
    why = f"exited with status {status}" if status is not None else f"not ready in {_START_TIMEOUT_S:.0f} s"
    raise StartError(f"{name}: {why}; it printed:\n{tail}")
