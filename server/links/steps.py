"""Models as steps of a pipeline: `cobatch.model`.

A step's rows go through shared memory into the queue of its model in home, beside the rows of all other
callers. Its call has entered already, so its tenant's limits do not count it again, and it waits for room in
a full queue or slab where a client would be refused.
"""

import asyncio
import threading
import time
from collections.abc import Hashable, Mapping
from contextvars import ContextVar
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np

from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import Array
from cobatch.server.http.problem import Problem
from cobatch.server.observability.record import StepTimes

# Of a call, for its Server-Timing and trace.
KEPT_STEPS = 256
# All that `model` has returned, to check their names when the pipeline is loaded. Not kept: a handler may ask
# for one in each call.
_handles: "WeakSet[ModelHandle]" = WeakSet()


class StepError(Exception):
    """A step got no answer. A handler that lets it through answers with the same problem.

    `kind`, `status` and `members` are those of the problem (docs/problems.md); `model` is the step's.
    """

    def __init__(self, model: str, problem: Problem) -> None:
        super().__init__(f"step {model!r}: {problem.detail}")
        self.model = model
        self.kind = problem.kind.slug
        self.status = problem.kind.status
        self.members = problem.members


class Link(Protocol):
    """The far end of a link, `server.links.step_end.StepEnd`."""

    loop: asyncio.AbstractEventLoop
    thread: int

    def tenant(self, name: str, rule: int) -> Tenant: ...
    async def call(self, caller: "Caller", name: str, inputs: Mapping[str, Any]) -> dict[str, Array]: ...


class Caller:
    """A call whose handler uses models. Steps in its context are the call's, until `end`.

    `tenant`: its name and the index of its rule. `deadline_s`: in CLOCK_MONOTONIC. `source`: of an anonymous
    caller, see `Request.source`.
    """

    def __init__(
        self,
        link: Link,
        *,
        tenant: tuple[str, int] | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        source: Hashable = None,
    ) -> None:
        self.link = link
        self.tenant = None if tenant is None else link.tenant(*tenant)
        self.priority = priority
        self.deadline_s = deadline_s
        self.source = id(self) if source is None else source
        self.steps: list[StepTimes] = []
        self.open: set[asyncio.Future[Any]] = set()
        self.ended = False

    def end(self) -> None:
        """End the call: its steps that are not answered are cancelled, and no more are accepted."""
        self.ended = True
        for answer in list(self.open):
            answer.cancel()

    def timeout_s(self) -> float | None:
        """Return the seconds until the deadline, if there is one."""
        return None if self.deadline_s is None else self.deadline_s - time.monotonic()


CALLER: ContextVar[Caller | None] = ContextVar("cobatch_caller", default=None)


class ModelHandle:
    """A model of this server, for the handler of a pipeline. See `model`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.owner: type | None = None

    def __set_name__(self, owner: type, attribute: str) -> None:
        self.owner = owner

    async def __call__(self, /, **inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs for these inputs by name. Raises StepError, and TypeError for inputs of other
        names or datatypes."""
        caller = self._caller()
        return await caller.link.call(caller, self.name, inputs)

    def run(self, /, **inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
        """The same for a handler that is no coroutine: wait for the outputs."""
        link = self._caller().link
        if threading.get_ident() == link.thread:
            raise RuntimeError(
                f"model {self.name!r}: run() would stop the event loop; await the model instead"
            )
        return asyncio.run_coroutine_threadsafe(self(**inputs), link.loop).result()

    def _caller(self) -> Caller:
        caller = CALLER.get()
        if caller is None:
            raise RuntimeError(
                f"model {self.name!r} can only be used while a pipeline handles a request, in its context "
                "(asyncio.to_thread takes it along, a ThreadPoolExecutor does not)"
            )
        return caller

    def __repr__(self) -> str:
        return f"model({self.name!r})"


def model(name: str) -> ModelHandle:
    """Return a model of this server, to be used in a pipeline's handler: `await model("detect")(x=array)`.

    Inputs and outputs are arrays by name, with all axes: the first one is rows where the model batches.
    """
    _handles.add(handle := ModelHandle(name))
    return handle


def models_of(handler: object) -> set[str]:
    """Return the names that a handler's modules ask for, without those in the classes of others."""
    return {one.name for one in _handles if one.owner is None or isinstance(handler, one.owner)}
