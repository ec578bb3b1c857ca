"""Getting an issuer's keys over the network, in a thread.

Only from where a stranger cannot put other keys (HTTPS, or this machine), from
exactly the configured place (no redirects), in bounded time and size. What goes wrong is an OSError or a
ValueError whose text may be logged.

An issuer's keys: from files, or fetched and kept fresh.

A fetch replaces all keys at once, and only by a set that has a usable one; nothing that a caller sends can
remove a key. A `kid` that is not known starts a fetch at most once per cool-down and all who wait share it,
so that a rotation is noticed with the first new token, and a flood of invented names costs the issuer one
request per cool-down. When the issuer cannot be reached its keys serve on, up to `jwks_stale_s`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import random
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from email.message import Message
from http.client import HTTPException
from typing import NamedTuple
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from cobatch.server.auth.keys import Key, parse_jwks
from cobatch.server.settings.auth import AuthSettings, Issuer, is_safe_url

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


__all__ = ["FetchedKeys", "KeysUnavailableError", "StaticKeys"]

log = logging.getLogger("cobatch.auth")

_SOONEST_S = 30.0  # whatever max-age the issuer sends
_RETRY_S = 1.0
_RETRY_AT_MOST_S = 60.0


class KeysUnavailableError(Exception):
    """There are no keys now: never fetched yet, or too old. A new try will be made in `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the issuer's keys are not to be had now")
        self.retry_after_s = retry_after_s


class _Index:
    """Keys by name and algorithm."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self.keys = tuple(keys)
        self._names = {key.kid for key in keys} - {None}
        self._named = {(key.kid, key.algorithm): key for key in keys if key.kid is not None}

    def knows(self, kid: str) -> bool:
        return kid in self._names

    def get(self, kid: str | None, algorithm: str) -> Key | None:
        """The named key; without a name the algorithm's key, if that is a single one."""
        if kid is not None:
            return self._named.get((kid, algorithm))
        return _single(key for key in self.keys if key.algorithm == algorithm)

    def nameless(self, algorithm: str) -> Key | None:
        """The algorithm's single key without a name."""
        return _single(key for key in self.keys if key.algorithm == algorithm and key.kid is None)


class StaticKeys:
    """Keys that stay as they are. One without a `kid`, as PEM files give, serves any that is not known."""

    ready = True

    def __init__(self, keys: Sequence[Key]) -> None:
        self._index = _Index(keys)

    async def start(self) -> None:
        """Nothing to fetch."""

    async def stop(self) -> None:
        """Nothing runs."""

    def recall(self, kid: str | None, algorithm: str) -> Key | None:
        """The key for a token with this `kid` and `alg`; None where there is none."""
        if kid is None or self._index.knows(kid):
            return self._index.get(kid, algorithm)
        return self._index.nameless(algorithm)

    async def find(self, kid: str | None, algorithm: str) -> Key | None:
        """As `recall`."""
        return self.recall(kid, algorithm)


class FetchedKeys:
    """Keys of an issuer's JWK set. Belongs to one event loop.

    `on_withdrawn` is told of each key that its issuer no longer publishes, or that became too old; a key
    that stays keeps its object. `on_ready` is called when there are keys after there were none. `clock` is
    monotonic, in seconds, and must go with the loop's timers.
    """

    def __init__(
        self,
        issuer: Issuer,
        auth: AuthSettings,
        on_withdrawn: Callable[[Key], None],
        fetch: Fetch = fetch_url,
        clock: Callable[[], float] = time.monotonic,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._issuer = issuer
        self._auth = auth
        self._on_withdrawn = on_withdrawn
        self._on_ready = on_ready
        self._fetch = fetch
        self._clock = clock
        self._index = _Index()
        self._began_s = float("-inf")  # the last fetch, whatever came of it
        self._stale_s = float("inf")  # when the keys become too old
        self._due_s = clock()  # the next fetch
        self._failures = 0
        self._fetching: asyncio.Task[None] | None = None
        self._keeping_fresh: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether there are keys."""
        self._drop_stale()
        return bool(self._index.keys)

    async def start(self) -> None:
        """Fetch now and keep fresh from now on; does not wait for the first keys."""
        if self._keeping_fresh is None:
            self._keeping_fresh = asyncio.create_task(self._keep_fresh(), name="cobatch-jwks")

    async def stop(self) -> None:
        """End what `start` began. The keys stay."""
        tasks = [task for task in (self._keeping_fresh, self._fetching) if task is not None]
        self._keeping_fresh = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def recall(self, kid: str | None, algorithm: str) -> Key | None:
        """The key for a token with this `kid` and `alg` if it is there already."""
        self._drop_stale()
        return self._index.get(kid, algorithm)

    async def find(self, kid: str | None, algorithm: str) -> Key | None:
        """The key for a token with this `kid` and `alg`; None where the issuer has none.

        Waits for a fetch only where there are no keys yet, or the `kid` is new and the cool-down over.
        Raises KeysUnavailableError.
        """
        key = self.recall(kid, algorithm)
        if self._index.keys and (key is not None or kid is None or self._index.knows(kid)):
            return key
        fetching = self._fetching
        if fetching is None and self._clock() - self._began_s >= self._auth.jwks_cooldown_s:
            fetching = self._begin()
        if fetching is not None:
            # Unlike awaiting it, this leaves the fetch to the others when this caller goes.
            await asyncio.wait([fetching])
            key = self.recall(kid, algorithm)
        if not self._index.keys:
            raise KeysUnavailableError(max(1.0, self._due_s - self._clock()))
        return key

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.wait([self._fetching or self._begin()])
            while (wait_s := self._due_s - self._clock()) > 0:
                await asyncio.sleep(min(wait_s, max(0.0, self._stale_s - self._clock())))
                self._drop_stale()

    def _begin(self) -> asyncio.Task[None]:
        """The one fetch that runs."""
        self._began_s = self._clock()
        self._fetching = task = asyncio.create_task(self._refresh(), name="cobatch-jwks-fetch")
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._fetching = None

    async def _refresh(self) -> None:
        # Until it is known to be a success: whatever goes wrong below, there is a pause before the next.
        self._failures += 1
        pause_s = min(_RETRY_AT_MOST_S, _RETRY_S * 2.0 ** min(self._failures - 1, 10))
        try:
            fetched = await fetch_keys(self._issuer, self._fetch)
            keys = _usable(fetched.body, self._issuer.algorithms)
        except (OSError, ValueError) as error:
            log.warning("no keys of issuer %s: %s", self._issuer.name, str(error) or type(error).__name__)
        else:
            if self._failures > 1:
                log.info("the keys of issuer %s can be had again", self._issuer.name)
            self._replace(keys)
            self._failures = 0
            self._stale_s = self._clock() + self._auth.jwks_stale_s
            pause_s = self._pause_s(fetched)
        finally:
            self._due_s = self._clock() + pause_s * (1.0 - 0.1 * random.random())  # noqa: S311 - spreads load

    def _pause_s(self, fetched: Fetched) -> float:
        """Until the next fetch: as configured, sooner if the issuer says so, and before they are stale."""
        pause_s = min(self._auth.jwks_refresh_s, self._auth.jwks_stale_s / 2)
        if fetched.max_age_s is None:
            return pause_s
        return min(pause_s, max(_SOONEST_S, fetched.max_age_s))

    def _replace(self, fresh: Sequence[Key]) -> None:
        before = self._index.keys
        keys = [next((old for old in before if _same(old, key)), key) for key in fresh]
        self._index = _Index(keys)
        for key in before:
            if key not in keys:
                log.info("issuer %s withdrew key %r", self._issuer.name, key)
                self._on_withdrawn(key)
        if keys and not before:
            self._on_ready()

    def _drop_stale(self) -> None:
        if self._clock() < self._stale_s:
            return
        self._stale_s = float("inf")
        log.warning("the keys of issuer %s are too old; its tokens are refused", self._issuer.name)
        self._replace([])


def _usable(text: bytes, algorithms: Sequence[str]) -> list[Key]:
    """At least one key, or ValueError: a set without any must not replace one with some."""
    keys = parse_jwks(text, algorithms)
    if not keys:
        raise ValueError(f"no key of it is for one of {', '.join(algorithms)}")
    return keys


def _single(keys: Iterable[Key]) -> Key | None:
    found = list(keys)
    return found[0] if len(found) == 1 else None


def _same(one: Key, other: Key) -> bool:
    return one.kid == other.kid and one.algorithm == other.algorithm and one.material == other.material
