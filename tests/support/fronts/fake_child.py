"""A child process for tests of the supervisor: it has no server, but speaks the supervisor's protocol.

It prints the supervisor's messages. A front greets each connection with its name and process, and obeys
the lines that it receives: `closed` answers with the number of closed connections, `hold` makes it drain no
further, and after `full` it can open no more files. Home says that front 0 broke the protocol when it gets
SIGUSR1.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from contextlib import closing

from cobatch.server.fronts.child import join_supervisor
from cobatch.server.fronts.control import (
    HEARTBEAT_S,
    Connection,
    DescriptorsLostError,
    EndFront,
    Last,
    Leave,
    Link,
    Parent,
    Reached,
    Refused,
    Reload,
    Taken,
)


def say(*words: object) -> None:
    """Print a line in one write, since other processes print too."""
    os.write(1, (" ".join(map(str, (sys.argv[2], *words))) + "\n").encode())


class FakeChild:
    """A child's part of the supervisor's protocol."""

    def __init__(self, parent: Parent) -> None:
        self.parent = parent
        self.end = asyncio.Event()
        self.links: dict[int, list[int]] = {}
        self.open: set[asyncio.StreamWriter] = set()
        self.closed = 0
        self.holds = False

    async def run(self) -> None:
        """Serve until `Last`."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.parent.control.socket, self.receive)
        loop.add_signal_handler(signal.SIGUSR1, self.parent.send, EndFront(0))
        self.beat()
        say("started", os.getpid())
        self.parent.send(Reached("up"))
        self.parent.send(Reached("ready"))
        await self.end.wait()
        for writer in list(self.open):
            writer.close()
        say("ended")
        loop.remove_reader(self.parent.control.socket)

    def beat(self) -> None:
        self.parent.beat(self.closed)
        asyncio.get_running_loop().call_later(HEARTBEAT_S, self.beat)

    def receive(self) -> None:
        while True:
            try:
                received = self.parent.receive()
            except BlockingIOError:
                return
            except DescriptorsLostError as error:
                self.closed += 1
                self.parent.send(Refused(error.message.number))  # type: ignore[attr-defined]  # a Connection
                continue
            if received is None:
                os._exit(1)
            message, fds = received
            match message:
                case Connection(number=number):
                    self.tasks = asyncio.ensure_future(self.serve(socket.socket(fileno=fds[0]), number))
                case Link(front=front):
                    for fd in self.links.get(front, []):
                        os.close(fd)
                    self.links[front] = fds
                    say("linked", front)
                case Leave(at_once=at_once):
                    say("leave", at_once)
                    if not self.holds:
                        self.parent.send(Reached("drained"))
                case Last():
                    self.end.set()
                case Reload():
                    say("reload")

    async def serve(self, connection: socket.socket, number: int) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        self.open.add(writer)
        writer.write(f"{sys.argv[2]} {os.getpid()}\n".encode())
        while line := await reader.readline():
            self.parent.send(Taken([number]))
            if line == b"full\n":
                unused = os.dup(1)
                os.close(unused)
                resource.setrlimit(resource.RLIMIT_NOFILE, (unused, unused))
            self.holds = line == b"hold\n"
            writer.write(f"{self.closed}\n".encode())
        writer.close()
        self.open.discard(writer)
        self.closed += 1
        self.parent.beat(self.closed)


async def main() -> None:
    if sys.argv[2] == os.environ.get("FAILS"):
        sys.exit(3)
    with closing(join_supervisor()) as parent:
        await FakeChild(parent).run()


asyncio.run(main())
