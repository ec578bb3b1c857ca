"""Answers that wait for a block of home's slab: none waits for later ones."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import numpy as np

from cobatch.batcher.request import Batch
from cobatch.engines.link import slab
from cobatch.engines.link.channel import Channel, FrontChannel, HomeChannel
from cobatch.engines.link.messages import (
    BUNDLE_IDS,
    Answers,
    Release,
    Submit,
    decode_from_front,
    decode_to_front,
)
from cobatch.engines.link.slab import BLOCK_BYTES
from cobatch.server.links.downlink import Downlink, LinkedRequest

BLOCKS = 4


class Front:
    """The other end of a downlink, without a server: it reads messages and gives blocks back."""

    def __init__(self) -> None:
        front, home = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        requests, answers = slab.create("requests", BLOCK_BYTES), slab.create("answers", BLOCKS * BLOCK_BYTES)
        self.channel: FrontChannel = Channel(front, decode_to_front)
        to_front: HomeChannel = Channel(home, decode_from_front)
        self.home = Downlink(
            0,
            to_front,
            slab.SlabReader(requests),
            slab.SlabWriter(answers),
            (),
            None,
            asyncio.get_running_loop(),
            held={},
            on_received=lambda link: None,
            on_ended=lambda link, why, broken: None,
        )
        self.blocks: list[int] = []
        self.answered: list[int] = []

    def answers(self, number: int, blocks: int) -> None:
        """Let home answer a request by outputs of this size."""
        submit = Submit(number * BUNDLE_IDS, 0, 1, (), b"")
        request = LinkedRequest(self.home, 0, submit, (((),), [b""]))
        self.home.open[request.id] = request
        request.batch = Batch([request], 1, ((),), "full")
        request.batch.outputs = [np.zeros((1, blocks * BLOCK_BYTES), np.uint8)]
        self.home.answer(request)

    async def receive(self) -> list[int]:
        """Return the numbers of the requests with an answer by now."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        messages: list[Any] = []
        while some := self.channel.receive():
            messages += some
        for message in messages:
            if isinstance(message, Answers):
                assert isinstance(message.payload, int)
                self.blocks.append(message.payload)
                self.answered += [id_ // BUNDLE_IDS for id_ in message.ids]
        return self.answered

    async def release(self, count: int) -> None:
        """Give the blocks back that came first."""
        self.channel.send(Release(tuple(self.blocks[:count])))
        del self.blocks[:count]
        self.channel.flush()
        for _ in range(3):  # home's event loop sees the socket, and then the message
            await asyncio.sleep(0)


async def test_a_large_answer_is_not_overtaken_by_small_ones_for_ever() -> None:
    front = Front()
    for number in range(BLOCKS):
        front.answers(number, 1)
    assert await front.receive() == [0, 1, 2, 3]
    front.answers(4, BLOCKS)
    await front.release(1)
    front.answers(5, 1)
    assert await front.receive() == [0, 1, 2, 3]
    await front.release(3)
    assert await front.receive() == [0, 1, 2, 3, 4]
    await front.release(1)
    assert await front.receive() == [0, 1, 2, 3, 4, 5]
    front.channel.close()
    front.home.end("the test is over")
