"""Accepting connections for other processes."""

import asyncio
import errno
import logging
import socket
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from cobatch.server.supervisor.children import Child

log = logging.getLogger("cobatch.server")

_load = attrgetter("refuses", "stalled", "open_connections")
# Connections accepted before anything else is done.
_BURST = 64
_MOST_WAITING = 256
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Accepts connections, and hands each to the front that has the fewest.

    While no front takes any, they wait in the backlog of their listener; also while all refuse them.
    """

    def __init__(self, listeners: Sequence[socket.socket], fronts: Sequence[Child]) -> None:
        self.listeners = listeners
        self._fronts = fronts
        self._accepts = False
        self._waiting: deque[socket.socket] = deque()  # accepted connections without a front
        for listener in listeners:
            listener.setblocking(False)

    def resume(self) -> None:
        """Accept, if a front takes connections. Call it again from time to time."""
        takes = any(not front.refuses for front in self._open_fronts())
        waiting, self._waiting = self._waiting, deque()
        for connection in waiting:
            self.hand(connection)
        for front in self._fronts:
            front.refuses = False  # until those that it was given just now are refused
        if takes and not self._accepts:
            self._accepts = True
            for listener in self.listeners:
                asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def pause(self) -> None:
        """Accept nothing until `resume`."""
        self._accepts = False
        for listener in self.listeners:
            asyncio.get_running_loop().remove_reader(listener)

    def _open_fronts(self) -> list[Child]:
        return [front for front in self._fronts if front.takes_connections]

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_BURST):
            if all(front.refuses for front in self._open_fronts()):
                self.pause()
                return
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    log.error("cannot accept connections: %s", error.strerror)  # noqa: TRY400
                    for front in self._fronts:
                        front.release()
                    self.pause()
                return  # nothing is left, or this client has gone
            self.hand(connection)

    def hand(self, connection: socket.socket) -> None:
        """Hand a connection to the front that has the fewest, or the next one if that has just ended."""
        if not any(front.hand(connection) for front in sorted(self._open_fronts(), key=_load)):
            self.keep(connection)

    def keep(self, connection: socket.socket) -> None:
        """Keep a connection until a front takes it; the oldest is closed if there are too many."""
        self._waiting.append(connection)
        if len(self._waiting) > _MOST_WAITING or not self._fronts:
            self._waiting.popleft().close()

    def close(self) -> None:
        """Close the listeners, and all connections that no front takes now, or that are handed out later."""
        self.resume()
        self.pause()
        self._fronts = ()
        for listener in self.listeners:
            listener.close()
        self.listeners = ()
        while self._waiting:
            self._waiting.popleft().close()
