"""Home's ends of all links: it decides about their requests together, and keeps the pages up to date."""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Batch
from cobatch.engines.link import slab
from cobatch.engines.link.channel import Channel
from cobatch.engines.link.messages import decode_from_front
from cobatch.engines.link.slab import SlabReader, SlabWriter
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
from cobatch.server.links.accounts import AccountTable
from cobatch.server.links.downlink import Downlink
from cobatch.server.links.page import Page, page_bytes
from cobatch.server.links.waiting import WaitingRoom

# An idle engine waits at most this long for requests that a front has announced. A front reads those of 64
# connections within it.
_LONGEST_WAIT_S = 0.001
_HEARTBEAT_S = 0.1
_SLAB_BYTES = 1 << 28  # of a pipeline's process, in each direction: used where it is written


def hub_of(inference: Inference) -> "Hub":
    """Return the hub of a process, which is made when it is needed: before models are loaded."""
    if inference.hub is None:
        inference.hub = hub = Hub(inference)
        inference.close_links = hub.close
    assert isinstance(inference.hub, Hub)
    return inference.hub


class Hub:
    """All links of a home, which are the only ones to its models."""

    def __init__(self, inference: Inference) -> None:
        self.links: set[Downlink] = set()
        self.pages: list[Page] = []
        self._inference = inference
        self._models = list(inference.models.values())
        self._indices = {model.name: index for index, model in enumerate(self._models)}
        self._beat_again: asyncio.TimerHandle | None = None
        self._held: dict[Batcher, None] = {}  # with requests about which nothing is decided yet
        self._room = WaitingRoom()
        self._page: int | None = None  # for processes of pipelines, whose numbers are below 0
        self._last = 0
        self._awaited: set[Downlink] = set()  # for their decisions
        self._decision: asyncio.Handle | None = None
        inference.on_loaded = self._on_loaded
        inference.observer.on_batch(self._on_batch)

    def add_page(self, descriptor: int, table: AccountTable | None) -> None:
        """Write this page too, which processes read."""
        self.pages.append(Page(descriptor, len(self._models), table, writable=True))
        if self._beat_again is not None:
            self._beat_again.cancel()
        self._beat()

    def add(
        self,
        number: int,
        messages: socket.socket,
        slab_in: SlabReader,
        slab_out: SlabWriter,
        on_ended: Callable[[Downlink, str, bool], None],
        *,
        steps: bool = False,
    ) -> Downlink:
        """Use a link to a process with this number, which no other one has. `steps`: of a pipeline."""
        auth = self._inference.auth

        def on_end(link: Downlink, why: str, broken: bool) -> None:
            self.links.discard(link)
            self._on_received(link)  # nothing more comes
            on_ended(link, why, broken)

        link = Downlink(
            number,
            Channel(messages, decode_from_front),
            slab_in,
            slab_out,
            self._models,
            None if auth is None else auth.tenants,
            asyncio.get_running_loop(),
            held=self._held,
            room=self._room if steps else None,
            on_received=self._on_received,
            on_ended=on_end,
        )
        self.links.add(link)
        return link

    def open_steps(self, on_ended: Callable[[Downlink, str, bool], None]) -> list[int]:
        """Return descriptors of the far end of a new link, for a process of a pipeline (`links.step_end`).

        Raises OSError.
        """
        self._last -= 1
        size = max(_SLAB_BYTES, 2 * self._inference.settings.server.max_body_bytes)
        with ExitStack() as stack:

            def kept(descriptor: int) -> int:
                stack.callback(os.close, descriptor)
                return descriptor

            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(near.close)
            theirs, answers = [kept(far.detach())], kept(slab.create("cobatch-steps", size))
            theirs.append(kept(slab.for_reading(answers)))
            theirs.append(kept(slab.create("cobatch-steps", size)))
            theirs.append(kept(slab.for_reading(self._page_for_steps())))
            slabs = SlabReader(slab.for_reading(theirs[2])), SlabWriter(os.dup(answers))
            self.add(self._last, near, *slabs, on_ended, steps=True)
            stack.pop_all()
        os.close(answers)
        return theirs

    def _page_for_steps(self) -> int:
        if self._page is None:
            with ExitStack() as stack:
                page = slab.create("cobatch-page", page_bytes(len(self._models)))
                stack.callback(os.close, page)
                self.add_page(os.dup(page), None)
                stack.pop_all()
            self._page = page
        return self._page

    def close(self) -> None:
        """End all links."""
        if self._page is not None:
            os.close(self._page)
            self._page = None
        if self._beat_again is not None:
            self._beat_again.cancel()
        for link in list(self.links):
            link.end("home ends")

    # Decisions

    def _on_received(self, link: Downlink) -> None:
        """Decide about the requests of a datagram once those that fronts are about to send are there too."""
        if not self._held:
            self.update()
        elif self._decision is None:
            # After the other datagrams of this iteration.
            self._decision = asyncio.get_running_loop().call_soon(self._await_others)
        elif self._awaited:
            self._awaited.discard(link)
            if not self._may_wait():
                self._awaited.clear()
            if not self._awaited:
                self._decide()

    def _await_others(self) -> None:
        """Let an idle engine wait for the fronts that are reading requests: a batch costs as much as ten."""
        self._awaited = {link for link in self.links if link.expected} if self._may_wait() else set()
        if self._awaited:
            self._decision = asyncio.get_running_loop().call_later(_LONGEST_WAIT_S, self._decide)
        else:
            self._decide()

    def _may_wait(self) -> bool:
        """Return True if engines are idle, and none of them has a full batch."""
        idle = [one for one in self._held if not one.running_batches]
        return bool(idle) and all(one.queue.rows < one.queue.full_rows for one in idle)

    def _decide(self) -> None:
        for link in self._awaited:  # in vain
            link.give_up()
        self._awaited.clear()
        if self._decision is not None:
            self._decision.cancel()
            self._decision = None
        held = list(self._held)
        self._held.clear()
        for batcher in held:
            batcher.decide()
        self.update()

    def _on_loaded(self, model: Model) -> None:
        self.update()
        for link in self.links:
            link.loaded(self._indices[model.name])

    # The pages

    def _beat(self) -> None:
        self.update()
        for page in self.pages:
            page.heartbeat_s = time.monotonic()
        self._beat_again = asyncio.get_running_loop().call_later(_HEARTBEAT_S, self._beat)

    def _on_batch(self, batcher: Batcher, batch: Batch) -> None:
        index = self._indices.get(batcher.name)  # None: a pipeline's
        if index is not None:
            # The next batches leave the queue first.
            asyncio.get_running_loop().call_soon(self._update, index)

    def update(self) -> None:
        """Write the pages."""
        for index in range(len(self._models)):
            self._update(index)

    def _update(self, index: int) -> None:
        batcher = self._models[index].batcher
        if batcher is not None:
            for page in self.pages:
                page.queues[index].update(batcher.queue, batcher.admission)
            if self._room.waiting and self._room.serve(batcher) and self._decision is None:
                self._decision = asyncio.get_running_loop().call_soon(self._decide)
