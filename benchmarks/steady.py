"""An open loop: requests leave at a constant rate whatever comes back, and are timed from when they should.

`python -m benchmarks.steady ADDRESS FILE --rate N --seconds N`: FILE holds the requests, each a line in
base64 with all that goes over the wire; they are sent in turn. Prints one line of JSON. `select` and not
`epoll`, because its time-outs are not rounded to milliseconds.
"""

from __future__ import annotations

import argparse
import base64
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
        self, address: str, requests: Sequence[bytes], rate: float, seconds: float, connections: int
    ) -> None:
        self._file = tempfile.NamedTemporaryFile("wb", suffix=".requests")  # noqa: SIM115 - closed in `result`
        self._file.write(b"\n".join(map(base64.b64encode, requests)))
        self._file.flush()
        command = [sys.executable, "-m", "benchmarks.steady", address, self._file.name, f"--rate={rate}"]
        command += [f"--seconds={seconds}", f"--connections={connections}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def result(self) -> Steady:
        """Wait for its end."""
        said, _ = self._process.communicate()
        self._file.close()
        return Steady(**json.loads(said))


class _Connection:
    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due: deque[float] = deque()
        self.data = b""

    def answered(self) -> list[int]:
        """Statuses of the answers that have come whole."""
        self.data += self.socket.recv(1 << 16)
        statuses: list[int] = []
        while True:
            end = self.data.find(b"\r\n\r\n")
            found = _HEAD.match(self.data[: end + 2]) if end >= 0 else None
            if found is None or len(self.data) < end + 4 + int(found[2]):
                return statuses
            statuses.append(int(found[1]))
            self.data = self.data[end + 4 + int(found[2]) :]


def drive(
    address: tuple[str, int], requests: Sequence[bytes], rate: float, seconds: float, connections: int
) -> Steady:
    """Send at a constant rate, one request after another over the connections in turn."""
    open_ = [_Connection(address) for _ in range(connections)]
    by_socket = {one.socket: one for one in open_}
    took: list[float] = []
    statuses: Counter[str] = Counter()
    total = int(rate * seconds)
    began = time.perf_counter() + 0.05
    sent = 0
    while len(took) < total:
        now = time.perf_counter()
        while sent < total and began + sent / rate <= now:
            connection = open_[sent % connections]
            connection.due.append(began + sent / rate)
            connection.socket.sendall(requests[sent % len(requests)])
            sent += 1
        wait_s = began + sent / rate - time.perf_counter() if sent < total else _LATE_S
        ready, _, _ = select.select(list(by_socket), [], [], max(0.0, wait_s))
        if not ready and sent == total:
            break
        for each in ready:
            connection = by_socket[each]
            for status in connection.answered():
                took.append(time.perf_counter() - connection.due.popleft())
                statuses[str(status)] += 1
    for one in open_:
        one.socket.close()
    ordered = sorted(took)
    return Steady(
        len(took),
        ordered[len(ordered) // 2] * 1e6,
        ordered[int(len(ordered) * 0.99)] * 1e6,
        ordered[-1] * 1e6,
        dict(statuses),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steady")
    parser.add_argument("address")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--connections", type=int, default=16)
    options = parser.parse_args()
    host, _, port = options.address.rpartition(":")
    requests = [base64.b64decode(line) for line in options.file.read_bytes().splitlines()]
    result = drive((host, int(port)), requests, options.rate, options.seconds, options.connections)
    print(json.dumps({name: getattr(result, name) for name in Steady.__slots__}))


if __name__ == "__main__":
    main()
