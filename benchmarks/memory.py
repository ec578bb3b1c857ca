"""The memory that large bodies take and leave behind: `python -m benchmarks.memory [--way fast,asgi]`.

Resident set size of a server with default settings, fast path and ASGI, in MiB:

* before anything; after forty connections have sent 24 MiB each, one after another, and are idle; after they
  were closed; the same with eight sending at once
* while a hundred connections have stalled at 63 of 64 MiB, and for how long a small request, and a large one
  from another address, wait meanwhile
* while two hundred connections have each sent 64 KB that decompress to 7 MB of JSON, with 256 MiB for bodies
"""

from __future__ import annotations

import argparse
import gzip
import random
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from onnx import TensorProto, helper, save

from benchmarks.common.models import MODELS
from benchmarks.common.processes import Server, cobatch, some_of

WAYS = ("fast", "asgi")
_PATH = "/v2/models/sum/infer"
_ROWS = 4
# A request is a batch: the engine's own buffers, which it keeps, stay small beside the bodies.
FLAGS = ("--max-batch-size", str(_ROWS))
_SENT_MIB, _CONNECTIONS = 24, 40
_STALLED_MIB, _STALLED = 64, 100
_PACKED, _PACKED_NUMBERS, _RANDOM_NUMBERS = 200, 3_500_000, 100_000
_MEMORY_MIB = 256
# No byte is taken for this long: all clients are stalled.
_QUIET_S = 3.0


def sum_model() -> Path:
    """Write the model that is served: the sum of each row of any length."""
    path = MODELS / "sum.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)], "sum", [x], [y], [axes]
    )
    save(helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def request_of(mib: int) -> bytes:
    """Return a binary request with a body of about `mib` MiB."""
    size = (mib << 20) - (1 << 12)
    x = f'"name":"x","datatype":"FP32","shape":[{_ROWS},{size // 4 // _ROWS}]'
    message = f'{{"inputs":[{{{x},"parameters":{{"binary_data_size":{size}}}}}]}}'.encode()
    lines = (
        f"POST {_PATH} HTTP/1.1", "Host: test", f"Content-Length: {len(message) + size}",
        f"Inference-Header-Content-Length: {len(message)}",
    )  # fmt: skip
    return "\r\n".join((*lines, "", "")).encode() + message + bytes(size)


class Client:
    """A connection, from another loopback address if it is given."""

    def __init__(self, server: Server, source: str = "127.0.0.1") -> None:
        host, _, port = server.address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), 60, source_address=(source, 0))

    def ask(self, request: bytes) -> int:
        """Send a request and read its response; return the status."""
        self.socket.sendall(request)
        data = b""
        while b"\r\n\r\n" not in data or len(data) < _length(data):
            received = self.socket.recv(1 << 16)
            if not received:
                raise ConnectionError("the server closed the connection")
            data += received
        return int(data.split(b" ", 2)[1])


def _length(data: bytes) -> int:
    head, _, _ = data.partition(b"\r\n\r\n")
    return len(head) + 4 + int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])


def resident_mib(server: Server) -> int:
    """Return the resident set size of the server's process."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmRSS:"))


def after_large_bodies(server: Server, at_once: int) -> tuple[int, int]:
    """Return the memory with connections that sent large bodies and are idle, and after they were closed."""
    request = request_of(_SENT_MIB)
    with ExitStack() as stack, ThreadPoolExecutor(at_once) as pool:
        clients = [Client(server) for _ in range(_CONNECTIONS)]
        for client in clients:
            stack.callback(client.socket.close)
        statuses = set(pool.map(lambda client: client.ask(request), clients))
        assert statuses == {200}, statuses
        open_mib = resident_mib(server)
    time.sleep(1)
    return open_mib, resident_mib(server)


def while_stalled(server: Server) -> tuple[int, float, float]:
    """Return the memory with stalled connections, and the seconds that two other requests take meanwhile."""
    request = request_of(_STALLED_MIB)
    part = memoryview(request)[: (_STALLED_MIB - 1) << 20]
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(_STALLED):
            client = Client(server)
            stack.callback(client.socket.close)
            client.socket.setblocking(False)
            selector.register(client.socket, selectors.EVENT_WRITE, [0])
        most_mib = 0
        while ready := selector.select(_QUIET_S):
            for key, _ in ready:
                sent = key.data
                try:
                    sent[0] += key.fileobj.send(part[sent[0] : sent[0] + (1 << 18)])  # type: ignore[union-attr]
                except ConnectionError:
                    sent[0] = len(part)
                if sent[0] >= len(part):
                    selector.unregister(key.fileobj)
            most_mib = max(most_mib, resident_mib(server))
        waits = []
        for one, source in ((_small(), "127.0.0.1"), (request_of(_SENT_MIB), "127.0.0.2")):
            client = Client(server, source)
            stack.callback(client.socket.close)
            began = time.monotonic()
            status = client.ask(one)
            assert status == 200, status
            waits.append(time.monotonic() - began)
        return most_mib, waits[0], waits[1]


def while_decompressing(server: Server) -> int:
    """Return the memory while connections have sent short bodies that are long when decompressed."""
    digits = random.Random(0).choices("0123456789", k=_RANDOM_NUMBERS)
    digits += ["1"] * (_PACKED_NUMBERS - _RANDOM_NUMBERS)
    x = f'"name":"x","datatype":"FP32","shape":[1,{len(digits)}],"data":[{",".join(digits)}]'
    body = gzip.compress(f'{{"inputs":[{{{x}}}]}}'.encode())
    assert len(body) < 1 << 16, len(body)
    lines = (
        f"POST {_PATH} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", "Content-Encoding: gzip",
    )  # fmt: skip
    request = "\r\n".join((*lines, "", "")).encode() + body
    most_mib = 0
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for number in range(_PACKED):
            client = Client(server, f"127.0.0.{1 + number % 4}")  # one client may not have all places
            stack.callback(client.socket.close)
            client.socket.sendall(request)
            selector.register(client.socket, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(0.01):
                answer = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                assert answer.startswith(b"HTTP/1.1 200 "), answer[:500]
                selector.unregister(key.fileobj)
            most_mib = max(most_mib, resident_mib(server))
    return most_mib


def _small() -> bytes:
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1,2]}]}'
    head = f"POST {_PATH} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def measure(way: str) -> list[tuple[str, str]]:
    """Return the lines of one way through the server."""
    lines = []
    for at_once in (1, 8):
        with cobatch(sum_model(), "sum", way == "fast", flags=FLAGS) as server:
            before_mib = resident_mib(server)
            open_mib, closed_mib = after_large_bodies(server, at_once)
        what = f"{_CONNECTIONS} connections that sent {_SENT_MIB} MiB, {at_once} at once"
        lines += [("before", f"{before_mib} MiB")] if at_once == 1 else []
        lines += [(f"{what}: idle", f"{open_mib} MiB"), (f"{what}: closed", f"{closed_mib} MiB")]
    with cobatch(sum_model(), "sum", way == "fast", flags=FLAGS) as server:
        most_mib, small_s, large_s = while_stalled(server)
    limited = (*FLAGS, "--receive-timeout-s", "300", "--body-memory-bytes", str(_MEMORY_MIB << 20))
    with cobatch(sum_model(), "sum", way == "fast", flags=limited) as server:
        packed_mib = while_decompressing(server)
    what = f"{_STALLED} connections stalled at {_STALLED_MIB - 1} of {_STALLED_MIB} MiB"
    return [
        *lines,
        (what, f"{most_mib} MiB"),
        ("a small request meanwhile", f"{small_s * 1e3:.1f} ms"),
        (f"one of {_SENT_MIB} MiB from another address", f"{large_s * 1e3:.1f} ms"),
        (f"{_PACKED} that sent 64 KB of gzip, {_MEMORY_MIB} MiB for bodies", f"{packed_mib} MiB"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--way", type=some_of(WAYS), default=WAYS, metavar="WAY,...", help=", ".join(WAYS))
    for way in parser.parse_args(arguments).way:
        print(f"{'fast path' if way == 'fast' else 'through ASGI'}:")
        for what, figure in measure(way):
            print(f"  {what:60} {figure:>12}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
