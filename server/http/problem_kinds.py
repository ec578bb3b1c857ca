"""What the members of a problem's body mean, for the pages and docs/problems.md.

Every kind of problem that the server answers with, and what its page says.

A kind's slug is the stable part of its `type`, /problems/SLUG, and leads to its page. Members are
described in `server.http.problem_kinds`. The pages (`server.api.problems`) and docs/problems.md
(`scripts.problem_docs`) are made from this table; a test sees to it that each kind is raised somewhere,
with no members but its own.
"""

from __future__ import annotations

from dataclasses import dataclass

# In the order of the body.
ALWAYS = {
    "type": "the kind of problem: a URI reference that leads to its page, /problems/SLUG",
    "title": "the kind in words; always the same for one type",
    "status": "the response's status code",
    "detail": "what was wrong with this request, for a person",
    "error": "the same text as `detail`, where clients of the V2 protocol look for it",
}
SOMETIMES = {
    "prediction": "where the request was accepted as a prediction (/v1): its object, without the error",
    "instance": "the path of the request, wherever the server knew it; a problem of the connection has none",
}
# What programs can act on; which kinds have which of them stands with the kinds.
MEMBERS = {
    "actual": "what came instead: a shape or a datatype",
    "actual_bytes": "bytes of the tensor's data that came",
    "actual_elements": "elements that came",
    "allowed": "what would have been accepted there",
    "binary_data_size": "the input's binary_data_size",
    "body_bytes": "bytes of the body; of one that was not read to its end, at least so many",
    "datatype": "the tensor's datatype",
    "encoding": "the coding that came",
    "expected": "what the model takes: a shape (-1: any size) or a datatype",
    "expected_bytes": "bytes that the shape and the datatype make",
    "expected_elements": "elements that the shape makes",
    "field": "the part of the item that is not accepted: url, headers or body",
    "header_length": "the value of Inference-Header-Content-Length",
    "id": "the id in question",
    "inputs": "names of the model's inputs",
    "left_bytes": "bytes that the body had left at that point",
    "left_over_bytes": "bytes after the last tensor",
    "limit": "the most that is accepted, in the unit of the kind: rows, items, predictions or elements",
    "limit_ms": "the most time that is allowed, in milliseconds",
    "limit_bytes": "the most bytes that are accepted",
    "model": "the model's name",
    "models": "names of the models that are served",
    "needed_ms": "the time that it would take, as far as can be foretold, in milliseconds",
    "outputs": "names of the model's outputs",
    "parameter": "the parameter's name",
    "permission": "what the credentials would have to permit",
    "queued_rows": "rows that waited for the model when the request came",
    "reference": "an id that stands beside the reason in the server's log",
    "retry_after_ms": "when to try again, in milliseconds; the header Retry-After says it in seconds",
    "rows": "rows of the request",
    "shape": "the shape that came",
    "supported": "what the server supports instead",
    "tenant": "the tenant that the credentials name",
    "tensor": "the input's or output's name",
    "timeout_ms": "the request's time limit in milliseconds",
    "used": "how much of the limit is taken",
    "version": "the version that was asked for",
    "versions": "versions that there are",
    "what": "which limit it is: concurrent requests, queued rows, or requests at once",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind: the last part of its `type`, its status and title; what it means and what to do about it.

    `members` are those that a body of this kind may have beside `server.http.problem_kinds.ALWAYS`.
    """

    slug: str
    status: int
    title: str
    meaning: str
    remedy: str
    members: tuple[str, ...] = ()


def _table(*kinds: Kind) -> dict[str, Kind]:
    table = {kind.slug: kind for kind in kinds}
    assert len(table) == len(kinds), "a slug stands twice"
    return dict(sorted(table.items(), key=lambda each: each[1].status))


_TRY_LATER = "Send the same request again, not before Retry-After has passed."

KINDS = _table(
    # 400: the request is not one
    Kind("bad-http", 400, "The bytes are not an HTTP request",
         "What came over the connection cannot be read as HTTP/1.1; the connection is closed.",
         "Look at the client or the proxy in between: its framing or a header is malformed."),
    Kind("not-json", 400, "The body is not valid JSON",
         "The body, or its JSON part, is no JSON text in UTF-8, or is nested too deeply.",
         "Send valid JSON. NaN and Infinity are not JSON; binary tensors carry them."),
    Kind("bad-request", 400, "The request does not follow the protocol",
         "The JSON is valid, but a field is missing or has the wrong type.",
         "Correct the field that `detail` names by its path."),
    Kind("unknown-tensor", 400, "The model has no such tensor",
         "An input, or an output that is asked for, has a name that the model does not know.",
         "Use the names that the model's metadata (GET /v2/models/NAME) lists.",
         ("tensor", "inputs", "outputs")),
    Kind("duplicate-tensor", 400, "A tensor is named twice",
         "The same input is given, or the same output is asked for, more than once.",
         "Name each tensor once.",
         ("tensor",)),
    Kind("missing-tensor", 400, "A tensor that the model needs is missing",
         "An input is not in the request, or has no data.",
         "Send all inputs that the model's metadata (GET /v2/models/NAME) lists, each with data.",
         ("tensor",)),
    Kind("bad-parameter", 400, "A parameter has a value that it cannot have",
         "A parameter is reserved, not supported here, of the wrong type, or out of its range.",
         "Leave the parameter out, or give it a value as `detail` describes it.",
         ("parameter", "tensor")),
    Kind("bad-binary", 400, "The binary part does not match its description",
         "With the binary tensor extension: the sizes in Inference-Header-Content-Length, "
         "binary_data_size and the body do not add up, or data is given twice or without its size.",
         "Send the JSON, then each binary input's bytes in the order of the inputs, and nothing after them.",
         ("tensor", "inputs", "header_length", "body_bytes", "binary_data_size", "left_bytes",
          "left_over_bytes")),
    Kind("bad-encoding", 400, "The body cannot be decompressed",
         "The body is not one whole stream of the coding that Content-Encoding names.",
         "Compress the whole body once, or send it as it is and without Content-Encoding."),
    Kind("duplicate-id", 400, "Two items of a batch have the same id",
         "Answers of POST /batch are told apart by the items' ids, so each needs its own.",
         "Give every item an id of its own. No item was run.",
         ("id",)),
    Kind("not-batchable", 400, "The request cannot be an item of a batch",
         "An item of POST /batch is a V2 infer request with tensors in JSON. This one has another address, "
         "a header that items cannot have, or binary tensors.",
         "Send this request on its own; the other items of the batch are not affected.",
         ("field", "allowed")),
    # 400, 401, 403: who calls
    Kind("bad-authorization", 400, "The credentials are not written as they must be",
         "The header Authorization is no `Bearer TOKEN`, is there twice, comes together with X-API-Key, or "
         "the token stands in the query or in a form (RFC 6750).",
         "Send one header: `Authorization: Bearer TOKEN`, or `X-API-Key: KEY`."),
    Kind("unauthenticated", 401, "The server wants to know who you are",
         "The request has no credentials, and this address is not open to everybody.",
         "Send `Authorization: Bearer TOKEN` with an access token of an issuer that this server trusts, or "
         "`X-API-Key: KEY`."),
    Kind("invalid-credentials", 401, "The credentials are not valid",
         "The token or key is expired, not valid yet, made for somebody else, changed, or of an issuer or a "
         "key that this server does not trust. `detail` says which.",
         "Get a new token from the issuer. If a new one is refused too, compare its issuer, audience and "
         "type with the server's configuration."),
    Kind("forbidden", 403, "You may not do this",
         "The credentials are valid, but they do not permit this.",
         "Ask the operator for the permission in `permission`, or call a model that you may call.",
         ("permission", "model")),
    # 404, 405: the address
    Kind("unknown-prediction", 404, "There is no such prediction",
         "There is no prediction with this id, or none any more, or it is another subject's: finished ones "
         "are kept for a limited time (kept_s), in limited number and size (kept_predictions, kept_bytes).",
         "Fetch a prediction soon after it is done, as the subject that made it."),
    Kind("unknown-request", 404, "There was no such request",
         "No recent request had this X-Request-Id: only the last ones are kept, and only in this process.",
         "Ask sooner, and ask the server that answered it.",
         ("id",)),
    Kind("unknown-version", 404, "The model has no such version",
         "The model is served here, but not in this version.",
         "Use the version that `versions` names, or leave it out of the address.",
         ("model", "version", "versions")),
    Kind("unknown-model", 404, "There is no such model",
         "No model of this name is served here.",
         "Use one of the names in `models`.",
         ("model", "models")),
    Kind("not-found", 404, "There is nothing at this address",
         "The path is none that this server knows.",
         "Compare the path with the API's description; addresses do not end with a slash."),
    Kind("method-not-allowed", 405, "This address takes other methods",
         "The path exists, but not for this method.",
         "Use a method that the header Allow names.",
         ("allowed",)),
    # 409: somebody else's doing
    Kind("profile-running", 409, "A profile is being recorded already",
         "The server records one profile at a time (POST /v1/profile), and somebody else is at it.",
         _TRY_LATER,
         ("retry_after_ms",)),
    Kind("cancelled", 409, "The prediction was cancelled",
         "While this request waited for its prediction, another one cancelled it (DELETE).",
         "To have it made after all, send it again with another Idempotency-Key."),
    # 408, 413, 415, 431: what came, or did not
    Kind("receive-timeout", 408, "The request did not arrive in time",
         "The connection was open for a request that did not arrive whole within the server's limit "
         "(receive_timeout_s); it is closed.",
         "Send the request at once when it is complete; check the network for a sender that stalls."),
    Kind("body-too-large", 413, "The body is too large",
         "The body, as it came or decompressed, has more bytes than the server takes (max_body_bytes).",
         "Send fewer rows per request, or binary tensors, which are shorter than JSON.",
         ("body_bytes", "limit_bytes")),
    Kind("too-many-rows", 413, "The request has more rows than fit the queue",
         "The request could not be queued even if nobody else waited (max_queue_rows).",
         "Split it into requests of at most `limit` rows.",
         ("rows", "limit")),
    Kind("too-many-items", 413, "The batch has too many items",
         "POST /batch takes a limited number of items (max_batch_items); this one has more.",
         "Send them in several calls of at most `limit` items. No item was run.",
         ("limit",)),
    Kind("unsupported-encoding", 415, "The body's encoding is not supported",
         "Content-Encoding names a coding that the server does not know.",
         "Compress with one of those in `supported`, or not at all.",
         ("encoding", "supported")),
    Kind("unsupported-media-type", 415, "The body's type is not supported",
         "Content-Type, of the body or of a part, is none that this address takes.",
         "Send one of the types in `supported`. curl sends JSON with `--json`.",
         ("supported",)),
    Kind("headers-too-large", 431, "The headers are too large",
         "The request's line and headers have more bytes than the server reads; the connection is closed.",
         "Send fewer or shorter headers."),
    # 422: the request is one, but not for this model
    Kind("wrong-shape", 422, "A tensor has the wrong shape",
         "A tensor's shape is not the model's, its number of rows differs from the other inputs', or an axis "
         "that is padded is longer than the longest that is padded to, or not as long as another input's.",
         "Send the shape in `expected`, where -1 stands for any size, but at most `limit` where that is "
         "there; the first axis counts the rows.",
         ("tensor", "expected", "actual", "limit")),
    Kind("wrong-datatype", 422, "A tensor has the wrong datatype",
         "A tensor's datatype is not the one that the model takes.",
         "Convert the data to the datatype in `expected`; the server never converts silently.",
         ("tensor", "expected", "actual")),
    Kind("wrong-data", 422, "A tensor's data does not fit its shape and datatype",
         "The number of elements or bytes is not what the shape says, a value is out of the datatype's "
         "range or not finite, or nested rows differ in length.",
         "Send exactly as many values as the shape says, each of them one that the datatype has.",
         ("tensor", "datatype", "shape", "expected", "expected_elements", "actual_elements",
          "expected_bytes", "actual_bytes")),
    Kind("idempotency-mismatch", 422, "The Idempotency-Key belongs to another request",
         "The same key came before with another path, query, Content-Type or body.",
         "Send the very same request again, or use a new key for a new one."),
    # 429, 5xx: not the request's fault
    Kind("queue-full", 429, "The queue is full",
         "As many rows wait for the model as may wait (max_queue_rows); nothing was read or run.",
         _TRY_LATER + " Fewer callers, or more servers, make it rarer.",
         ("queued_rows", "limit", "retry_after_ms")),
    Kind("tenant-limit", 429, "You have as much in the server as you may have",
         "The tenant that the credentials name has reached its own limit: of concurrent requests, of queued "
         "rows, or of requests per second. Other tenants are not affected; nothing was read or run.",
         _TRY_LATER + " `what` says which limit it is; the operator sets it ([[auth.tenants]]).",
         ("tenant", "what", "used", "limit", "retry_after_ms")),
    Kind("deadline-unreachable", 429, "The request would not be answered in time",
         "With what waits before it, the request would take longer than its time limit (V2 `timeout`, "
         "`deadline_ms`, or the model's); it was not queued, so nothing was run in vain.",
         _TRY_LATER + " Or allow more time.",
         ("timeout_ms", "needed_ms", "retry_after_ms")),
    Kind("too-many-bad-tokens", 429, "Too many tokens with a bad signature came from your address",
         "To check a signature costs the server more than a request does, so an address whose tokens fail it "
         "again and again is not heard for a while. Tokens that were good before are still taken.",
         _TRY_LATER + " Find out which client sends tokens that nobody signed.",
         ("retry_after_ms",)),
    Kind("too-many-predictions", 429, "Too many predictions are unfinished",
         "The predictions that are kept for clients, and are not finished yet, take up all the room "
         "(kept_predictions, kept_bytes); nothing was run.",
         _TRY_LATER + " Without `Prefer: respond-async` and Idempotency-Key nothing has to be kept.",
         ("limit", "limit_bytes", "retry_after_ms")),
    Kind("internal", 500, "The server failed",
         "A defect of the server, which its log describes.",
         "Report it with the time at which it happened. Sending the request again may work."),
    Kind("run-failed", 500, "The model failed on this request",
         "The engine reported an error while it ran this request; other requests of the batch are not "
         "affected.",
         "Check the values of the inputs. If they are good, give the operator the `reference`: it stands "
         "in the server's log beside the engine's message.",
         ("model", "reference")),
    Kind("result-too-large", 500, "The answer was too large to be kept",
         "It was made, but is larger than what may be kept (kept_bytes).",
         "Ask for fewer outputs, for top_k, or for fewer rows; or wait for the answer without "
         "`Prefer: respond-async`.",
         ("body_bytes", "limit_bytes")),
    Kind("starting", 503, "The model is still being loaded",
         "The server is up, but this model is not ready yet.",
         "Wait until GET /v2/models/NAME/ready answers 200, or send it again after Retry-After.",
         ("model", "retry_after_ms")),
    Kind("keys-unavailable", 503, "The token cannot be checked now",
         "The server has no keys of the token's issuer, because it could not fetch them or they are too old.",
         _TRY_LATER + " The operator finds the reason in the server's log.",
         ("retry_after_ms",)),
    Kind("load-failed", 503, "The model could not be loaded",
         "The model's file could not be opened; the server's log says why. Sending again does not help.",
         "The operator has to correct the model or its settings and to start the server again.",
         ("model",)),
    Kind("draining", 503, "The server is about to stop",
         "The server answers what it has accepted and takes nothing new; the connection is closed.",
         "Send the same request to another server, or after Retry-After on a new connection.",
         ("retry_after_ms",)),
    Kind("abandoned", 503, "The server stopped before the request was done",
         "The request was accepted, but not done when the time for stopping (drain_timeout_s) was over.",
         "Send the same request to another server, or after Retry-After on a new connection.",
         ("retry_after_ms",)),
    Kind("engine-dead", 503, "The model's engine is unusable",
         "The engine has failed for good; only a new server process helps.",
         "Send the same request to another server; give the operator the `reference` in the log.",
         ("model", "reference")),
    Kind("expired", 504, "The request's time limit was over before it could be run",
         "The request was accepted, and waited until it could not be answered within its time limit any "
         "more; it was not run.",
         "Allow more time, send it when fewer others wait, or give it a higher priority.",
         ("timeout_ms",)),
    Kind("deadline-too-short", 504, "The time limit is shorter than the model takes",
         "The model takes longer for these rows than the request's time limit allows, even if nobody else "
         "waits; it was not queued.",
         "Allow at least `needed_ms`.",
         ("timeout_ms", "needed_ms")),
    Kind("execution-timeout", 504, "The model did not finish in time",
         "The engine did not come back within the model's limit (execution_timeout_ms). It is opened again "
         "where that is possible.",
         "Send it again after a while. If it happens with these inputs each time, tell the operator.",
         ("model", "limit_ms")),
)  # fmt: skip
