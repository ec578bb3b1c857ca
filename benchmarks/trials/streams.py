"""The fast path against ASGI: the same HTTP/1.1 streams to two servers, which must answer alike.

`python -m benchmarks.trials.streams [--count 8000] [--seed 1]`: random streams, each sent to a server
with `fast_path` and to one without. Statuses, headers, bodies and the end of the connection must be equal,
times and ids apart. A stream that is answered differently is sent again; only what differs every time is a
finding, the rest depends on how the kernel cut the packets and is counted.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
from contextlib import ExitStack

from benchmarks.trials.http_streams import MODEL, stream
from benchmarks.trials.models import cases
from benchmarks.trials.trial import Report, command, served

COUNT = 8_000
_AT_ONCE = 64
_AGAIN = 4
# The end of every stream is the server's: an idle connection is closed, a part of a request refused.
_SERVER = "keep_alive_s = 0.4\nreceive_timeout_s = 1.5\nfast_path = {}\n"
_GIVE_UP_S = 30.0
_HEAD = re.compile(rb"HTTP/1\.1 \d{3} [^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n")
_VARYING = re.compile(
    rb"(?m)^((?:date|x-request-id|server-timing): ).*|(\"x-request-id\":|\"reference\":)\"[^\"]*\""
)


async def exchange(address: str, pieces: list[bytes]) -> bytes:
    """Send a stream; return the answers without what varies, and how the connection ended."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)
    answers, end = bytearray(), b"closed"
    try:
        async with asyncio.timeout(_GIVE_UP_S):
            for piece in pieces:
                if not writer.is_closing():
                    writer.write(piece)
                await asyncio.sleep(0)
            while data := await reader.read(1 << 16):
                answers += data
    except TimeoutError:
        end = b"still open"
    except ConnectionError:
        end = b"reset"
    finally:
        writer.transport.abort()
    return plain(bytes(answers)) + b"\n" + end


def plain(answers: bytes) -> bytes:
    """Return answers with the headers of each in order, and without dates, times and ids."""

    def ordered(head: re.Match[bytes]) -> bytes:
        first, *lines = head[0][:-4].split(b"\r\n")
        return b"\r\n".join([first, *sorted(lines), b"", b""])

    return _VARYING.sub(rb"\1\2*", _HEAD.sub(ordered, answers))


async def compare(addresses: list[str], pieces: list[bytes], report: Report) -> None:
    """Send a stream to both servers, more than once if they differ."""
    report.counts["streams"] += 1
    for again in range(_AGAIN):
        fast, asgi = await asyncio.gather(*[exchange(address, pieces) for address in addresses])
        if fast == asgi:
            report.counts["streams that differed once, by packets"] += again > 0
            break
    if fast != asgi:
        report.find("a stream that is answered differently", f"{pieces}\n  fast {fast!r}\n  asgi {asgi!r}")
    for status in re.findall(rb"HTTP/1\.1 (\d{3})", fast):
        report.counts[f"answers {status.decode()}"] += 1
    if not fast.endswith(b"\nclosed"):
        report.find("a connection that the server did not close", f"{fast!r} to {pieces}")


def trial(count: int, seed: int) -> Report:
    """Run the trial with `count` streams."""
    report, rng = Report(), random.Random(seed)
    (case,) = [case for case in cases() if case.name == MODEL]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                served(f"streams-{on}", {MODEL: (case.content, "")}, server=_SERVER.format(on))
            )[0]
            for on in ("true", "false")
        ]
        addresses = [server.address for server in servers]

        async def sender() -> None:
            while report.counts["sent"] < count:
                report.counts["sent"] += 1
                await compare(addresses, stream(rng), report)

        async def main() -> None:
            await asyncio.gather(*[sender() for _ in range(min(_AT_ONCE, count))])

        asyncio.run(main())
        for server in servers:
            report.check_log(server)
    del report.counts["sent"]
    return report


if __name__ == "__main__":
    sys.exit(command("streams", __doc__, COUNT, trial, "streams", sys.argv[1:]))
