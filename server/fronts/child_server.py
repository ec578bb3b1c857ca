"""The server of a child process: no listener and no signals, the supervisor sends connections and orders."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial

from cobatch.server.fronts.control import (
    Connection,
    DescriptorsLostError,
    Last,
    Leave,
    Link,
    LinkEnds,
    Parent,
    Reached,
    Refused,
    Reload,
    Taken,
    ToChild,
)
from cobatch.server.observability.output import LogStream
from cobatch.server.serve import Server
from cobatch.server.settings.schema import Settings

log = logging.getLogger("cobatch.server")


class _Unread(asyncio.Protocol):
    """A connection until its client's first bytes, which a server that is killed then takes along."""

    def __init__(self, connection: asyncio.Protocol, on_read: Callable[[], None]) -> None:
        self._connection = connection
        self._on_read = on_read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._connection.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._leave()
        self._connection.data_received(data)

    def eof_received(self) -> bool | None:
        self._leave()
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_read()
        self._connection.connection_lost(exc)

    def _leave(self) -> None:
        self._transport.set_protocol(self._connection)
        self._on_read()


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
        self._taken: list[int] = []  # connections of which the supervisor is not told yet
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
        self.parent.send(Reached("up"))

    def tell_ready(self) -> None:
        self.parent.send(Reached("ready"))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._handshakes:  # of connections that came last
            await asyncio.wait(self._handshakes, timeout=self.grace_s)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the process ignores them (`server.fronts.child`)."""
        yield

    async def drained(self) -> None:
        """Serve on until the supervisor has closed the listener."""
        self.parent.send(Reached("drained"))
        await self._last.wait()

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
                self.parent.send(Refused(error.message.number))
                continue
            if received is None:
                os._exit(1)
            self._obey(*received)

    def _obey(self, message: ToChild, fds: list[int]) -> None:
        match message:
            case Connection():
                self.adopt(socket.socket(fileno=fds[0]), message.number)
            case Link():
                messages, handover = (socket.socket(fileno=fd) for fd in fds[:2])
                try:
                    self.add_link(message.front, LinkEnds(messages, handover, *fds[2:]))
                except OSError as error:
                    log.error("cannot use a link: %s", error.strerror)  # noqa: TRY400
                    os._exit(1)  # as without its descriptors
            case Leave():
                self.leave_s = message.since_s
                self.leave(at_once=message.at_once)
            case Last():
                self.no_more()
            case Reload():
                self.handle_hangup(0, None)

    # Connections

    @property
    def closed_connections(self) -> int:
        """Connections that it was given and has closed."""
        return self._adopted - len(self.server_state.connections) - len(self._handshakes)

    def adopt(self, connection: socket.socket, number: int) -> None:
        """Serve an accepted connection, after the TLS handshake if there is one."""
        self._adopted += 1
        connection.setblocking(False)
        handshake = asyncio.get_running_loop().create_task(self._shake_hands(connection, number))
        self._handshakes.add(handshake)
        handshake.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, connection: socket.socket, number: int) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: _Unread(self._new_connection(), partial(self._took, number)),
                connection,
                ssl=self.config.ssl,
            )
        except OSError:
            # A listener of the loop also closes a connection whose handshake fails or lasts too long.
            self._took(number)

    def _new_connection(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    def _took(self, number: int) -> None:
        """Tell the supervisor, with all others of this iteration."""
        if not self._taken:
            asyncio.get_running_loop().call_soon(self._tell_taken)
        self._taken.append(number)

    def _tell_taken(self) -> None:
        taken, self._taken = self._taken, []
        self.parent.send(Taken(taken))
