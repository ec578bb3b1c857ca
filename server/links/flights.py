"""Messages in flight: requests that home has, and their blocks.

A request's block in this process's slab is free once home has answered it or dropped it; until then a
cancelled request stays here, without a caller.
"""

from collections.abc import Collection

from cobatch.batcher.request import Request, State
from cobatch.engines.errors import LinkError
from cobatch.engines.link.messages import BUNDLE_IDS
from cobatch.engines.link.slab import SlabWriter
from cobatch.server.links.remote import RemoteBatcher


class Sent:
    """A message in flight: the callers of its rows, and its block (-1: none). `left`: members of a bundle
    that was split and whose block they share, as `whole`."""

    __slots__ = ("batcher", "block", "filling", "id", "left", "requests", "whole")

    def __init__(self, id_: int, batcher: RemoteBatcher, requests: list[Request], block: int) -> None:
        self.id = id_
        self.batcher = batcher
        self.requests = requests
        self.block = block
        self.filling = False
        self.left = 0
        self.whole: Sent | None = None


class Flights:
    """The messages in flight on one link, by id."""

    def __init__(self, slab: SlabWriter) -> None:
        self.open: dict[int, Sent] = {}
        self._slab = slab

    def add(self, id_: int, batcher: RemoteBatcher, requests: list[Request], block: int) -> Sent:
        """Add a message that is about to be sent."""
        self.open[id_] = sent = Sent(id_, batcher, requests, block)
        return sent

    def of(self, batcher: RemoteBatcher) -> list[Request]:
        """Return the requests of a batcher."""
        sent = [one for one in self.open.values() if one.batcher is batcher]
        return [request for one in sent for request in one.requests]

    def take_all(self) -> Collection[Sent]:
        """Return all messages, and end their flights."""
        taken, self.open = self.open, {}
        return taken.values()

    def take(self, id_: int) -> Sent:
        """Return the message with this id, and end its flight."""
        sent = self.open.pop(id_, None)
        return self._take_member(id_) if sent is None else sent

    def _take_member(self, id_: int) -> Sent:
        """Return a member of a bundle that home has split; the others are in flight alone from now on."""
        whole = self.open.pop(id_ - id_ % BUNDLE_IDS, None)
        if whole is None or id_ - whole.id > len(whole.requests):
            raise LinkError(f"an answer for {id_}, which was not asked")
        whole.left = len(whole.requests)
        for number, request in enumerate(whole.requests, whole.id + 1):
            member = self.open[number] = Sent(number, whole.batcher, [request], -1)
            member.whole = whole
            if request.state is State.QUEUED:
                request.entry = member
        return self.open.pop(id_)

    def end(self, sent: Sent) -> None:
        """Use the block again, unless other members of a split bundle have it."""
        whole = sent.whole
        if whole is not None:
            sent.whole = None
            whole.left -= 1
            if whole.left:
                return
            sent = whole
        if sent.block >= 0:
            self._slab.free(sent.block)
