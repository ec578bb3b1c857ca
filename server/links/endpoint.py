"""An end of a link on the event loop: the messages of an iteration are sent at once."""

import asyncio
import logging
from abc import abstractmethod
from typing import Generic

from cobatch.engines.errors import LinkClosedError, LinkError
from cobatch.engines.link.channel import Channel, Received, Sent

log = logging.getLogger("cobatch.fronts")


class Endpoint(Generic[Sent, Received]):
    """An end of a link. `ended` is set once, when the other end is closed or has sent a bad message."""

    def __init__(self, channel: Channel[Sent, Received], loop: asyncio.AbstractEventLoop) -> None:
        self.ended = False
        self._channel = channel
        self._loop = loop
        self._due = False  # a flush, in the next iteration
        self._writing = False  # when the socket takes more
        loop.add_reader(channel.fileno(), self._on_readable)

    @abstractmethod
    def handle(self, message: Received) -> None:
        """Act on a message. Raises LinkError for one that the other end must not send."""

    @abstractmethod
    def gather(self) -> None:
        """Queue the messages of this iteration."""

    @abstractmethod
    def on_end(self, why: str, *, broken: bool) -> None:
        """Release everything: the link has ended. Called once. `broken`: by a bad message."""

    def on_received(self) -> None:
        """A datagram's messages are handled."""

    def send(self, message: Sent) -> None:
        """Send a message with those of this iteration."""
        self._channel.send(message)
        self.flush_soon()

    def flush_soon(self) -> None:
        """Send the gathered messages at the end of this iteration."""
        if not self._due:
            self._due = True
            self._loop.call_soon(self._flush_if_due)

    def _flush_if_due(self) -> None:
        if self._due:
            self.flush()

    def flush(self) -> None:
        """Send the gathered messages."""
        self._due = False
        if not self.ended:
            self.gather()
            self._write()

    def _write(self) -> None:
        channel = self._channel
        channel.flush()
        if channel.backlogged != self._writing:
            self._writing = channel.backlogged
            if self._writing:
                self._loop.add_writer(channel.fileno(), self._write)
            else:
                self._loop.remove_writer(channel.fileno())

    def _on_readable(self) -> None:
        try:
            messages = self._channel.receive()
            for message in messages:
                self.handle(message)
        except LinkClosedError as error:
            self.end(str(error))
        except LinkError as error:
            self.end(str(error), broken=True)
        except Exception as error:
            log.exception("a message of another process could not be handled")
            self.end(f"a message could not be handled: {error!r}", broken=True)
        else:
            self.on_received()

    def end(self, why: str, *, broken: bool = False) -> None:
        """End the link from this side."""
        if self.ended:
            return
        self.ended = True
        descriptor = self._channel.fileno()
        self._loop.remove_reader(descriptor)
        self._loop.remove_writer(descriptor)
        self._channel.close()
        self.on_end(why, broken=broken)
