"""The call that runs, as the code of a handler and the steps that it takes see it."""

import time
from contextvars import ContextVar

from cobatch.server.pipelines.call import Call, Step


class Running:
    """A call in the pool's process. `deadline_s`: when its answer is due, None for never.

    `steps`: what its models took. `ended`: no one waits for its answer.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.deadline_s = None if call.timeout_s is None else time.monotonic() + call.timeout_s
        self.steps: list[Step] = []
        self.ended = False


RUNNING: ContextVar[Running] = ContextVar("cobatch_call")
