"""An end of the socket of a pool's process, on an event loop. Sending never waits.

A long body or answer lies in memory of its own, whose descriptor goes along with the message.
"""

import asyncio
import fcntl
import mmap
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from cobatch.server.pipelines.call import Call, Data, ToChild, ToHome, encode

# Longer data get a descriptor. A message that is shorter than this fits a datagram.
INLINE_BYTES = 32 << 10
_MESSAGE_BYTES = 160 << 10
# A shorter file would end its reader by SIGBUS.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
Sent = TypeVar("Sent", bound=ToChild | ToHome)
Received = TypeVar("Received", bound=ToChild | ToHome)


class WireError(Exception):
    """The other end has sent something that is no message."""


class Wire(Generic[Sent, Received]):
    """An end of the socket, which it owns. `on_end` is called once, when the other end is closed or bad."""

    def __init__(
        self,
        sock: socket.socket,
        decode: Callable[[bytes], Received],
        on_message: Callable[[Received], None],
        on_end: Callable[[str], None],
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_BYTES)
        self._sock = sock
        self._decode = decode
        self._on_message = on_message
        self._on_end = on_end
        self._backlog: deque[tuple[bytes, int]] = deque()  # messages, and descriptors or -1
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self.read)
        self.closed = False

    def send(self, message: Sent, descriptor: int = -1) -> None:
        """Send a message, with a descriptor that is closed then. Raises OSError."""
        if self.closed:
            if descriptor >= 0:
                os.close(descriptor)
            return
        encoded = encode(message)
        if self._backlog or not self._try(encoded, descriptor):
            if not self._backlog:
                self._loop.add_writer(self._sock.fileno(), self._writable)
            self._backlog.append((encoded, descriptor))

    def _try(self, encoded: bytes, descriptor: int) -> bool:
        """Send a message and close its descriptor; False: the socket takes nothing now."""
        try:
            if descriptor < 0:
                self._sock.send(encoded)
            else:
                socket.send_fds(self._sock, [encoded], [descriptor])
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            pass  # reading tells the end
        except OSError:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        if descriptor >= 0:
            os.close(descriptor)
        return True

    def _writable(self) -> None:
        while self._backlog:
            if not self._try(*self._backlog[0]):
                return
            self._backlog.popleft()
        self._loop.remove_writer(self._sock.fileno())

    def read(self) -> bool:
        """Handle the next message; return False if none has come, or the end."""
        try:
            message = self._receive()
        except BlockingIOError:
            return False
        except (WireError, OSError) as error:
            self._end(str(error))
            return False
        if message is None:
            self._end("")
            return False
        self._on_message(message)
        return True

    def _receive(self) -> Received | None:
        """Return the next message, None at the end. Raises BlockingIOError, OSError, WireError."""
        encoded, descriptors, flags, _ = socket.recv_fds(self._sock, _MESSAGE_BYTES, 1)
        try:
            if not encoded:
                return None
            message = self._decode(encoded)
            if isinstance(message, Call | Data) and len(message.data) != message.size:
                if not descriptors:
                    why = "too many open files" if flags & socket.MSG_CTRUNC else "no data"
                    raise WireError(f"a message without its {message.size} bytes: {why}")
                message = msgspec.structs.replace(message, data=_view(descriptors[0], message.size))
            return message
        except msgspec.MsgspecError as error:
            raise WireError(f"a datagram of {len(encoded)} bytes is no message: {error}") from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _end(self, why: str) -> None:
        if not self.closed:
            self.close()
            self._on_end(why)

    def close(self) -> None:
        """Close the socket; what is not sent yet is lost."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        while self._backlog:
            _, descriptor = self._backlog.popleft()
            if descriptor >= 0:
                os.close(descriptor)


def in_memory(data: bytes | bytearray | memoryview) -> int:
    """Return the descriptor of new memory with these bytes, which no process can change. Raises OSError."""
    descriptor = os.memfd_create("cobatch-body", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as memory:
            memory.write(data)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _view(descriptor: int, size: int) -> memoryview:
    """Return the bytes of memory that another process has written. Raises WireError."""
    sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    if not sealed or os.fstat(descriptor).st_size != size:
        raise WireError(f"memory that is no body of {size} bytes")
    return memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
