"""Server-sent events (WHATWG HTML, 9.2): an event for each item of a stream, and one for its end.

Items are events without a name, as clients of OpenAI's API expect them. The last event is `completed`, or
`error` with a problem document: the status was sent before.
"""

CONTENT_TYPE = b"text/event-stream"
# Proxies must neither keep nor collect the events.
HEADERS = ((b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"))
# After a silence of this length a comment is sent, which clients ignore: proxies close silent connections,
# nginx after 60 s. The standard recommends a comment "every 15 seconds or so" (9.2.7).
SILENCE_S = 15.0
COMMENT = b":\n\n"


def event(data: bytes, name: bytes = b"") -> bytes:
    """Return an event. Each line of the data has a field of its own; the client joins them with newlines."""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    head = b"event: %b\n" % name if name else b""
    return head + b"".join([b"data: %b\n" % line for line in lines]) + b"\n"


def completed() -> bytes:
    """Return the last event of a stream that has all of its items."""
    return event(b"{}", b"completed")


def failed(problem: bytes) -> bytes:
    """Return the last event of a stream that ended early. `problem`: as JSON (RFC 9457)."""
    return event(problem, b"error")
