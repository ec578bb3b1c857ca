"""Refused bodies behind proxies: `python -m benchmarks.proxies [--proxies NAME,...] [--repeats N]`.

Sends 80 MiB to a server that takes 64, through each proxy that is installed, with Content-Length and in
chunks, on the fast path and through ASGI, and counts the responses that are the server's own problem
document: 413, body-too-large. Other outcomes (a proxy's 502 or 503, a reset) are counted by name, and make
the exit status 1.
"""

from __future__ import annotations

import argparse
import select
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.models import model_path
from benchmarks.common.processes import cobatch, some_of
from benchmarks.proxies.running import PROXIES, running

WAYS = ("fast", "asgi")
_PATH = "/v2/models/tiny/infer"
_BODY_BYTES = 80 << 20
_PIECE = bytes(1 << 18)
_TIMEOUT_S = 60.0
_EXPECTED = "413 body-too-large"


def answer_to(port: int, chunked: bool) -> str:
    """Send the body until a response comes, as curl does; return its status and problem, or the error."""
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {_BODY_BYTES}"
    head = f"POST {_PATH} HTTP/1.1\r\nHost: test\r\nInference-Header-Content-Length: 100\r\n{framing}\r\n\r\n"
    piece = b"%x\r\n%b\r\n" % (len(_PIECE), _PIECE) if chunked else _PIECE
    pieces = [head.encode(), *[piece] * (_BODY_BYTES // len(_PIECE)), b"0\r\n\r\n" if chunked else b""]
    try:
        with socket.create_connection(("127.0.0.1", port), _TIMEOUT_S) as client:
            for whole in pieces:
                left = memoryview(whole)
                while left:
                    readable, writable, _ = select.select([client], [client], [], _TIMEOUT_S)
                    if readable:
                        return _read(client)
                    if not writable:
                        return "time-out"
                    left = left[client.send(left, socket.MSG_DONTWAIT) :]
            return _read(client)
    except OSError as error:
        return type(error).__name__


def _read(client: socket.socket) -> str:
    data = b""
    while received := client.recv(1 << 16):
        data += received
        head, found, body = data.partition(b"\r\n\r\n")
        if found and b"/problems/" in body and body.rstrip().endswith((b"}", b"0")):
            slug = body.split(b"/problems/")[1].split(b'"')[0].decode()
            return f"{head.split(b' ')[1].decode()} {slug}"
    status = data.split(b" ")[1].decode() if b" " in data else "nothing"
    return f"{status} of the proxy" if data else "no response"


def measure(name: str, upstream: int, repeats: int, folder: Path) -> bool:
    """Print a line for each framing; return True if all responses were the expected ones."""
    good = True
    with running(name, upstream, folder) as port:
        for framing in ("length", "chunked"):
            answers = Counter(answer_to(port, framing == "chunked") for _ in range(repeats))
            right = answers.pop(_EXPECTED, 0)
            others = "".join(f", {count} x {answer}" for answer, count in answers.items())
            print(f"  {name:18} {framing:8} {right} of {repeats}{others}", flush=True)
            good = good and not answers
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a response was not the server's problem."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxies", description=__doc__.splitlines()[0])
    parser.add_argument("--proxies", type=some_of(tuple(PROXIES)), default=tuple(PROXIES), metavar="NAME,...")
    parser.add_argument("--way", type=some_of(WAYS), default=WAYS, metavar="WAY,...", help=", ".join(WAYS))
    parser.add_argument("--repeats", type=int, default=10, metavar="N")
    options = parser.parse_args(arguments)
    missing = [name for name in options.proxies if not PROXIES[name].installed]
    good = True
    for way in options.way:
        print(f"{'fast path' if way == 'fast' else 'through ASGI'}: {_BODY_BYTES >> 20} MiB, limit 64")
        with (
            cobatch(model_path("tiny"), "tiny", way == "fast") as server,
            tempfile.TemporaryDirectory(prefix="cobatch-proxies-") as folder,
        ):
            upstream = int(server.address.rpartition(":")[2])
            # Apache's workers are another user.
            Path(folder).chmod(0o755)
            for name in options.proxies:
                if name not in missing:
                    good = measure(name, upstream, options.repeats, Path(folder) / name) and good
    if missing:
        print(f"not installed: {', '.join(missing)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
