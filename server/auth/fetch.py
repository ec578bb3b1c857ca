"""Fetching an issuer's JWK set over HTTP, in a thread.

A fetch trusts only sources that outsiders cannot replace (HTTPS, or loopback), follows no redirects, and is
bounded in time and size. Its errors are OSError and ValueError, with texts that are safe to log.
"""

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
from http.client import HTTPException, HTTPResponse
from typing import NamedTuple
from urllib import request
from urllib.error import URLError
from urllib.parse import urlsplit

from cobatch.server.settings.auth import Issuer, is_safe_url

TIMEOUT_S = 10.0
MAX_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16
_MAX_AGE = re.compile(r'(?:^|[,\s])max-age\s*=\s*"?(\d{1,9})(?!\d)', re.IGNORECASE)
_UNCACHED = re.compile(r"(?:^|[,\s])(?:no-store|no-cache)(?:$|[,\s=])", re.IGNORECASE)


class Fetched(NamedTuple):
    """A document and the `max-age` of its response, None if it has none."""

    body: bytes
    max_age_s: float | None = None


Fetch = Callable[[str], Awaitable[Fetched]]


async def fetch_url(url: str) -> Fetched:
    """GET a document: status 200, at most 1 MiB, within 10 s. Raises OSError or ValueError."""
    if not is_safe_url(url):
        raise ValueError("the address is neither https:// nor http:// on loopback")
    outcome: Future[Fetched] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(_get(url))
        except BaseException as error:  # noqa: BLE001 - the waiting task gets any error
            outcome.set_exception(error)

    # A daemon thread does not delay the server's stop, as asyncio.to_thread would.
    threading.Thread(target=run, name="cobatch-jwks", daemon=True).start()
    async with asyncio.timeout(TIMEOUT_S):
        return await asyncio.wrap_future(outcome)


def _get(url: str) -> Fetched:
    deadline_s = time.monotonic() + TIMEOUT_S
    headers = {"Accept": "application/json", "User-Agent": "cobatch"}
    get = request.Request(url, headers=headers)  # noqa: S310 - checked by fetch_url
    try:
        with _opener(url).open(get, timeout=TIMEOUT_S) as response:
            if response.status != 200:
                raise ValueError(f"the response's status is {response.status}, not 200")
            return Fetched(_body(response, deadline_s), _max_age_s(response.headers))
    except URLError as error:
        raise OSError(f"cannot reach it: {error.reason}") from None
    except HTTPException as error:
        raise OSError(f"the response is not HTTP: {type(error).__name__}") from None


def _opener(url: str) -> request.OpenerDirector:
    """Build an opener without redirects, files and FTP, and no proxy for loopback. It returns any status."""
    is_loopback = is_safe_url(f"http:{url.partition(':')[2]}")
    proxies = request.ProxyHandler({} if is_loopback else None)
    scheme = request.HTTPSHandler(context=_tls()) if url.startswith("https:") else request.HTTPHandler()
    opener = request.OpenerDirector()
    opener.add_handler(proxies)
    opener.add_handler(scheme)
    return opener


@functools.cache
def _tls() -> ssl.SSLContext:
    """Trust the system's authorities, or those in SSL_CERT_FILE, as OpenSSL does."""
    return ssl.create_default_context()


def _body(response: HTTPResponse, deadline_s: float) -> bytes:
    parts, size, content_length = [], 0, response.length
    while part := response.read1(_CHUNK_BYTES):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise ValueError(f"the response has more than {MAX_BYTES} bytes")
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the response took longer than {TIMEOUT_S:.0f} s")
    if content_length is not None and size < content_length:
        raise OSError("the response was cut short")
    return b"".join(parts)


def _max_age_s(headers: Message) -> float | None:
    cache_control = ",".join(headers.get_all("cache-control", []))
    if _UNCACHED.search(cache_control):
        return 0.0
    match = _MAX_AGE.search(cache_control)
    return float(match[1]) if match else None


async def fetch_keys(issuer: Issuer, fetch: Fetch) -> Fetched:
    """Fetch the issuer's JWK set, from `jwks_url` or as its metadata says. Raises OSError, ValueError."""
    if issuer.jwks_url:
        return await fetch(issuer.jwks_url)
    parts = urlsplit(issuer.issuer)
    base, path = f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/")
    errors = []
    # OpenID Connect Discovery 4 appends to the path, RFC 8414, 3.1 inserts before it.
    for url in (
        f"{base}{path}/.well-known/openid-configuration",
        f"{base}/.well-known/oauth-authorization-server{path}",
    ):
        try:
            jwks_url = _jwks_uri((await fetch(url)).body, issuer.issuer)
        except (OSError, ValueError) as error:
            errors.append(str(error))
        else:
            return await fetch(jwks_url)
    raise ValueError(f"no metadata of the issuer: {'; '.join(errors)}")


def _jwks_uri(text: bytes, issuer: str) -> str:
    try:
        document = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise ValueError("the metadata is not JSON") from None
    if not isinstance(document, dict) or document.get("issuer") != issuer:
        # RFC 8414, 3.3: otherwise one issuer could impersonate another.
        raise ValueError("the metadata names another issuer than the configured one")
    uri = document.get("jwks_uri")
    if not isinstance(uri, str) or not is_safe_url(uri):
        raise ValueError("the metadata's jwks_uri is neither https:// nor http:// on loopback")
    if issuer.startswith("https://") and not uri.startswith("https://"):
        raise ValueError("the metadata of an https:// issuer leads to http://")
    return uri
