"""The one table of what can go wrong, and the body each of it gets (RFC 9457).

A `Problem` is raised by the wire formats and made from the batcher's errors by `from_error`; nothing
else in the server decides a status code. The body is `application/problem+json`; `error` repeats the
detail for V2 clients, which look for nothing else. Extra members are for programs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from batcher import errors as batching
from server.reply import Reply

PROBLEM_JSON = b"application/problem+json"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem: the last part of its `type`, its status and its title."""

    slug: str
    status: int
    title: str


def _table(*kinds: Kind) -> dict[str, Kind]:
    return {kind.slug: kind for kind in kinds}


KINDS = _table(
    Kind("bad-http", 400, "The bytes are not an HTTP request"),
    Kind("not-json", 400, "The body is not valid JSON"),
    Kind("bad-request", 400, "The request does not follow the protocol"),
    Kind("unknown-tensor", 400, "The model has no such tensor"),
    Kind("duplicate-tensor", 400, "A tensor is named twice"),
    Kind("missing-tensor", 400, "A tensor that the model needs is missing"),
    Kind("bad-parameter", 400, "A parameter has a value that it cannot have"),
    Kind("bad-binary", 400, "The binary part does not match its description"),
    Kind("bad-encoding", 400, "The body cannot be decompressed"),
    Kind("unknown-version", 404, "The model has no such version"),
    Kind("unknown-model", 404, "There is no such model"),
    Kind("not-found", 404, "There is nothing at this address"),
    Kind("method-not-allowed", 405, "This address takes other methods"),
    Kind("receive-timeout", 408, "The request did not arrive in time"),
    Kind("body-too-large", 413, "The body is too large"),
    Kind("too-many-rows", 413, "The request has more rows than fit the queue"),
    Kind("unsupported-encoding", 415, "The body's encoding is not supported"),
    Kind("wrong-shape", 422, "A tensor has the wrong shape"),
    Kind("wrong-datatype", 422, "A tensor has the wrong datatype"),
    Kind("wrong-data", 422, "A tensor's data does not fit its shape and datatype"),
    Kind("queue-full", 429, "The queue is full"),
    Kind("internal", 500, "The server failed"),
    Kind("run-failed", 500, "The model failed on this request"),
    Kind("starting", 503, "The model is still being loaded"),
    Kind("load-failed", 503, "The model could not be loaded"),
    Kind("draining", 503, "The server is about to stop"),
    Kind("expired", 504, "The request's time limit was over before it could be run"),
    Kind("abandoned", 503, "The server stopped before the request was done"),
    Kind("engine-dead", 503, "The model's engine is unusable"),
)


class Problem(Exception):
    """A refusal with its kind, a sentence for a person and members for a program."""

    def __init__(self, slug: str, detail: str, *, close: bool = False, **members: Any) -> None:
        super().__init__(detail)
        self.kind = KINDS[slug]
        self.detail = detail
        self.close = close
        self.members = members

    def reply(self, *headers: tuple[bytes, bytes]) -> Reply:
        """The answer that tells the caller. `retry_after_s` also becomes the header, rounded up."""
        kind = self.kind
        body = {
            "type": f"/problems/{kind.slug}",
            "title": kind.title,
            "status": kind.status,
            "detail": self.detail,
            "error": self.detail,
            **self.members,
        }
        retry_after_s = body.pop("retry_after_s", None)
        if retry_after_s is not None:
            # RFC 9110, 10.2.3: whole seconds; rounding up keeps the promise.
            headers += ((b"retry-after", b"%d" % max(1, math.ceil(retry_after_s))),)
            body["retry_after_ms"] = max(1, math.ceil(retry_after_s * 1000))
        text = msgspec.json.encode(body)
        return Reply(kind.status, PROBLEM_JSON, (text,), headers=headers, close=self.close)


def from_error(error: Exception) -> Problem:
    """The problem that an exception means to a caller; what is not known is `internal`."""
    match error:
        case Problem():
            return error
        case batching.QueueFullError():
            return Problem(
                "queue-full",
                str(error),
                queued_rows=error.queued_rows,
                limit=error.limit,
                retry_after_s=error.retry_after_s,
            )
        case batching.TooManyRowsError():
            return Problem("too-many-rows", str(error), rows=error.rows, limit=error.limit)
        case batching.DrainingError():
            return Problem("draining", str(error), close=True, retry_after_s=1)
        case batching.ExpiredError():
            return Problem("expired", str(error), timeout_ms=error.timeout_s * 1e3)
        case batching.AbandonedError():
            return Problem("abandoned", str(error), close=True, retry_after_s=1)
        case batching.BatchFailedError():
            return Problem("run-failed", str(error), model=error.model, reference=error.reference)
        case batching.EngineGoneError():
            return Problem("engine-dead", str(error), model=error.model, reference=error.reference)
        case _:
            return Problem("internal", "the server failed on this request; its log says why")


def too_large(length: int, limit: int) -> Problem:
    """A body over the limit. The connection ends: reading the rest only to drop it would be the attack."""
    return Problem(
        "body-too-large",
        f"the body has {length} bytes or more, the limit is {limit}",
        close=True,
        body_bytes=length,
        limit_bytes=limit,
    )
