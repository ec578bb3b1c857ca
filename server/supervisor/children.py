"""The supervisor's view of its children: their processes, and the links between them."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from cobatch.engines.link import slab
from cobatch.server.fronts.control import (
    PAGE_BYTES,
    Connection,
    Control,
    Link,
    Reached,
    Role,
    ToChild,
    map_words,
)

COMMAND = (sys.executable, "-P", "-m", "cobatch.server.fronts.child")
# A child that ends sooner than this after it did its part is replaced with a delay, which doubles.
_SOON_S = 1.0
_SHORTEST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
# Heartbeats of the supervisor without one of the child. They are no time, which also passes while the machine
# is paused.
_HUNG_BEATS = 50
# After these it gets no more connections if another one runs.
STALLED_BEATS = 10
_WAIT_S = 5.0
# Connections kept for the case that a front dies before it reads from them.
_MOST_UNREAD = 256
# linux/tcp.h: `tcpi_state`, and `tcpi_bytes_received` at the end of this size.
_TCP_INFO_BYTES = 136
_ESTABLISHED = 1
# Children ignore them, but not from their first moment.
_BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Child:
    """A child: a process, and after its end another in its place. `control` is None while there is none.

    `page`: the descriptor of its page.
    """

    page: int
    _words: memoryview[int]

    def __init__(self, role: Role, index: int) -> None:
        self.role = role
        self.index = index
        self.name = "home" if role == "home" else f"front {index}"
        self.control: Control | None = None
        self.reached: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._good_s: float | None = None  # since when it does its part
        self._delay_s = 0.0
        self.refuses = False  # it had too many open files for a connection
        self._connections = 0
        self._unread: dict[int, socket.socket] = {}  # connections, by their number
        self._beat = self._silent_beats = 0

    def start(self, command: Sequence[str], outputs: Sequence[int]) -> None:
        """Start a process; `outputs` become its stdout and stderr. Raises OSError."""
        self.reached.clear()
        self._good_s = None
        self.refuses = False
        self._connections = self._beat = self._silent_beats = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as stack, theirs, _blocked_signals():
            stack.callback(ours.close)
            page = slab.create("cobatch-page", PAGE_BYTES)
            stack.callback(os.close, page)
            words = map_words(page)
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter and a module of ours
                [*command, str(theirs.fileno()), self.name],
                stdin=subprocess.DEVNULL,
                stdout=outputs[0],
                stderr=outputs[1],
                pass_fds=[theirs.fileno()],
            )
            stack.pop_all()
        self.control, self.page, self._words = Control(ours), page, words

    def send(self, message: ToChild, fds: Sequence[int] = ()) -> None:
        """Send a message, if there is a process."""
        if self.control is not None:
            self.control.send(message, fds)

    def note(self, message: Reached) -> None:
        """Note the state that the process has reached."""
        self.reached.add(message.state)
        # A front serves before it is ready, which depends on home.
        if message.state == ("ready" if self.role == "home" else "up"):
            self._good_s = time.monotonic()

    # Connections

    @property
    def takes_connections(self) -> bool:
        return "up" in self.reached and self.control is not None and not self.control.backlogged

    @property
    def stalled(self) -> bool:
        """Its loop has not run for a while."""
        return self._silent_beats >= STALLED_BEATS

    @property
    def open_connections(self) -> int:
        """Connections that it was given and has not closed."""
        return self._connections - self._words[1]

    def hand(self, connection: socket.socket) -> bool:
        """Give it a client's connection, and keep it until `taken`. Return False if its process has ended."""
        number = self._connections + 1
        try:
            if self.control is None or not self.control.send(Connection(number), [connection.fileno()]):
                return False
        except OSError:  # too many open files
            return False
        self._connections = number
        self._unread[number] = connection
        if len(self._unread) > _MOST_UNREAD:
            self.taken([next(iter(self._unread))])
        return True

    def taken(self, numbers: Iterable[int]) -> None:
        """Let go of connections that the process has read from."""
        for number in numbers:
            connection = self._unread.pop(number, None)
            if connection is not None:
                connection.close()

    def take_back(self, *numbers: int) -> Iterator[socket.socket]:
        """Yield connections, by default all, of which nothing was read."""
        for number in numbers or list(self._unread):
            connection = self._unread.pop(number, None)
            if connection is not None and _is_unread(connection):
                yield connection
            elif connection is not None:
                connection.close()

    def release(self) -> None:
        """Let go of all connections: their descriptors are needed."""
        self.taken(list(self._unread))

    # The end

    def is_hung(self) -> bool:
        """Return True if the loop of a process that does its part stands still; ask once a heartbeat."""
        before, self._beat = self._beat, self._words[0]
        self._silent_beats = 0 if self._beat != before or self._good_s is None else self._silent_beats + 1
        return self._silent_beats >= _HUNG_BEATS

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def wait(self) -> None:
        """Wait for the end of a process that was killed."""
        if self._process is not None:
            self._process.wait(_WAIT_S)

    def status(self) -> int | None:
        """Return the exit status of a process that has ended; a negative one is that of a signal."""
        return None if self._process is None else self._process.poll()

    def close(self) -> None:
        """Forget a process that has ended."""
        if self.control is not None:
            self.control.close()
            os.close(self.page)
        self.control = self._process = None

    def delay_s(self) -> float:
        """Return the time until the next start, after an end or a failed start."""
        long_enough = self._good_s is not None and time.monotonic() - self._good_s >= _SOON_S
        doubled_s = min(_LONGEST_DELAY_S, max(_SHORTEST_DELAY_S, 2 * self._delay_s))
        self._delay_s = 0.0 if long_enough else doubled_s
        return self._delay_s


def _is_unread(connection: socket.socket) -> bool:
    """Return True if an open connection still has all bytes that its client has sent."""
    received = _received_bytes(connection)
    while received is not None:
        unread = int.from_bytes(fcntl.ioctl(connection, termios.FIONREAD, bytes(4)), sys.byteorder)
        before, received = received, _received_bytes(connection)
        if received == before:  # nothing has come meanwhile
            return received == unread
    return False


def _received_bytes(connection: socket.socket) -> int | None:
    """Return the bytes that the client of an open connection has sent; None if that is unknown."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _TCP_INFO_BYTES or info[0] != _ESTABLISHED:
        return None
    return int.from_bytes(info[-8:], sys.byteorder)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Block signals for a process that is started meanwhile, which inherits this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_memory() -> None:
    """Raise OSError if processes cannot share memory here, as in a container without `/proc`."""
    with ExitStack() as stack:
        memory = slab.create("cobatch-page", PAGE_BYTES)
        stack.callback(os.close, memory)
        os.close(slab.for_reading(memory))


def link(home: Child, front: Child, slab_bytes: int) -> None:
    """Link two processes."""
    with ExitStack() as stack:

        def readable(fd: int) -> int:
            reader = slab.for_reading(fd)
            stack.callback(os.close, reader)
            return reader

        sockets, slabs = [], []
        for _ in range(2):
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sockets.append([stack.enter_context(end).fileno() for end in pair])
            slabs.append(slab.create("cobatch-slab", slab_bytes))
            stack.callback(os.close, slabs[-1])
        (home_messages, front_messages), (home_handover, front_handover) = sockets
        of_home, of_front = slabs
        message = Link(front.index)
        home.send(message, [home_messages, home_handover, readable(of_front), of_home])
        front.send(
            message, [front_messages, front_handover, readable(of_home), of_front, readable(home.page)]
        )
