"""The server of a child process: no listener and no signals, the supervisor sends connections and orders."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator

from cobatch.server.fronts.control import (
    HEARTBEAT_S,
    Connection,
    DescriptorsLostError,
    Last,
    Leave,
    Link,
    LinkEnds,
    Parent,
    Reached,
    Reload,
    ToChild,
)
from cobatch.server.observability.output import LogStream
from cobatch.server.serve import Server
from cobatch.server.settings.schema import Settings

log = logging.getLogger("cobatch.server")


class ChildServer(Server):
    """A server that its supervisor feeds and ends. Run it with `sockets=[]`."""

    def __init__(self, settings: Settings, log_stream: LogStream | None, parent: Parent) -> None:
        self.parent = parent
        super().__init__(settings, log_stream)
        # All processes receive bodies and check signatures.
        processes = parent.start.fronts + 1
        self.inference.bodies.limit_bytes //= processes
        if self.inference.auth is not None:
            self.inference.auth.throttle.divide(processes)
        self._last = asyncio.Event()
        self._adopted = 0
        self._handshakes: set[asyncio.Task[None]] = set()

    def add_link(self, front: int, ends: LinkEnds) -> None:
        """Use a link between home and a front; it replaces an earlier one."""
        raise NotImplementedError

    def no_more(self) -> None:
        """End, now that the last connection has come."""
        self._last.set()

    # Begin and end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_reader(self.parent.control.socket, self._receive)
        self._beat()
        self.parent.send(Reached("up"))

    def tell_ready(self) -> None:
        self.parent.send(Reached("ready"))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the process ignores them (`server.fronts.child`)."""
        yield

    async def drained(self) -> None:
        """Serve on until the supervisor has closed the listener."""
        self.parent.send(Reached("drained"))
        await self._last.wait()

    def _beat(self) -> None:
        open_connections = len(self.server_state.connections) + len(self._handshakes)
        self.parent.beat(self._adopted - open_connections)
        asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)

    # Orders

    def _receive(self) -> None:
        """Receive all that has arrived. The end of the supervisor is the end of this process."""
        while True:
            try:
                received = self.parent.receive()
            except BlockingIOError:
                return
            except DescriptorsLostError as error:
                if not isinstance(error.message, Connection):
                    os._exit(1)  # without its link; another process takes over
                self._adopted += 1
                log.error("too many open files: a connection is closed")  # noqa: TRY400
                continue
            if received is None:
                os._exit(1)
            self._obey(*received)

    def _obey(self, message: ToChild, fds: list[int]) -> None:
        match message:
            case Connection():
                self.adopt(socket.socket(fileno=fds[0]))
            case Link():
                messages, handover = (socket.socket(fileno=fd) for fd in fds[:2])
                self.add_link(message.front, LinkEnds(messages, handover, *fds[2:]))
            case Leave():
                self.leave_s = message.since_s
                self.leave(at_once=message.at_once)
            case Last():
                self.no_more()
            case Reload():
                self.handle_hangup(0, None)

    # Connections

    def adopt(self, connection: socket.socket) -> None:
        """Serve an accepted connection, after the TLS handshake if there is one."""
        self._adopted += 1
        connection.setblocking(False)
        handshake = asyncio.get_running_loop().create_task(self._shake_hands(connection))
        self._handshakes.add(handshake)
        handshake.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, connection: socket.socket) -> None:
        # As with a listener of the loop, which closes a connection whose handshake fails or lasts too long.
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(
                self._new_connection, connection, ssl=self.config.ssl
            )

    def _new_connection(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol
