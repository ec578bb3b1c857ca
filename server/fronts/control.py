"""The messages between the supervisor and its children, as MessagePack, with file descriptors beside them.

Each child has a SOCK_SEQPACKET pair with the supervisor; its end is the end of the child. Both also share the
child's page. Its first word changes with each heartbeat; a front's second one has its closed connections.
Fronts read home's too (`server.links.page`).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pickle
import socket
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from cobatch.server.settings.schema import Settings

HEARTBEAT_S = 0.1
# Of a child's page; memory is used where it is written.
PAGE_BYTES = 1 << 20
_MESSAGE_BYTES = 1 << 16
_MOST_FDS = 8

Role = Literal["home", "front"]


class Start(Struct, frozen=True, array_like=True, tag=0):
    """The first message. `index`: of the front, from 0; 0 for home. Descriptors: settings, page."""

    role: Role
    index: int
    fronts: int


class Link(Struct, frozen=True, array_like=True, tag=1):
    """A link between home and a front. Descriptors: `LinkEnds`. It replaces an earlier one."""

    front: int


class Connection(Struct, frozen=True, array_like=True, tag=2):
    """A client's connection; its socket is beside it. The supervisor keeps it too until `Taken`."""

    number: int


class Leave(Struct, frozen=True, array_like=True, tag=3):
    """A signal to end came at this time (CLOCK_MONOTONIC); `at_once`: without the delay before draining."""

    since_s: float
    at_once: bool


class Last(Struct, frozen=True, array_like=True, tag=4):
    """No more connections come."""


class Reload(Struct, frozen=True, array_like=True, tag=5):
    """Read the API keys and the certificate again."""


class Reached(Struct, frozen=True, array_like=True, tag=16):
    """The child runs, can answer infer requests, or has answered all that it accepted before draining."""

    state: Literal["up", "ready", "drained"]


class EndFront(Struct, frozen=True, array_like=True, tag=17):
    """A front broke the protocol of its link: kill it and start another."""

    front: int


class Taken(Struct, frozen=True, array_like=True, tag=18):
    """The front has read from these connections, or closed them."""

    numbers: list[int]


class Refused(Struct, frozen=True, array_like=True, tag=19):
    """The front has too many open files to take a connection."""

    number: int


ToChild = Start | Link | Connection | Leave | Last | Reload
FromChild = Reached | EndFront | Taken | Refused
Message = TypeVar("Message")

_encode = msgspec.msgpack.Encoder().encode
_TO_CHILD = msgspec.msgpack.Decoder(ToChild)
FROM_CHILD = msgspec.msgpack.Decoder(FromChild)


class LinkEnds(NamedTuple):
    """One end of a link: two sockets, and descriptors of shared memory, which belong to the receiver.

    `slab_in` is only readable here, and so is `page`, home's, which fronts get.
    """

    messages: socket.socket
    handover: socket.socket
    slab_in: int
    slab_out: int
    page: int = -1


class DescriptorsLostError(Exception):
    """The process has too many open files to receive the descriptors of a message, which are closed."""

    def __init__(self, message: object) -> None:
        super().__init__("too many open files")
        self.message = message


class Control:
    """One end of a control socket. Sending never waits: messages stay here until the socket takes them."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.socket = end
        self._backlog: deque[tuple[bytes, list[int]]] = deque()

    @property
    def backlogged(self) -> bool:
        """The other end has not received for long."""
        return bool(self._backlog)

    def send(self, message: ToChild | FromChild, fds: Sequence[int] = ()) -> bool:
        """Send a message with copies of descriptors. Return False if the other process has ended."""
        data = _encode(message)
        self.flush()
        try:
            if self._backlog or not self._try(data, fds):
                self._backlog.append((data, [os.dup(fd) for fd in fds]))
        except ConnectionError:
            return False
        return True

    def flush(self) -> None:
        """Send as much as the socket takes now."""
        with contextlib.suppress(ConnectionError):
            while self._backlog and self._try(*self._backlog[0]):
                _close_all(self._backlog.popleft()[1])

    def _try(self, data: bytes, fds: Sequence[int]) -> bool:
        try:
            socket.send_fds(self.socket, [data], fds)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:  # too many descriptors of this user are on their way
                raise
            return False
        return True

    def receive(self, kind: msgspec.msgpack.Decoder[Message]) -> tuple[Message, list[int]] | None:
        """Return the next message and its descriptors, None at the end of the other process.

        Raises BlockingIOError if there is none, DescriptorsLostError and msgspec.MsgspecError.
        """
        try:
            data, fds, flags, _ = socket.recv_fds(
                self.socket, _MESSAGE_BYTES, _MOST_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return None
        if not data:
            return None
        message = kind.decode(data)
        if flags & socket.MSG_CTRUNC:
            _close_all(fds)
            raise DescriptorsLostError(message)
        return message, fds

    def close(self) -> None:
        self.socket.close()
        while self._backlog:
            _close_all(self._backlog.popleft()[1])


class Parent:
    """The supervisor, as its child sees it. Waits for `Start`."""

    def __init__(self, end: socket.socket) -> None:
        self.control = Control(end)
        end.setblocking(True)
        received = self.receive()
        end.setblocking(False)
        assert received is not None
        start, (settings, self.page) = received
        assert isinstance(start, Start)
        self.start = start
        # The other children have the same open file, and so its position.
        data = os.pread(settings, os.fstat(settings).st_size, 0)
        # Pickled, since some defaults are values that may not be given, and would be refused.
        self.settings: Settings = pickle.loads(data)  # noqa: S301 - the supervisor wrote it
        os.close(settings)

    def send(self, message: FromChild) -> None:
        self.control.send(message)

    def receive(self) -> tuple[ToChild, list[int]] | None:
        """Return the next message and its descriptors, as `Control.receive` does."""
        return self.control.receive(_TO_CHILD)

    def close(self) -> None:
        self.control.close()

    @cached_property
    def _words(self) -> memoryview[int]:
        words = map_words(self.page)
        os.close(self.page)
        return words

    def beat(self, closed: int) -> None:
        """Tell that the loop of a front runs, and the number of connections closed so far."""
        self.control.flush()
        self._words[0] += 1
        self._words[1] = closed


def map_words(page: int) -> memoryview[int]:
    """Map a child's page."""
    return memoryview(mmap.mmap(page, PAGE_BYTES)).cast("q")


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
