"""Path and method tricks against a server with [auth]: none reaches a model without its permission.

`python -m benchmarks.trials.paths [--count 20000] [--seed 1]`: requests to protected routes whose paths are
written in other ways (dot segments, slashes, encodings, case, parameters, absolute form ...), with other
methods and headers, without a credential and with the key of another model, to the fast path and to ASGI.
A finding is an answer of the secret model or about it, a 2xx without a credential outside the open routes,
a 5xx, or no answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
from contextlib import ExitStack
from urllib.parse import unquote

from benchmarks.trials.client import Answer, LostError, ask, get
from benchmarks.trials.models import cases
from benchmarks.trials.trial import Report, command, served

COUNT = 20_000
_AT_ONCE = 32
_TENANTS = {"other": ["infer:open"], "boss": ["admin", "infer"]}
# Only the secret model has an output of this name.
_MARK = b"pooled"
_FIELDS_HERE = b"<FIELDS>"
_MESSAGE = {"inputs": [{"name": "ids", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}]}
_SECRET = "/v2/models/secret"
_BASES = (
    *[f"{_SECRET}/infer"] * 6, f"{_SECRET}/versions/1/infer", _SECRET, f"{_SECRET}/versions/1",
    f"{_SECRET}/config", f"{_SECRET}/stats", "/v1/models/secret/predictions", "/v2/models/stats",
    "/metrics", "/v2/repository/index", "/openapi.json", "/docs", "/v1/requests/1", "/v1/profile",
    "/dashboard/events", "/batch", "/v2", "/v1/predictions/1",
)  # fmt: skip
_PREFIXES = (
    "/v2/models/open/..", "/v2/models/open/../secret/..", "/v2/health/live/../../..", "/problems/..",
    "/dashboard/static/..", "/.", "//", "/v2/models/open/infer/../../../..", "/%2e%2e", "http://trial",
    "https://trial", "http://user@trial", "//trial", "http://trial:80", "/;", "\\", "/x/..;", "/..;",
    "/%2f", "HTTP://TRIAL", "http://",
)  # fmt: skip
_SUFFIXES = (
    "/", "//", "/.", "/..", "/../infer", "%20", "%00", "%0a", "%0d%0a", ";", ";a=b", "?", "?a=b", "#", "#a",
    ".json", "%2f", "%3f", "%23", "?/v2/health/live", "/../../open/infer", "%2e", "&", "\\", "..", "%09",
    "?x-api-key=x", "/infer", "?access_token=x",
)  # fmt: skip
_SLASHES = (
    "//", "/./", "/x/../", "%2f", "%2F", "\\", "%5c", "/%2e/", "/x/%2e%2e/", "/;/", "%252f", "%c0%af",
    "/%20/",
)  # fmt: skip
_ODD = ("\x7f", "\xe9", "\xc0\xaf", "%ff", "%", "%zz", "*", "\uff0f")
_METHODS = (
    "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "Post", "get", "POST", "PROPFIND", "MERGE",
)  # fmt: skip
_FIELDS = (
    "X-Original-URL: /v2/models/secret/infer", "X-Rewrite-URL: /v2/models/secret/infer",
    "X-HTTP-Method-Override: POST", "X-Forwarded-Prefix: /v2/health", "X-Forwarded-For: 127.0.0.1",
    "X-Forwarded-User: boss", "X-Tenant: boss", "Forwarded: for=127.0.0.1;proto=https",
    "Authorization: Basic Ym9zczpib3Nz", "Authorization: Bearer", "X-API-Key:",
    "Authorization: Bearer none", "X-API-Key: cb_x_y", "Cookie: token=boss",
    "Upgrade: h2c\r\nConnection: Upgrade", "Expect: 100-continue", "Connection: X-API-Key",
    "Inference-Header-Content-Length: 0",
)  # fmt: skip
# Without a credential, by docs/security.md.
_OPEN = re.compile(
    r"/|/v2/health/(live|ready)|/v2/models/[^/]+(/versions/[^/]+)?/ready|/problems(/[^/]+)?|/dashboard(/static/[^/]+)?"
    r"|/\.well-known/oauth-protected-resource"
)
_ORIGIN = re.compile(r"(?i)^https?://[^/]*")


def disguised(path: str, rng: random.Random) -> str:
    """Return the path written in another way, which may mean the same, another path or nothing."""
    match rng.randrange(8):
        case 0:
            return rng.choice(_PREFIXES) + path
        case 1:
            return path + rng.choice(_SUFFIXES)
        case 2:
            cut = rng.choice([at for at, one in enumerate(path) if one == "/"] or [0])
            return path[:cut] + rng.choice(_SLASHES) + path[cut + 1 :]
        case 3 | 4:
            at = rng.randrange(len(path))
            code = f"{ord(path[at]):02x}"
            coded = rng.choice([f"%{code}", f"%{code.upper()}", f"%25{code}", f"%u00{code}", f"%c1%{code}"])
            return path[:at] + coded + path[at + 1 :]
        case 5:
            return "".join(one.upper() if rng.random() < 0.3 else one for one in path)
        case 6:
            return "".join(f"%{ord(one):02x}" if one != "/" and rng.random() < 0.5 else one for one in path)
        case _:
            at = rng.randrange(1, len(path) + 1)
            return (
                path[:at]
                + rng.choice(["\x7f", "\xe9", "\xc0\xaf", "%ff", "%", "%zz", "*", "\uff0f"])
                + path[at:]
            )


def trick(rng: random.Random) -> tuple[str, bytes, list[str]]:
    """Return a target, and a request to it without its credential."""
    base = target = rng.choice(_BASES)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        target = disguised(target, rng)
    reads = base.endswith(("secret", "config", "stats", "/1", ".json", "docs", "metrics", "events", "/v2"))
    method = "GET" if reads else "POST"
    if rng.random() < 0.3:
        method = rng.choice(_METHODS)
    message: object = _MESSAGE
    if base == "/batch":
        urls = [disguised(f"{_SECRET}/infer", rng) for _ in range(5)] + [f"{_SECRET}/infer"]
        message = {
            "requests": [
                {"id": str(n), "method": "POST", "url": url, "body": _MESSAGE} for n, url in enumerate(urls)
            ]
        }
    elif base.startswith("/v1/models"):
        message = {"inputs": {"ids": [[1, 2]]}}
    body = json.dumps(message).encode()
    fields = [f"Content-Length: {len(body)}", "Content-Type: application/json"]
    if rng.random() < 0.3:
        fields.append(rng.choice(_FIELDS))
    head = f"{method} {target} HTTP/1.1\r\nHost: trial\r\n".encode()
    return target, head + _FIELDS_HERE + body, fields


def judge(report: Report, target: str, sent: bytes, key: str, answer: Answer) -> None:
    """Look for forbidden answers."""
    report.counts[f"{key}: {answer.status}"] += 1
    if _MARK in answer.body:
        report.find("an answer of the secret model", f"{key}, {sent!r}: {answer}")
    if answer.status >= 500:
        report.find("a 5xx", f"{key}, {sent!r}: {answer}")
    path = unquote(
        re.sub(r"^https?://[^/]*", "", target, flags=re.IGNORECASE).partition("?")[0].partition("#")[0]
    )
    if key == "no key" and answer.status not in (400, 401) and not _OPEN.fullmatch(path or "/"):
        report.find("a request without a credential is not refused as such", f"{sent!r}: {answer}")


def trial(count: int, seed: int) -> Report:
    """Run the trial with `count` requests to each of the servers."""
    report, rng = Report(), random.Random(seed)
    found = {case.name: case for case in cases()}
    models = {
        "open": (found["same-FP32"].content, ""),
        "secret": (found["padded"].content, found["padded"].settings),
    }
    with ExitStack() as stack:
        for on in ("true", "false"):
            setting = f"fast_path = {on}"
            server, keys = stack.enter_context(
                served(f"paths-{on}", models, server=setting, tenants=_TENANTS)
            )
            asyncio.run(_try(report, rng, count, server.address, keys))
            report.check_log(server)
    return report


async def _try(report: Report, rng: random.Random, count: int, address: str, keys: dict[str, str]) -> None:
    left = count

    async def sender() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            target, form, fields = trick(rng)
            key = rng.choice(["no key", "other", "other"])
            if key == "other":
                fields.append(f"X-API-Key: {keys['other']}")
            sent = form.replace(_FIELDS_HERE, "\r\n".join([*fields, "", ""]).encode())
            try:
                judge(report, target, sent, key, await ask(address, sent))
            except LostError as error:
                report.find("no answer", f"{error}: {sent!r}")

    await asyncio.gather(*[sender() for _ in range(_AT_ONCE)])
    boss = f"X-API-Key: {keys['boss']}"
    stats = await ask(address, get(f"{_SECRET}/stats", boss))
    ran = json.loads(stats.body)["model_stats"][0]["inference_count"]
    if ran:
        report.find("the secret model ran", f"{ran} times")
    body = json.dumps(_MESSAGE).encode()
    head = f"POST {_SECRET}/infer HTTP/1.1\r\nHost: trial\r\nContent-Length: {len(body)}\r\n{boss}\r\n\r\n"
    allowed = await ask(address, head.encode() + body)
    report.counts[f"with its key: {allowed.status}"] += 1
    if _MARK not in allowed.body:
        report.find("the secret model does not answer its own caller", allowed)


if __name__ == "__main__":
    sys.exit(command("paths", __doc__, COUNT, trial, "requests to each server", sys.argv[1:]))
