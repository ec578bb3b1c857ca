"""Faults of clients, disks, files and limits: the server goes on, or names the fault.

`python -m benchmarks.trials.faults [--count 1000] [--seed 1]`: resets at random points, clients that freeze
within a body, no file descriptors left, full disks, damaged models, plans and settings. Where a server runs,
a good caller beside the faults must be answered all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

from benchmarks.common.processes import ROOT, Server, free_ports
from benchmarks.common.procstat import cpu_us
from benchmarks.trials import damaged_files, disks
from benchmarks.trials.client import Client, LostError, ask, get, post
from benchmarks.trials.models import cases
from benchmarks.trials.trial import Report, command, served

COUNT = 1_000
_WAIT_S = 20.0
_RECEIVE_S = 3.0
_STOP_S = 60.0
_FROZEN = 16
_LINES = 300  # of log
_DESCRIPTORS = 24  # free ones
_BODY = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}]}'
_INFER = post("/v2/models/m/infer", _BODY)
_NUMBERS = b",".join([b"1.5"] * 50_000)
_LARGE = post(
    "/v2/models/m/infer", _BODY.replace(b"[1,2]}", b"[" + _NUMBERS + b"]}").replace(b"[1,2]", b"[1,50000]")
)
# Sends a half of each request, waits to be woken, sends the rest and prints the statuses.
_FREEZER = """
import socket, sys
port, count, request = int(sys.argv[1]), int(sys.argv[2]), sys.stdin.buffer.read()
clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
for client in clients:
    client.sendall(request[: len(request) // 2])
print("half", flush=True)
import signal
signal.sigwait([signal.SIGUSR1])
for client in clients:
    try:
        client.sendall(request[len(request) // 2 :])
        print(client.recv(65536).split(b" ")[1].decode(), flush=True)
    except (OSError, IndexError):
        print("closed", flush=True)
"""


@contextlib.asynccontextmanager
async def good_caller(report: Report, address: str) -> AsyncIterator[None]:
    """Infer again and again meanwhile; each request must be answered, with 200 and in time."""
    stop, answered = False, asyncio.Event()

    async def call() -> None:
        client = await Client.connect(address)
        while not stop:
            began_s = time.monotonic()
            client.send(_INFER)
            try:
                answer = await client.answer()
            except LostError as error:
                report.find("the good caller is not answered", error)
                return
            finally:
                answered.set()
            waited_s = time.monotonic() - began_s
            report.counts["answers to the good caller"] += 1
            if answer.status != 200 or waited_s > _WAIT_S:
                report.find("the good caller is refused or waits", f"{waited_s:.1f} s: {answer}")
            await asyncio.sleep(0.005)

    task = asyncio.create_task(call())
    await answered.wait()
    yield
    stop = True
    await task


async def resets(report: Report, rng: random.Random, server: Server, count: int) -> None:
    """Reset connections within headers and bodies, while answers are due, and while they are sent."""
    host, _, port = server.address.rpartition(":")

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        data = rng.choice([_INFER, _INFER * 20, _LARGE, _LARGE * 3])
        writer.write(data if rng.random() < 0.3 else data[: rng.randrange(1, len(data))])
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.01)
        if rng.random() < 0.2:
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(reader.read(100), 1)
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        report.counts["connections reset"] += 1

    open_before = descriptors_of(server)
    for _ in range(count // 16):
        await asyncio.gather(*[one() for _ in range(16)])
    # The last ones end when their answers cannot be written.
    for _ in range(50):
        if descriptors_of(server) <= open_before:
            return
        await asyncio.sleep(0.2)
    report.find(
        "connections stay open after resets", f"{open_before} to {descriptors_of(server)} descriptors"
    )


def descriptors_of(server: Server) -> int:
    """Return the number of open file descriptors of the server."""
    return sum(1 for _ in Path(f"/proc/{server.pid}/fd").iterdir())


async def frozen(report: Report, server: Server) -> None:
    """Stop client processes in the middle of their bodies, for less and for more than the time allowed."""

    async def freeze(pause_s: float, expected: set[str]) -> None:
        port = server.address.rpartition(":")[2]
        command = [sys.executable, "-c", "import signal\nsignal.pthread_sigmask(0, [10])\n" + _FREEZER]
        child = await asyncio.create_subprocess_exec(*command, port, str(_FROZEN), stdin=-1, stdout=-1)
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(_LARGE)
        child.stdin.close()
        await child.stdout.readline()
        child.send_signal(signal.SIGSTOP)
        await asyncio.sleep(pause_s)
        child.send_signal(signal.SIGCONT)
        child.send_signal(signal.SIGUSR1)
        statuses = (await child.stdout.read()).decode().split()
        await child.wait()
        report.counts[f"clients frozen for {pause_s:g} s"] += len(statuses)
        if len(statuses) != _FROZEN or not set(statuses) <= expected:
            report.find("a frozen client is answered otherwise", f"{pause_s} s: {statuses}")

    await asyncio.gather(freeze(0.5, {"200"}), freeze(_RECEIVE_S * 2.5, {"408", "closed"}))


async def descriptors(report: Report, server: Server) -> None:
    """Take all file descriptors that the server may open: it must not spin, and take new clients later."""
    used = descriptors_of(server)
    hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[1]
    before = resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used + _DESCRIPTORS, hard))
    port = int(server.address.rpartition(":")[2])
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(_DESCRIPTORS * 4)]
    cpu_before, began_s = cpu_us(server.pid), time.monotonic()
    await asyncio.sleep(1.0)
    share = (cpu_us(server.pid) - cpu_before) / (time.monotonic() - began_s) / 1e6
    report.counts["connections beyond the descriptors"] += len(clients)
    report.counts["percent of a core meanwhile"] = round(share * 100)
    if share > 0.6:
        report.find("the server spins without file descriptors", f"{share:.2f} of a core")
    for client in clients:
        client.close()
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, before)
    answer = await ask(server.address, get("/v2/health/ready"))
    if answer.status != 200:
        report.find("no new client after the descriptors are back", answer)


def full_disk(report: Report) -> None:
    """Serve with stdout and stderr on a full disk."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="cobatch-full-") as folder, Path("/dev/full").open("wb") as full:
        path = Path(folder, "m.onnx")
        path.write_bytes(_model())
        line = [sys.executable, "-m", "cobatch", "serve", str(path), "--port", str(port)]
        with subprocess.Popen([*line, "--access-log", "text"], cwd=ROOT, stdout=full, stderr=full) as process:
            try:
                asyncio.run(_use(report, f"127.0.0.1:{port}", process))
            except LostError as error:
                report.find("a full disk for logs stops the server", error)
            process.terminate()
            if status := process.wait(_STOP_S):
                report.find("a full disk for logs changes the exit status", status)


async def _use(report: Report, address: str, process: subprocess.Popen[bytes]) -> None:
    await _until_ready(address, process)
    async with good_caller(report, address):
        for n in range(_LINES):
            await ask(address, [b"nonsense\r\n\r\n", get("/nowhere")][n % 2])
            report.counts["requests with a full disk for logs"] += 1


async def _until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server is ready. Raises LostError if it ends before."""
    for _ in range(600):
        if process.poll() is not None:
            raise LostError(f"the server ended with {process.returncode}")
        with contextlib.suppress(OSError, LostError):
            if (await ask(address, get("/v2/health/ready"))).status == 200:
                return
        await asyncio.sleep(0.1)
    raise LostError("the server is not ready after a minute")


def _model() -> bytes:
    return next(case.content for case in cases() if case.name == "same-FP32")


def trial(count: int, seed: int) -> Report:
    """Run the trial with `count` resets, and damaged files in proportion."""
    report, rng = Report(), random.Random(seed)
    with served("faults", {"m": (_model(), "")}, server=f"receive_timeout_s = {_RECEIVE_S}") as (server, _):

        async def main() -> None:
            faults: list[Callable[[], Coroutine[None, None, None]]] = [
                lambda: resets(report, rng, server, count),
                lambda: frozen(report, server),
                lambda: descriptors(report, server),
            ]
            for fault in faults:
                async with good_caller(report, server.address):
                    await fault()

        asyncio.run(main())
        report.check_log(server)
    full_disk(report)
    damaged_files.try_models(report, rng, count // 2)
    damaged_files.try_settings(report, rng, count)
    damaged_files.try_commands(report, rng, count // 100)
    disks.try_disks(report, rng, count // 2)
    return report


if __name__ == "__main__":
    sys.exit(command("faults", __doc__, COUNT, trial, "resets; damaged files in proportion", sys.argv[1:]))
