"""An open loop: requests leave when they should, whatever comes back, and are timed from that moment.

`python -m benchmarks.steady ADDRESS FILE --rate N --seconds N`: FILE holds the requests, each a line in
base64 with all that goes over the wire; they are sent in turn, at a constant rate, or at the seconds that the
lines of `--times FILE` give, over a free connection where there is one. Prints one line of JSON; `--records
FILE` has each answer's status and seconds. It waits with `select`, whose time-outs are not rounded to
milliseconds, for `epoll`, which does not look at each connection.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HEAD = re.compile(rb"HTTP/1\.1 (\d+).*?content-length: (\d+)\r\n", re.DOTALL | re.IGNORECASE)
_LATE_S = 5.0


@dataclass(frozen=True, slots=True)
class Steady:
    """What came of one run. Times are microseconds from the intended moment of sending."""

    requests: int
    p50_us: float
    p99_us: float
    max_us: float
    statuses: dict[str, int]


class Running:
    """A generator in a process of its own."""

    def __init__(
        self,
        address: str,
        requests: Sequence[bytes],
        rate: float,
        seconds: float,
        connections: int,
        more: Sequence[str] = (),
    ) -> None:
        self._file = tempfile.NamedTemporaryFile("wb", suffix=".requests")  # noqa: SIM115 - closed in `result`
        self._file.write(b"\n".join(map(base64.b64encode, requests)))
        self._file.flush()
        command = [sys.executable, "-m", "benchmarks.steady", address, self._file.name, f"--rate={rate}"]
        command += [f"--seconds={seconds}", f"--connections={connections}", *more]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def result(self) -> Steady:
        """Wait for its end."""
        said, _ = self._process.communicate()
        self._file.close()
        return Steady(**json.loads(said))


class _Connection:
    """Where a server that does not accept connections keeps nobody else's request from leaving in time."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.socket.connect_ex(address)
        self.connected = False
        self.due: deque[float] = deque()
        self.data = b""
        self._unsent = b""

    def send(self, data: bytes) -> None:
        """Now, or once it is connected. That the server has closed it is seen where its answers are read."""
        if not self.connected:
            self._unsent += data
            return
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def connect(self) -> None:
        """The attempt has ended, well or not; what then is read shows which."""
        self.connected = True
        self.socket.setblocking(True)
        self.send(self._unsent)

    def answered(self) -> list[int] | None:
        """Statuses of the answers that have come whole; None when the server has closed it."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        self.data += data
        statuses: list[int] = []
        while True:
            end = self.data.find(b"\r\n\r\n")
            found = _HEAD.match(self.data[: end + 2]) if end >= 0 else None
            if found is None or len(self.data) < end + 4 + int(found[2]):
                return statuses
            statuses.append(int(found[1]))
            self.data = self.data[end + 4 + int(found[2]) :]


def drive(
    address: tuple[str, int], requests: Sequence[bytes], times_s: Sequence[float], connections: int
) -> list[tuple[int, float]]:
    """Send at these times, one request after another: statuses and seconds of the answers."""
    events = select.epoll()  # first: `select` takes small numbers only
    by_number: dict[int, _Connection] = {}

    def connect() -> _Connection:
        connection = _Connection(address)
        by_number[connection.socket.fileno()] = connection
        events.register(connection.socket, select.EPOLLOUT)
        return connection

    # The one that was used last is the next: the server may close what has been idle for long.
    free = deque(connect() for _ in range(connections))
    answers: list[tuple[int, float]] = []
    total = len(times_s)
    began = time.perf_counter() + 0.05
    sent = 0
    while len(answers) < total:
        while sent < total and began + times_s[sent] <= time.perf_counter():
            connection = free.pop() if free else connect()
            connection.due.append(began + times_s[sent])
            connection.send(requests[sent % len(requests)])
            sent += 1
        wait_s = began + times_s[sent] - time.perf_counter() if sent < total else _LATE_S
        if not select.select([events], [], [], max(0.0, wait_s))[0] and sent == total:
            break
        for number, _ in events.poll(0):
            connection = by_number[number]
            if not connection.connected:
                connection.connect()
                events.modify(connection.socket, select.EPOLLIN)
                continue
            statuses = connection.answered()
            now = time.perf_counter()
            if statuses is None:
                answers += [(0, now - due) for due in connection.due]
                if not connection.due:
                    free.remove(connection)
                events.unregister(connection.socket)
                del by_number[number]
                connection.socket.close()
                continue
            answers += [(status, now - connection.due.popleft()) for status in statuses]
            if statuses and not connection.due:
                free.append(connection)
    for one in by_number.values():
        one.socket.close()
    return answers


def summary(answers: Sequence[tuple[int, float]]) -> Steady:
    """Of all answers, whatever their status."""
    ordered = sorted(took for _, took in answers)
    return Steady(
        len(ordered),
        ordered[len(ordered) // 2] * 1e6,
        ordered[int(len(ordered) * 0.99)] * 1e6,
        ordered[-1] * 1e6,
        dict(Counter(str(status) for status, _ in answers)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steady")
    parser.add_argument("address")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--times", type=Path)
    parser.add_argument("--records", type=Path)
    options = parser.parse_args()
    host, _, port = options.address.rpartition(":")
    requests = [base64.b64decode(line) for line in options.file.read_bytes().splitlines()]
    times_s = [number / options.rate for number in range(int(options.rate * options.seconds))]
    if options.times is not None:
        times_s = [float(line) for line in options.times.read_text().splitlines()]
    answers = drive((host, int(port)), requests, times_s, options.connections)
    if options.records is not None:
        options.records.write_text("".join(f"{status} {took:.6f}\n" for status, took in answers))
    result = summary(answers)
    print(json.dumps({name: getattr(result, name) for name in Steady.__slots__}))


if __name__ == "__main__":
    main()
