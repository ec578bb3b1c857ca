"""A call of a pipeline as a request in its batcher."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from cobatch.batcher.request import Request
from cobatch.batcher.tenant import Tenant
from cobatch.server.observability.record import StepTimes
from cobatch.server.pipelines.call import NOTHING, Head


class PipelineRequest(Request):
    """A call, from the queue to its end. `changed` is set when there is more of the answer.

    `head` is None until the answer begins; `items` are the parts of it that are not taken yet. `ended`: there
    will be no more, and `error` says why if it failed. `taken` tells the process that an item was taken, and
    `withdraw` that no one waits.
    """

    __slots__ = (
        "changed", "client", "content_type", "data", "descriptor", "ended", "head", "items", "request_id",
        "size", "steps", "taken", "withdraw",
    )  # fmt: skip

    def __init__(
        self,
        content_type: str,
        data: memoryview,
        *,
        tenant: Tenant | None = None,
        client: Hashable = None,
        request_id: str = "",
    ) -> None:
        super().__init__(1, (), ())
        self.content_type = content_type
        self.data = data
        self.size = len(data)
        self.descriptor = -1  # of memory with the data, if they are long
        self.tenant = tenant
        self.client = client
        self.request_id = request_id
        self.changed = asyncio.Event()
        self.head: Head | None = None
        self.items: deque[memoryview] = deque()
        self.ended = False
        self.steps: tuple[StepTimes, ...] = ()
        self.taken: Callable[[], None] = _nothing
        self.withdraw: Callable[[], None] = _nothing

    @property
    def source(self) -> Hashable:
        return self.tenant or self.client

    def done(self) -> None:
        self.let_go()
        self.ended = True
        if self.error is not None:
            self.withdraw()  # it may run still
        self.changed.set()

    def let_go(self) -> None:
        """Let go of the body: the process has it, or no one waits."""
        self.data = NOTHING
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _nothing(*_: Any) -> None:
    """Do nothing: the call is not with a process."""
