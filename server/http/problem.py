"""Problems (RFC 9457): every response with an error. problem_kinds.json has the table of kinds.

A kind's slug is the stable part of its `type`, /problems/SLUG, the address of its page. The pages
(`server.api.pages`) and docs/problems.md (scripts/docs.py) are made from the table.

Wire formats raise a `Problem`; `from_error` makes one from the batcher's errors. Nothing else decides a
status code. The body is `application/problem+json`; `error` repeats the detail for V2 clients, which read
nothing else. Extra members are for programs.
"""

import math
from pathlib import Path
from typing import Any

import msgspec

from cobatch.batcher import errors as batching
from cobatch.engines.errors import BadRequest
from cobatch.server.http.reply import Reply


class Kind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind: the last part of its `type`, its status and title, its meaning and its remedy.

    `members` are those that its body may have beside `ALWAYS`.
    """

    slug: str
    status: int
    title: str
    meaning: str
    remedy: str
    members: tuple[str, ...] = ()


class _Table(msgspec.Struct, forbid_unknown_fields=True):
    """The members of a problem's body, each with its meaning, and the kinds in the order of their status."""

    always: dict[str, str]
    sometimes: dict[str, str]
    members: dict[str, str]
    kinds: list[Kind]


_TABLE = msgspec.json.decode(Path(__file__).with_name("problem_kinds.json").read_bytes(), type=_Table)
ALWAYS, SOMETIMES, MEMBERS = _TABLE.always, _TABLE.sometimes, _TABLE.members
KINDS = {kind.slug: kind for kind in _TABLE.kinds}

PROBLEM_JSON = b"application/problem+json"
# Longer text from a client is cut when it is quoted.
_LONGEST = 1000


def _clipped(value: Any) -> Any:
    """Return the value; of a long text or list, the beginning."""
    if isinstance(value, str) and len(value) > _LONGEST:
        return value[:_LONGEST] + "..."
    if isinstance(value, list) and len(value) > _LONGEST:
        return [*value[:_LONGEST], "..."]
    return value


class Problem(Exception):
    """A refusal: its kind, a sentence for people and members for programs."""

    def __init__(
        self,
        slug: str,
        detail: str,
        *,
        close: bool = False,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.kind = KINDS[slug]
        self.detail = _clipped(detail)
        self.close = close
        self.headers = headers
        self.members = {name: _clipped(value) for name, value in members.items()}

    def reply(self, *headers: tuple[bytes, bytes], instance: str | None = None) -> Reply:
        """Return the response. `instance`: the path of the request, if it is known.

        A member `retry_after_s` becomes Retry-After, rounded up, and `retry_after_ms`.
        """
        kind = self.kind
        headers += self.headers
        body = {
            "type": f"/problems/{kind.slug}",
            "title": kind.title,
            "status": kind.status,
            "detail": self.detail,
            "error": self.detail,
            **self.members,
        }
        if instance is not None:
            body["instance"] = instance
        retry_after_s = body.pop("retry_after_s", None)
        if retry_after_s is not None:
            # RFC 9110, 10.2.3: whole seconds; rounded up, so that a retry is not too early.
            headers += ((b"retry-after", b"%d" % max(1, math.ceil(retry_after_s))),)
            body["retry_after_ms"] = max(1, math.ceil(retry_after_s * 1000))
        if kind.status == 405:
            headers += ((b"allow", ", ".join(self.members["allowed"]).encode()),)
        text = msgspec.json.encode(body)
        return Reply(kind.status, PROBLEM_JSON, (text,), headers=headers, close=self.close, slug=kind.slug)


_SLUGS: dict[type[batching.BatcherError], str] = {
    batching.QueueFullError: "queue-full",
    batching.TenantLimitError: "tenant-limit",
    batching.TooManyRowsError: "too-many-rows",
    batching.TooLongError: "wrong-shape",
    batching.LengthMismatchError: "wrong-shape",
    batching.DeadlineUnreachableError: "deadline-unreachable",
    batching.DeadlineTooShortError: "deadline-too-short",
    batching.ExpiredError: "expired",
    batching.ExecutionTimeoutError: "execution-timeout",
    batching.BatchFailedError: "run-failed",
    batching.InputRejectedError: "input-rejected",
    batching.EngineGoneError: "engine-dead",
    batching.EngineRestartingError: "engine-restarting",
}
_MILLISECONDS = {"timeout_s": "timeout_ms", "needed_s": "needed_ms", "limit_s": "limit_ms"}


def from_error(error: Exception) -> Problem:
    """Return the problem that an exception is to a client; an unknown exception is `internal`."""
    match error:
        case Problem():
            return error
        case BadRequest():
            return Problem("refused-by-model", str(error))
        case batching.DrainingError():
            return Problem("draining", str(error), close=True, retry_after_s=1)
        case batching.AbandonedError():
            return Problem("abandoned", str(error), close=True, retry_after_s=1)
        case batching.BatcherError() if type(error) in _SLUGS:
            members = {
                _MILLISECONDS.get(name, name): round(value * 1e3, 3) if name in _MILLISECONDS else value
                for name, value in vars(error).items()
            }
            return Problem(_SLUGS[type(error)], str(error), **members)
        case _:
            return internal()


def too_large(length: int, limit: int) -> Problem:
    """Return the problem of a body over the limit. The connection ends, since the rest is not read."""
    return Problem(
        "body-too-large",
        f"the body has {length} bytes or more, the limit is {limit}",
        close=True,
        body_bytes=length,
        limit_bytes=limit,
    )


def invalid(detail: str) -> Problem:
    """Return the problem of bytes that are no request of HTTP/1.1. The connection ends."""
    return Problem("bad-http", detail, close=True)


def no_memory(waited_s: float) -> Problem:
    """Return the problem of a body for which there is no memory. The connection ends."""
    waited = f"for {waited_s:g} s " if waited_s else ""
    detail = f"there was {waited}no memory for the body: those of other requests have it"
    return Problem("body-memory", detail, close=True, retry_after_s=1)


def internal() -> Problem:
    """Return the problem of a request that a defect of the server prevents."""
    return Problem("internal", "the server failed on this request; its log says why")


def stopping() -> Problem:
    """Return the problem of a request to a server that is about to stop."""
    return Problem("draining", "the server is about to stop", close=True, retry_after_s=1)
