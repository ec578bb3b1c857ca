"""Every kind of problem that the server answers with, and the members of a problem's body.

A kind's slug is the stable part of its `type`, /problems/SLUG, the address of its page. The pages
(`server.api.problems`) and docs/problems.md (scripts/docs.py) are made from this table. A test checks that
each kind is raised, with no members but its own.
"""

from dataclasses import dataclass

# In the order of the body.
ALWAYS = {
    "type": "the kind of problem: a URI reference that leads to its page, /problems/SLUG",
    "title": "the kind in words; always the same for one type",
    "status": "the response's status code",
    "detail": "the fault of this request, for people",
    "error": "the same text as `detail`, for clients of the V2 protocol",
}
SOMETIMES = {
    "prediction": "of a request that was accepted as a prediction (/v1): its object, without the error",
    "instance": "the path of the request; a problem of the connection has none",
}
# For programs; each kind names its own.
MEMBERS = {
    "actual": "the shape or datatype in the request",
    "actual_bytes": "bytes of the tensor's data in the request",
    "actual_elements": "elements in the request",
    "allowed": "the accepted values",
    "binary_data_size": "the input's binary_data_size",
    "body_bytes": "bytes of the body; if it was not read to its end, a lower bound",
    "datatype": "the tensor's datatype",
    "encoding": "the coding in the request",
    "expected": "the model's shape (-1: any size) or datatype",
    "expected_bytes": "bytes by shape and datatype",
    "expected_elements": "elements by shape",
    "field": "the part of the item that is not accepted: url, headers or body",
    "header_length": "the value of Inference-Header-Content-Length",
    "id": "the id in question",
    "inputs": "names of the model's inputs",
    "left_bytes": "bytes left in the body at that point",
    "left_over_bytes": "bytes after the last tensor",
    "limit": "the largest number accepted, in the unit of the kind: rows, items, predictions or elements",
    "limit_ms": "the time limit in milliseconds",
    "limit_bytes": "the largest number of bytes that is accepted",
    "model": "the model's name",
    "models": "names of the models that are served",
    "needed_ms": "the predicted time in milliseconds",
    "outputs": "names of the model's outputs",
    "parameter": "the parameter's name",
    "permission": "the permission that the credentials lack",
    "queued_rows": "rows in the model's queue when the request arrived",
    "reference": "an id beside the reason in the server's log",
    "retry_after_ms": "when to try again, in milliseconds; Retry-After has it in seconds",
    "rows": "rows of the request",
    "shape": "the shape in the request",
    "supported": "the values that the server supports",
    "tenant": "the tenant that the credentials name",
    "tensor": "the input's or output's name",
    "timeout_ms": "the request's time limit in milliseconds",
    "used": "the used part of the limit",
    "version": "the version in the request",
    "versions": "the versions served",
    "what": "the limit: concurrent requests, queued rows, or requests at once",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind: the last part of its `type`, its status and title, its meaning and its remedy.

    `members` are those that its body may have beside `ALWAYS`.
    """

    slug: str
    status: int
    title: str
    meaning: str
    remedy: str
    members: tuple[str, ...] = ()


def _table(*kinds: Kind) -> dict[str, Kind]:
    table = {kind.slug: kind for kind in kinds}
    assert len(table) == len(kinds), "two kinds have one slug"
    return dict(sorted(table.items(), key=lambda each: each[1].status))


_TRY_LATER = "Send the same request again, not before Retry-After has passed."

KINDS = _table(
    # 400: not a valid request
    Kind("bad-http", 400, "The bytes are not an HTTP request",
         "The bytes on the connection cannot be read as HTTP/1.1; the connection is closed.",
         "Look at the client or the proxy in between: its framing or a header is malformed."),
    Kind("not-json", 400, "The body is not valid JSON",
         "The body, or its JSON part, is not JSON in UTF-8, or is nested too deeply.",
         "Send valid JSON. NaN and Infinity are not JSON; binary tensors carry them."),
    Kind("bad-request", 400, "The request does not follow the protocol",
         "The JSON is valid, but a field is missing or has the wrong type.",
         "Correct the field that `detail` names by its path."),
    Kind("unknown-tensor", 400, "The model has no such tensor",
         "An input, or a requested output, has a name that the model does not have.",
         "Use the names that the model's metadata (GET /v2/models/NAME) lists.",
         ("tensor", "inputs", "outputs")),
    Kind("duplicate-tensor", 400, "A tensor is named twice",
         "The same input is given, or the same output requested, more than once.",
         "Name each tensor once.",
         ("tensor",)),
    Kind("missing-tensor", 400, "A tensor that the model needs is missing",
         "An input is not in the request, or has no data.",
         "Send all inputs that the model's metadata (GET /v2/models/NAME) lists, each with data.",
         ("tensor",)),
    Kind("bad-parameter", 400, "A parameter has an invalid value",
         "A parameter is reserved, not supported here, of the wrong type, or out of its range.",
         "Leave the parameter out, or give it a value that `detail` describes.",
         ("parameter", "tensor")),
    Kind("bad-binary", 400, "The binary part does not match its description",
         "With the binary tensor extension: the sizes in Inference-Header-Content-Length, "
         "binary_data_size and the body do not add up, or data is given twice or without its size.",
         "Send the JSON, then each binary input's bytes in the order of the inputs, and nothing after them.",
         ("tensor", "inputs", "header_length", "body_bytes", "binary_data_size", "left_bytes",
          "left_over_bytes")),
    Kind("bad-encoding", 400, "The body cannot be decompressed",
         "The body is not one whole stream of the coding that Content-Encoding names.",
         "Compress the whole body once, or send it uncompressed and without Content-Encoding."),
    Kind("duplicate-id", 400, "Two items of a batch have the same id",
         "Responses in POST /batch are identified by the items' ids, so each item needs its own.",
         "Give every item an id of its own. No item was run.",
         ("id",)),
    Kind("not-batchable", 400, "The request cannot be an item of a batch",
         "An item of POST /batch is a V2 infer request with tensors in JSON. This one has another address, "
         "a header that items cannot have, or binary tensors.",
         "Send this request on its own; the other items of the batch are not affected.",
         ("field", "allowed")),
    # 400, 401, 403: credentials
    Kind("bad-authorization", 400, "The credentials are malformed",
         "The header Authorization is not `Bearer TOKEN`, is repeated, or comes together with X-API-Key; or "
         "the token is in the query or in a form (RFC 6750).",
         "Send one header: `Authorization: Bearer TOKEN`, or `X-API-Key: KEY`."),
    Kind("unauthenticated", 401, "The request has no credentials",
         "This address needs credentials, and the request has none.",
         "Send `Authorization: Bearer TOKEN` with an access token of an issuer that this server trusts, or "
         "`X-API-Key: KEY`."),
    Kind("invalid-credentials", 401, "The credentials are not valid",
         "The token or key is expired, not valid yet, for another audience, altered, or of an issuer or key "
         "that this server does not trust. `detail` says which.",
         "Get a new token from the issuer. If a new one is refused too, compare its issuer, audience and "
         "type with the server's configuration."),
    Kind("forbidden", 403, "The credentials do not permit this",
         "The credentials are valid, but lack a permission that this request needs.",
         "Ask the operator for the permission in `permission`, or use a model that is permitted.",
         ("permission", "model")),
    # 404, 405: the address
    Kind("unknown-prediction", 404, "There is no such prediction",
         "No prediction has this id, or it belongs to another subject, or it is no longer kept: finished "
         "ones are kept for a limited time (kept_s), in limited number and size (kept_predictions, "
         "kept_bytes).",
         "Fetch a prediction soon after it is done, with the credentials that created it."),
    Kind("unknown-request", 404, "There was no such request",
         "No recent request of this process had this X-Request-Id; older ones are not kept.",
         "Ask sooner, and ask the server that answered the request.",
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
         "The server has no such path.",
         "Compare the path with the API's description; addresses do not end with a slash."),
    Kind("method-not-allowed", 405, "This address does not take this method",
         "The path exists, but not for this method.",
         "Use a method in the header Allow.",
         ("allowed",)),
    # 409: in conflict with another request
    Kind("profile-running", 409, "A profile is being recorded already",
         "The server records one profile at a time (POST /v1/profile).",
         _TRY_LATER,
         ("retry_after_ms",)),
    Kind("cancelled", 409, "The prediction was cancelled",
         "While this request waited for its prediction, another one cancelled it (DELETE).",
         "Send it again with another Idempotency-Key."),
    # 408, 413, 415, 431: size, type and arrival
    Kind("receive-timeout", 408, "The request did not arrive in time",
         "The request did not arrive whole within the server's limit (receive_timeout_s); the connection "
         "is closed.",
         "Send the request without pauses; check the network."),
    Kind("body-too-large", 413, "The body is too large",
         "The body, compressed or decompressed, has more bytes than the server takes (max_body_bytes).",
         "Send fewer rows per request, or binary tensors, which are shorter than JSON.",
         ("body_bytes", "limit_bytes")),
    Kind("too-many-rows", 413, "The request has more rows than fit the queue",
         "The request could not be queued even in an empty queue (max_queue_rows).",
         "Split it into requests of at most `limit` rows.",
         ("rows", "limit")),
    Kind("too-many-items", 413, "The batch has too many items",
         "POST /batch takes a limited number of items (max_batch_items); this one has more.",
         "Send several calls of at most `limit` items. No item was run.",
         ("limit",)),
    Kind("unsupported-encoding", 415, "The body's encoding is not supported",
         "Content-Encoding names a coding that the server does not know.",
         "Use a coding in `supported`, or none.",
         ("encoding", "supported")),
    Kind("unsupported-media-type", 415, "The body's type is not supported",
         "This address does not take the Content-Type of the body or of a part.",
         "Send a type in `supported`. curl sends JSON with `--json`.",
         ("supported",)),
    Kind("headers-too-large", 431, "The headers are too large",
         "The request line and headers have more bytes than the server reads; the connection is closed.",
         "Send fewer or shorter headers."),
    # 422: valid, but not for this model
    Kind("wrong-shape", 422, "A tensor has the wrong shape",
         "A tensor's shape is not the model's, or its number of rows differs from the other inputs', or a "
         "padded axis is longer than the largest bucket or differs in length from another input's.",
         "Send the shape in `expected`; -1 is any size, at most `limit` if that is given. The first axis is "
         "the rows.",
         ("tensor", "expected", "actual", "limit")),
    Kind("wrong-datatype", 422, "A tensor has the wrong datatype",
         "A tensor's datatype is not the model's.",
         "Convert the data to the datatype in `expected`; the server never converts silently.",
         ("tensor", "expected", "actual")),
    Kind("wrong-data", 422, "A tensor's data does not fit its shape and datatype",
         "The number of elements or bytes does not match the shape, a value is out of the datatype's range "
         "or not finite, or nested rows differ in length.",
         "Send as many values as the shape has elements, each within the datatype's range.",
         ("tensor", "datatype", "shape", "expected", "expected_elements", "actual_elements",
          "expected_bytes", "actual_bytes")),
    Kind("idempotency-mismatch", 422, "The Idempotency-Key belongs to another request",
         "The key was used before with another path, query, Content-Type or body.",
         "Repeat the same request, or use a new key for a new one."),
    # 429, 5xx: not a fault of the request
    Kind("queue-full", 429, "The queue is full",
         "The model's queue holds as many rows as it may (max_queue_rows); nothing was read or run.",
         _TRY_LATER + " Fewer clients, or more servers, make it rarer.",
         ("queued_rows", "limit", "retry_after_ms")),
    Kind("tenant-limit", 429, "The tenant's limit is reached",
         "The tenant that the credentials name has reached its own limit of concurrent requests, queued "
         "rows or requests per second. Other tenants are not affected; nothing was read or run.",
         _TRY_LATER + " `what` names the limit; the operator sets it ([[auth.tenants]]).",
         ("tenant", "what", "used", "limit", "retry_after_ms")),
    Kind("deadline-unreachable", 429, "The request would not be answered in time",
         "Behind the requests before it, the request would exceed its time limit (V2 `timeout`, "
         "`deadline_ms`, or the model's); it was not queued.",
         _TRY_LATER + " Or allow more time.",
         ("timeout_ms", "needed_ms", "retry_after_ms")),
    Kind("too-many-bad-tokens", 429, "Too many tokens with a bad signature came from this address",
         "Checking a signature costs more than a request, so an address whose tokens fail repeatedly is "
         "refused for a while. Tokens that were valid before are still accepted.",
         _TRY_LATER + " Find the client that sends tokens with a wrong signature.",
         ("retry_after_ms",)),
    Kind("too-many-predictions", 429, "Too many predictions are unfinished",
         "Unfinished predictions take up all the room for kept predictions (kept_predictions, kept_bytes); "
         "nothing was run.",
         _TRY_LATER + " Without `Prefer: respond-async` and Idempotency-Key a prediction is not kept.",
         ("limit", "limit_bytes", "retry_after_ms")),
    Kind("internal", 500, "The server failed",
         "A defect of the server; its log describes it.",
         "Report it with its time. Sending the request again may work."),
    Kind("run-failed", 500, "The model failed on this request",
         "The engine reported an error while it ran this request; other requests of the batch are not "
         "affected.",
         "Check the values of the inputs. If they are valid, give the operator the `reference`, which is in "
         "the server's log beside the engine's message.",
         ("model", "reference")),
    Kind("result-too-large", 500, "The answer is too large to be kept",
         "The answer is larger than may be kept (kept_bytes).",
         "Request fewer outputs, top_k or fewer rows; or wait for it without `Prefer: respond-async`.",
         ("body_bytes", "limit_bytes")),
    Kind("starting", 503, "The model is still being loaded",
         "The server runs, but this model is not ready yet.",
         "Wait until GET /v2/models/NAME/ready answers 200, or send the request again after Retry-After.",
         ("model", "retry_after_ms")),
    Kind("keys-unavailable", 503, "The token cannot be checked now",
         "The signing keys of the token's issuer are unavailable: they could not be fetched, or are too old.",
         _TRY_LATER + " The server's log has the reason.",
         ("retry_after_ms",)),
    Kind("load-failed", 503, "The model could not be loaded",
         "The model's file could not be opened; the server's log has the reason. A retry does not help.",
         "The operator has to correct the model or its settings and restart the server.",
         ("model",)),
    Kind("draining", 503, "The server is about to stop",
         "The server answers accepted requests and takes no new ones; the connection is closed.",
         "Send the same request to another server, or after Retry-After on a new connection.",
         ("retry_after_ms",)),
    Kind("abandoned", 503, "The server stopped before the request was done",
         "The request was accepted, but not done when the time for stopping (drain_timeout_s) ended.",
         "Send the same request to another server, or after Retry-After on a new connection.",
         ("retry_after_ms",)),
    Kind("engine-dead", 503, "The model's engine is unusable",
         "The engine has failed permanently; only a new server process helps.",
         "Send the same request to another server; give the operator the `reference` in the log.",
         ("model", "reference")),
    Kind("expired", 504, "The request's time limit ended before it could be run",
         "The request was accepted, but its queue delay left no time to run it within its time limit.",
         "Allow more time, send it when the queue is shorter, or give it a higher priority.",
         ("timeout_ms",)),
    Kind("deadline-too-short", 504, "The time limit is shorter than the run",
         "The model takes longer for these rows than the request's time limit, even with an empty queue; "
         "the request was not queued.",
         "Allow at least `needed_ms`.",
         ("timeout_ms", "needed_ms")),
    Kind("execution-timeout", 504, "The model did not finish in time",
         "The engine did not return within the model's limit (execution_timeout_ms). It is opened again if "
         "possible.",
         "Send it again later. If it happens each time with these inputs, tell the operator.",
         ("model", "limit_ms")),
)  # fmt: skip
