"""Several requests of one row each as one request to the batcher.

A bundle goes through the queue once, however many members it has. Where there is no room for all of it, each
member is tried alone; where its run fails, the members are run again as requests of their own, in halves, so
that only the failing ones get the error. Its members are counted as one request each.
"""

from collections.abc import Callable, Sequence

from cobatch.batcher.errors import BatcherError
from cobatch.batcher.request import Payload, Request, State
from cobatch.engines.base import RowShapes


class Bundle(Request):
    """One row for each member. Subclass it and define `separate`, and `done`, which answers all members."""

    __slots__ = ()

    def __init__(self, row_shapes: RowShapes, rows: Sequence[Sequence[Payload]]) -> None:
        """`rows` has each member's payloads, in the signature's order; none is a list."""
        payloads = [b"".join(column) for column in zip(*rows, strict=True)]
        super().__init__(len(rows), row_shapes, payloads)
        self.callers = len(rows)

    def separate(self) -> list[Request]:
        """Return the members as requests of their own, in order. Called at most once."""
        raise NotImplementedError

    def enter(self, submit: Callable[[Request], None]) -> None:
        """Queue the bundle, or else each member; a member that is refused too is done with that error."""
        try:
            submit(self)
        except BatcherError:
            for member in self.separate():
                try:
                    submit(member)
                except BatcherError as error:
                    member.error = error
                    member.done()

    def split(self) -> list[Request]:
        """End the bundle, whose run failed, and return the members, accepted and running in its place."""
        self.state = State.DONE
        if self.expiry is not None:
            self.expiry.cancel()
        members = self.separate()
        for member in members:
            member.state = State.RUNNING
            member.tenant = self.tenant
            member.enqueued_s = self.enqueued_s
            member.deadline_s, member.timeout_s = self.deadline_s, self.timeout_s
        return members
