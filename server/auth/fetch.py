"""Getting an issuer's keys over the network, in a thread.

Only from where a stranger cannot put other keys (HTTPS, or this machine), from
exactly the configured place (no redirects), in bounded time and size. What goes wrong is an OSError or a
ValueError whose text may be logged.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from email.message import Message
from http.client import HTTPException
from typing import NamedTuple
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from cobatch.server.settings.auth import Issuer, is_safe_url

TIMEOUT_S = 10.0
MAX_BYTES = 1 << 20
_CHUNK = 1 << 16
_MAX_AGE = re.compile(r'(?:^|[,\s])max-age\s*=\s*"?(\d{1,9})(?!\d)', re.IGNORECASE)
_NOT_KEPT = re.compile(r"(?:^|[,\s])(?:no-store|no-cache)(?:$|[,\s=])", re.IGNORECASE)


class Fetched(NamedTuple):
    """A document, and for how many seconds its sender says that it is good (None: it does not say)."""

    body: bytes
    max_age_s: float | None = None


Fetch = Callable[[str], Awaitable[Fetched]]


async def fetch_url(url: str) -> Fetched:
    """GET a document: 200, at most 1 MiB, within 10 s. Raises OSError or ValueError."""
    if not is_safe_url(url):
        raise ValueError("the address is neither https:// nor http:// on loopback")
    async with asyncio.timeout(TIMEOUT_S):
        return await _in_thread(functools.partial(_get, url))


async def fetch_keys(issuer: Issuer, fetch: Fetch) -> Fetched:
    """The issuer's JWK set, from `jwks_url` or from where its metadata says. Raises OSError, ValueError."""
    if issuer.jwks_url:
        return await fetch(issuer.jwks_url)
    openid, oauth = _metadata_urls(issuer.issuer)
    try:
        found = _jwks_uri((await fetch(openid)).body, issuer.issuer)
    except (OSError, ValueError) as first:
        try:
            found = _jwks_uri((await fetch(oauth)).body, issuer.issuer)
        except (OSError, ValueError) as second:
            raise ValueError(f"no metadata of the issuer: {first}; {second}") from None
    return await fetch(found)


def _metadata_urls(issuer: str) -> tuple[str, str]:
    """Where metadata may be: OpenID Connect Discovery 4 appends, RFC 8414, 3.1 inserts."""
    parts = urlsplit(issuer)
    base, path = f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/")
    return (
        f"{base}{path}/.well-known/openid-configuration",
        f"{base}/.well-known/oauth-authorization-server{path}",
    )


def _jwks_uri(text: bytes, issuer: str) -> str:
    try:
        document = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise ValueError("the metadata is not JSON") from None
    if not isinstance(document, dict) or document.get("issuer") != issuer:
        # RFC 8414, 3.3: or one issuer could speak for another.
        raise ValueError("the metadata names another issuer than the configured one")
    found = document.get("jwks_uri")
    if not isinstance(found, str) or not is_safe_url(found):
        raise ValueError("the metadata's jwks_uri is neither https:// nor http:// on loopback")
    if issuer.startswith("https://") and not found.startswith("https://"):
        raise ValueError("the metadata of an https:// issuer leads to http://")
    return found


def _in_thread(work: Callable[[], Fetched]) -> Awaitable[Fetched]:
    """Like asyncio.to_thread, but nobody waits for the thread when the server stops."""
    outcome: Future[Fetched] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the waiter gets it
            outcome.set_exception(error)

    threading.Thread(target=run, name="cobatch-jwks", daemon=True).start()
    return asyncio.wrap_future(outcome)


def _get(url: str) -> Fetched:
    deadline_s = time.monotonic() + TIMEOUT_S
    wanted = request.Request(url, headers={"Accept": "application/json", "User-Agent": "cobatch"})  # noqa: S310 - checked
    try:
        with _opener(url).open(wanted, timeout=TIMEOUT_S) as answer:
            if answer.status != 200:
                raise ValueError(f"the answer's status is {answer.status}, not 200")
            parts, size, announced = [], 0, answer.length
            while part := answer.read1(_CHUNK):
                parts.append(part)
                size += len(part)
                if size > MAX_BYTES:
                    raise ValueError(f"the answer has more than {MAX_BYTES} bytes")
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"the answer took longer than {TIMEOUT_S:.0f} s")
            if announced is not None and size < announced:
                raise OSError("the answer was cut short")
            return Fetched(b"".join(parts), _max_age_s(answer.headers))
    except HTTPError as error:
        error.close()
        raise ValueError(f"the answer's status is {error.code}, not 200") from None
    except URLError as error:
        raise OSError(f"cannot reach it: {error.reason}") from None
    except HTTPException as error:
        raise OSError(f"the answer is not HTTP: {type(error).__name__}") from None


def _opener(url: str) -> request.OpenerDirector:
    """Without redirects, files, FTP; and to this machine without a proxy."""
    is_tls = url.startswith("https:")
    is_loopback = is_safe_url(f"http:{url.partition(':')[2]}")
    opener = request.OpenerDirector()
    opener.add_handler(request.HTTPErrorProcessor())
    opener.add_handler(request.HTTPDefaultErrorHandler())
    opener.add_handler(request.ProxyHandler({} if is_loopback else None))
    opener.add_handler(request.HTTPSHandler(context=_tls()) if is_tls else request.HTTPHandler())
    return opener


@functools.cache
def _tls() -> ssl.SSLContext:
    """The system's authorities; SSL_CERT_FILE names others, as for every program with OpenSSL."""
    return ssl.create_default_context()


def _max_age_s(headers: Message) -> float | None:
    said = ",".join(headers.get_all("cache-control", []))
    if _NOT_KEPT.search(said):
        return 0.0
    found = _MAX_AGE.search(said)
    return float(found[1]) if found else None
