"""What the members of a problem's body mean, for the pages and docs/problems.md."""

from __future__ import annotations

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
