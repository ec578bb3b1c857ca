"""Listening sockets: opened for every address of a host, closed without resetting a client.

When a listening socket is closed, Linux resets the connections that wait in its backlog. So before, no new
ones are let in: a filter drops the first packet of each, which its client sends again a second later, and
finishes those whose handshake has begun.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence

_BACKLOG = 2048
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_PAUSE_S = 0.001
_LIMIT_S = 2.0
# For the last requests on their way, and for handshakes that have begun.
GRACE_S = 0.1
# Of an address that this system lacks, such as that of IPv6 in a container, whose `localhost` has one.
_LACKING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
# linux/filter.h: operation, jumps, operand. The flags of the TCP header are byte 13; SYN without ACK is 2.
_INSTRUCTIONS = (
    (0x30, 0, 0, 13),  # load a byte
    (0x54, 0, 0, 0x12),  # and SYN | ACK
    (0x15, 0, 1, 0x02),  # if it is SYN alone
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # else take the packet
)


class CannotListenError(Exception):
    """The address is taken, unknown or forbidden."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Open a socket for each address of `host`; uvicorn would end the process if it cannot bind."""
    try:
        return _open(host, port)
    except UnicodeError:
        raise CannotListenError(f"cannot listen on {host!r}, port {port}: it is not a name") from None
    except OSError as error:
        # The numbers of a name's errors are not the system's; for the others Python lengthens the text.
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise CannotListenError(f"cannot listen on {host}, port {port}: {why}") from None


def _open(host: str, port: int) -> list[socket.socket]:
    with contextlib.ExitStack() as stack:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets: list[socket.socket] = []
        lacking = OSError()
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            try:
                server = socket.create_server(address, family=family, backlog=_BACKLOG)
            except OSError as error:
                if error.errno not in _LACKING:
                    raise
                lacking = error
            else:
                sockets.append(stack.enter_context(server))
        if not sockets:
            raise lacking
        stack.pop_all()
    return sockets


def tell_addresses(listeners: Sequence[socket.socket], scheme: str) -> None:
    """Print the URLs of listening sockets."""
    urls = []
    for listener in listeners:
        host, port = listener.getsockname()[:2]
        urls.append(f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}")
        print(f"cobatch: listening on {urls[-1]}", flush=True)
    if urls:  # none if the lifespan failed
        print(f"cobatch: live page {urls[0]}/dashboard, API {urls[0]}/docs", flush=True)


def let_in_no_more(fd: int) -> None:
    """Drop the packets that begin a connection to a listening socket; its backlog stays."""
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in _INSTRUCTIONS)
    buffer = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HP", len(_INSTRUCTIONS), ctypes.addressof(buffer))
    # A kernel without filters leaves a moment between the last look at the backlog and the end.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)


async def take_backlog(fds: Sequence[int], grace_s: float = GRACE_S) -> None:
    """Let no new connections in; wait until the loop has accepted those that have begun."""
    if not fds:
        return
    for fd in fds:
        let_in_no_more(fd)
    await accepted_all(fds)
    await asyncio.sleep(grace_s)
    await accepted_all(fds)


async def accepted_all(fds: Sequence[int]) -> None:
    """Wait until the loop's servers have accepted all connections that wait, for two seconds at most."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    # Without file descriptors to spare the loop cannot accept.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LIMIT_S):
            while poll.poll(0):  # noqa: ASYNC110 - the system says nothing when it is empty
                await asyncio.sleep(_PAUSE_S)
