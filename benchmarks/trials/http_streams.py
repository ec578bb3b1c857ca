"""Random HTTP/1.1 streams: requests with a trick or two, pipelined, damaged and split."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MODEL = "same-FP32"
_INFER = f"/v2/models/{MODEL}/infer"
_GOOD = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}]}'
_BODIES = (
    _GOOD,
    _GOOD.replace(b"[1,2]}", b"[3,4.5]}"),
    _GOOD.replace(b"FP32", b"FP64"),
    b"",
    b"{}",
    b"GET /v2 HTTP/1.1\r\nHost: inner\r\n\r\n",
    b"0\r\n\r\nGET /v2 HTTP/1.1\r\nHost: inner\r\n\r\n",
    b"\r\n\r\n" + _GOOD,
)
# No targets whose good answers have times or ids in their bodies.
_TARGETS = (
    "/v2/health/live", "/v2", f"/v2/models/{MODEL}", "/batch", f"/v1/models/{MODEL}/predictions", "*", "//",
    "?", "", "http://trial" + _INFER, "http://[", _INFER + "?a=b", _INFER + "#a", _INFER + "/",
    "/v2/models/nobody/infer", f"/v2/models/{MODEL}/versions/1/infer",
    f"/v2/models/{MODEL}/versions/2/infer", "/v2/../v2", "/%76%32", "/v2/models/s%61me-FP32/infer", "/\x7f",
    "/é", "/problems/bad-http", "/v2/models/" + "x" * 3000,
)  # fmt: skip
_METHODS = (
    "GET",
    "HEAD",
    "PUT",
    "DELETE",
    "OPTIONS",
    "PATCH",
    "TRACE",
    "CONNECT",
    "post",
    "PRI",
    "M-SEARCH",
    "PO ST",
)
_VERSIONS = (
    "HTTP/1.0", "HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "HTTP/1.2", "HTTP/1.10", "http/1.1", "HTTP/1.1 ",
    "RTSP/1.0", "ICE/1.0", "HTTP/1", "HTTP", "",
)  # fmt: skip
_FIELDS = (
    "Connection: close", "Connection: keep-alive", "Connection: close, keep-alive", "Connection: upgrade",
    "Connection: x, close", "Proxy-Connection: close", "Expect: 100-continue", "Expect: 200-ok",
    "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQ",
    "Upgrade: websocket\r\nConnection: Upgrade", "Upgrade: h2c", "Accept-Encoding: gzip",
    "Accept-Encoding: br;q=x", "Content-Encoding: gzip", "Content-Encoding: identity",
    "Content-Type: text/plain", "TE: trailers", "X-Request-Id: mine",
    "Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "Inference-Header-Content-Length: 70", "Inference-Header-Content-Length: 7",
    "Inference-Header-Content-Length: x", "Inference-Header-Content-Length: 0", "Cookie: a=b",
    "Forwarded: for=1.2.3.4", "X-Forwarded-For: 1.2.3.4", "X-HTTP-Method-Override: GET",
    "Authorization: Basic x", "Range: bytes=0-1", "If-None-Match: *", "X:", "X: a\r\n b", "X : a", " X: a",
    "X: a\x00b", "X: a\rb", "X: a\nY: b", "X\t: a", ": a", "X", "X: \xff", "\xff: a", "X: " + "y" * 5000,
    "X: " + "y" * 70_000, "\r\n", "Host: other", "Transfer-Encoding: chunked", "Transfer-Encoding: x",
    "Content-Length: 0", "Content-Length: 70", "Content-Length: 5",
)  # fmt: skip
_LENGTHS = (
    "{n}", "+{n}", "-{n}", "0{n}", "{n}, {n}", "{n},", " {n} ", "\t{n}", "{n}\r\nContent-Length: {n}",
    "0x{n}", "{n}.0", "{n}_0", "", "18446744073709551617", "99999999999", "{more}", "{less}", "{n} 1",
    "\xb2",
)  # fmt: skip
_CODINGS = (
    "chunked", "Chunked", " chunked ", "gzip, chunked", "chunked, identity", "identity", "chunked, chunked",
    "xchunked", "chunked\r\nTransfer-Encoding: chunked", "chunked;a=b", "\x0bchunked", "", ",chunked",
    "chunked,",
)  # fmt: skip
_SIZES = (
    "{x}", "{X}", "000{x}", "{x};a=b", '{x};a="\r\n"', "{x} ", " {x}", "0x{x}", "-{x}", "+{x}", "{x}g",
    "ffffffffffffffffff", "{x}\t;a", "{x};" + "a" * 5000,
)  # fmt: skip
_TRAILERS = ("\r\n", "A: b\r\n\r\n", "Content-Length: 3\r\n\r\n", "A\r\n\r\n", "\n", "A: b\n\n", "")


@dataclass
class Request:
    """The parts of a request that a trick may change."""

    method: str = "POST"
    target: str = _INFER
    version: str = "HTTP/1.1"
    fields: list[str] = field(default_factory=lambda: ["Host: trial"])
    body: bytes = _GOOD
    length: str | None = "{n}"
    chunked: bytes | None = None
    newline: str = "\r\n"

    def encode(self) -> bytes:
        """Return the bytes."""
        lines = [f"{self.method} {self.target} {self.version}".rstrip(" "), *self.fields]
        if self.length is not None:
            n = len(self.body)
            length = self.length.replace("{n}", str(n)).replace("{more}", str(n + 3))
            lines.append("Content-Length: " + length.replace("{less}", str(max(0, n - 3))))
        head = self.newline.join([*lines, "", ""]).encode("latin-1")
        return head + (self.body if self.chunked is None else self.chunked)


def _method(request: Request, rng: random.Random) -> None:
    request.method = rng.choice(_METHODS)
    if request.method in ("GET", "HEAD") and rng.random() < 0.7:
        request.target, request.body, request.length = rng.choice(_TARGETS), b"", None


def _target(request: Request, rng: random.Random) -> None:
    request.target = rng.choice(_TARGETS)


def _version(request: Request, rng: random.Random) -> None:
    request.version = rng.choice(_VERSIONS)


def _field(request: Request, rng: random.Random) -> None:
    request.fields.insert(rng.randrange(len(request.fields) + 1), rng.choice(_FIELDS))


def _host(request: Request, rng: random.Random) -> None:
    request.fields[:1] = rng.choice([[], ["Host:"], ["HOST: a, b"], ["Host: a", "host: b"], ["Host: a b/@"]])


def _length(request: Request, rng: random.Random) -> None:
    request.length = rng.choice([None, *_LENGTHS])


def _body(request: Request, rng: random.Random) -> None:
    request.body = rng.choice(_BODIES)


def _newline(request: Request, rng: random.Random) -> None:
    request.newline = rng.choice(["\n", "\r", "\r\r\n", "\n\r"])


def _chunks(request: Request, rng: random.Random) -> None:
    """Send the body in chunks; most of the time only one thing about them is odd."""
    odd = rng.choice([*[""] * 3, *"csteb"])
    coding = rng.choice(_CODINGS) if odd == "c" else "chunked"
    request.fields.append(f"Transfer-Encoding: {coding}")
    if odd != "b":
        request.length = None
    data, chunked = request.body, b""
    while data:
        size = rng.randint(1, len(data))
        text = rng.choice(_SIZES) if odd == "s" else "{x}"
        text = text.replace("{x}", f"{size:x}").replace("{X}", f"{size:X}")
        end = b"" if odd == "e" and rng.random() < 0.5 else b"\r\n"
        chunked += text.encode() + b"\r\n" + data[:size] + end
        data = data[size:]
    last = rng.choice(_TRAILERS) if odd == "t" else "\r\n"
    request.chunked = chunked + b"0\r\n" + last.encode()


_Trick = Callable[[Request, random.Random], None]
_TRICKS: Sequence[_Trick] = (
    _method,
    _target,
    _version,
    _field,
    _field,
    _host,
    _length,
    _body,
    _newline,
    _chunks,
    _chunks,
)


def stream(rng: random.Random) -> list[bytes]:
    """Return a random stream in the pieces to send."""
    data = b""
    for _ in range(rng.choice([1, 1, 2, 2, 3, 5])):
        request = Request()
        for _ in range(rng.choice([0, 0, 1, 1, 1, 2])):
            rng.choice(_TRICKS)(request, rng)
        data += rng.choice([b""] * 9 + [b"\r\n"]) + request.encode()
    if rng.random() < 0.2:
        data = _damaged(bytearray(data), rng)
    if rng.random() < 0.05:
        data = data[: rng.randrange(1, len(data) + 1)]
    return _split(data, rng)


def _damaged(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.choice(b"\r\n :;,\0\t0aA\xff")
            case 1:
                del data[at : at + rng.choice([1, 1, 2, 8])]
            case 2:
                data[at:at] = rng.choice([b"\r\n", b"\r\n\r\n", b" ", b"\0", data[at : at + 16]])
            case _:
                data[at] ^= 1 << rng.randrange(8)
        data = data or bytearray(b"\r")
    return bytes(data)


def _split(data: bytes, rng: random.Random) -> list[bytes]:
    kind = rng.random()
    if kind < 0.4 or len(data) < 2:
        return [data]
    if kind < 0.45 and len(data) < 1000:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted({0, len(data), *[rng.randrange(1, len(data)) for _ in range(rng.choice([1, 2, 5]))]})
    return [data[a:b] for a, b in pairwise(cuts)]
