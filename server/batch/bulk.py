"""Infer items of one batch call that are alike, as one request to the batcher.

Most items of a call are one row each for the same model, and ask for nothing special. Their rows lie
behind one another in one request of as many rows, which saves the way through the queue for each of
them; each still gets an answer of its own. Where the rows together are refused, each item asks for room
by itself; where their run fails, they are run again in halves, and only those that are to blame suffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from cobatch.batcher.errors import BatcherError, BatchFailedError
from cobatch.batcher.request import Payload, Request
from cobatch.batcher.tenant import Tenant
from cobatch.server.auth.principal import Principal
from cobatch.server.http.problem import Problem, from_error
from cobatch.server.http.reply import Reply
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import (
    Inference,
    InferRequest,
    ModelRequest,
    encoding_failed,
    instance_of,
)
from cobatch.server.v2.messages import InferMessage

# An item: its message, and its place in the call.
Member = tuple[InferMessage, int]


class Caller(Protocol):
    """The call. `answer` gives an item its reply; `by_itself` asks for a member as if it had come alone;
    `runs` is told of the request that an item is in after all, or failed in."""

    def answer(self, index: int, reply: Reply) -> None: ...

    def by_itself(self, model: Model, member: Member) -> None: ...

    def runs(self, index: int, request: ModelRequest) -> None: ...


class BulkRequest(ModelRequest):
    """One row for each member."""

    __slots__ = ("caller", "members")

    def __init__(
        self,
        model: Model,
        members: Sequence[Member],
        rows: Sequence[Payload],
        caller: Caller,
        tenant: Tenant | None,
    ) -> None:
        decoder = model.decoder
        super().__init__(len(members), decoder.row_shapes, [b"".join(rows)])  # type: ignore[arg-type]
        self.model = model
        self.record = None
        self.callers = len(members)
        self.tenant = tenant
        self.members = members
        self.caller = caller

    def done(self) -> None:
        members, self.members = self.members, ()
        if isinstance(self.error, BatchFailedError):
            self._run_apart(members)
            return
        caller = self.caller
        for message, index in members:
            if self.error is not None:
                caller.runs(index, self)
            caller.answer(index, self._reply_to(message))
            self.first_row += 1

    def _reply_to(self, message: InferMessage) -> Reply:
        model = self.model
        if self.error is not None:
            return from_error(self.error).reply(instance=instance_of(model))
        # To the encoder this is a request of one row, another one each time.
        self.rows = 1
        try:
            return model.encoder.encode(self, model.decoder.all_json, message.id)
        except Exception as error:  # noqa: BLE001 - logged there
            return encoding_failed(model, error)

    def _run_apart(self, members: Sequence[Member]) -> None:
        """Who is to blame shows when the batcher runs them as requests of their own, in halves."""
        batcher = self.model.loaded_batcher
        # Nobody has been told of a failure yet.
        batcher.counters.failed -= self.callers
        read, answer = self.model.decoder.read, self.caller.answer
        apart: list[Request] = []
        for message, index in members:
            request = InferRequest(
                self.model, read((message, None, None)), partial(answer, index), self.tenant
            )
            self.caller.runs(index, request)
            apart.append(request)
        batcher.run_again(apart, self.enqueued_s)


def submit_alike(
    core: Inference,
    model: Model,
    members: Sequence[Member],
    caller: Caller,
    principal: Principal | None,
) -> list[BulkRequest]:
    """Submit members together, as far as they are alike; the others go each by itself."""
    may = principal is None or principal.may_infer(model.name)
    alike: list[Member] = []
    rows: list[Payload] = []
    for member in members:
        row = None if not may or core.draining or model.batcher is None else _row_of(model, member[0])
        if row is None:
            caller.by_itself(model, member)
        else:
            alike.append(member)
            rows.append(row)
    requests = []
    tenant = None if principal is None else principal.tenant
    # In pieces that the policy calls full: a larger one would go in a larger batch than pays.
    most = model.batcher.full_rows if model.batcher is not None else 1
    for first in range(0, len(alike), most):
        end = first + most
        request = _submit(model, alike[first:end], rows[first:end], caller, tenant)
        if request is not None:
            requests.append(request)
    return requests


def _row_of(model: Model, message: InferMessage) -> Payload | None:
    try:
        decoded = model.decoder.read((message, None, None))
    except Problem:
        return None  # by itself it will be told so
    alike = model.decoder.is_plain_row(decoded) and len(decoded.payloads) == 1
    return decoded.payloads[0] if alike else None


def _submit(
    model: Model,
    members: list[Member],
    rows: list[Payload],
    caller: Caller,
    tenant: Tenant | None,
) -> BulkRequest | None:
    request = BulkRequest(model, members, rows, caller, tenant)
    try:
        model.loaded_batcher.submit(request, counts=False)
    except BatcherError:
        # There may be room for some of them, or time. Each is told, and counted, by itself.
        for member in members:
            caller.by_itself(model, member)
        return None
    return request
