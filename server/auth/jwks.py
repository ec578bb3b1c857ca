"""The keys of an issuer: static ones from files, or a JWK set that is fetched and kept fresh.

A fetched set replaces all keys at once, and only if it has a usable one; nothing that a client sends can
remove a key. An unknown `kid` starts at most one fetch per cool-down, shared by all waiting requests: the
first token after a rotation is noticed, and a flood of invented names costs the issuer one request per
cool-down. While the issuer is unreachable its keys stay valid for up to `jwks_stale_s`.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from operator import attrgetter

from cobatch.server.auth.fetch import Fetch, fetch_keys, fetch_url
from cobatch.server.auth.keys import Key, parse_jwks
from cobatch.server.auth.throttle import Clock
from cobatch.server.settings.auth import AuthSettings, Issuer

log = logging.getLogger("cobatch.auth")

_MIN_REFRESH_S = 30.0  # for any max-age
_RETRY_S = 1.0
_MAX_RETRY_S = 60.0
_parts = attrgetter("kid", "algorithm", "material")  # keys themselves compare by identity


class KeysUnavailableError(Exception):
    """There are no keys: never fetched, or too old. The next fetch is in `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the issuer's signing keys are unavailable")
        self.retry_after_s = retry_after_s


class _KeySet:
    """Keys by name and algorithm."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self.keys = tuple(keys)
        self.kids = {key.kid for key in keys} - {None}
        self.nameless = {key.algorithm: key for key in keys if key.kid is None}
        self._by_name = {(key.kid, key.algorithm): key for key in keys if key.kid is not None}

    def get(self, kid: str | None, algorithm: str) -> Key | None:
        """Return the named key; without a name, the algorithm's only key."""
        if kid is not None:
            return self._by_name.get((kid, algorithm))
        fitting = [key for key in self.keys if key.algorithm == algorithm]
        return fitting[0] if len(fitting) == 1 else None


class _IssuerKeys:
    """The keys of the issuer `name`. `on_withdrawn` is called with each key that is gone."""

    def __init__(self, name: str, on_withdrawn: Callable[[Key], None]) -> None:
        self._name = name
        self._on_withdrawn = on_withdrawn
        self._keys = _KeySet()

    def replace(self, fresh: Sequence[Key]) -> None:
        """Use these keys from now on; a key that stays keeps its object."""
        before = self._keys.keys
        keys = [next((old for old in before if _parts(old) == _parts(key)), key) for key in fresh]
        self._keys = _KeySet(keys)
        for key in before:
            if key not in keys:
                log.info("issuer %s withdrew key %r", self._name, key)
                self._on_withdrawn(key)


class StaticKeys(_IssuerKeys):
    """Keys from files. A key without a `kid`, as in PEM files, serves every unknown `kid`."""

    ready = True

    def __init__(
        self, keys: Sequence[Key], name: str = "", on_withdrawn: Callable[[Key], None] = lambda _: None
    ) -> None:
        super().__init__(name, on_withdrawn)
        self.replace(keys)

    def get(self, kid: str | None, algorithm: str) -> Key | None:
        if kid is None or kid in self._keys.kids:
            return self._keys.get(kid, algorithm)
        return self._keys.nameless.get(algorithm)

    async def find(self, kid: str | None, algorithm: str) -> Key | None:
        return self.get(kid, algorithm)


class FetchedKeys(_IssuerKeys):
    """Keys of an issuer's JWK set. Belongs to one event loop.

    Keys that the issuer no longer publishes are withdrawn, and all if they are too old. `clock` is monotonic,
    in seconds, and in step with the loop's timers.
    """

    def __init__(
        self,
        issuer: Issuer,
        auth: AuthSettings,
        on_withdrawn: Callable[[Key], None],
        fetch: Fetch = fetch_url,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(issuer.name, on_withdrawn)
        self._issuer = issuer
        self._auth = auth
        self._on_ready: Callable[[], None] = lambda: None
        self._fetch = fetch
        self._clock = clock
        self._started_s = float("-inf")  # the start of the last fetch
        self._stale_s = float("inf")  # the time at which the keys become too old
        self._due_s = clock()  # the time of the next fetch
        self._failures = 0
        self._fetching: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """True while there are keys."""
        self._drop_stale()
        return bool(self._keys.keys)

    async def start(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Fetch from now on, in a task. Call `on_ready` when keys arrive after there were none."""
        self._on_ready = on_ready
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh(), name="cobatch-jwks")

    async def stop(self) -> None:
        tasks = [task for task in (self._refreshing, self._fetching) if task is not None]
        self._refreshing = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def get(self, kid: str | None, algorithm: str) -> Key | None:
        """Return the key for a token with this `kid` and `alg` without fetching it."""
        self._drop_stale()
        return self._keys.get(kid, algorithm)

    async def find(self, kid: str | None, algorithm: str) -> Key | None:
        """Return the key like `get`, but fetch first if there are no keys yet or the `kid` is new.

        An unknown `kid` waits for no fetch during the cool-down. Raises KeysUnavailableError.
        """
        key = self.get(kid, algorithm)
        if self._keys.keys and (key is not None or kid is None or kid in self._keys.kids):
            return key
        fetching = self._fetching
        if fetching is None and self._clock() - self._started_s >= self._auth.jwks_cooldown_s:
            fetching = self._start_fetch()
        if fetching is not None:
            # Awaiting the task itself would cancel it for all other requests when this one is cancelled.
            await asyncio.wait([fetching])
            key = self.get(kid, algorithm)
        if not self._keys.keys:
            raise KeysUnavailableError(max(1.0, self._due_s - self._clock()))
        return key

    async def _refresh(self) -> None:
        while True:
            await asyncio.wait([self._fetching or self._start_fetch()])
            while (wait_s := self._due_s - self._clock()) > 0:
                await asyncio.sleep(min(wait_s, max(0.0, self._stale_s - self._clock())))
                self._drop_stale()

    def _start_fetch(self) -> asyncio.Task[None]:
        self._started_s = self._clock()
        self._fetching = task = asyncio.create_task(self._fetch_once(), name="cobatch-jwks-fetch")
        task.add_done_callback(self._fetch_done)
        return task

    def _fetch_done(self, task: asyncio.Task[None]) -> None:
        self._fetching = None

    async def _fetch_once(self) -> None:
        # Counted as a failure until it succeeds, so that any error below is followed by a pause.
        self._failures += 1
        pause_s = min(_MAX_RETRY_S, _RETRY_S * 2.0 ** min(self._failures - 1, 10))
        try:
            fetched = await fetch_keys(self._issuer, self._fetch)
            keys = _usable_keys(fetched.body, self._issuer.algorithms)
        except (OSError, ValueError) as error:
            log.warning("no keys of issuer %s: %s", self._issuer.name, str(error) or type(error).__name__)
        else:
            if self._failures > 1:
                log.info("the keys of issuer %s are available again", self._issuer.name)
            self.replace(keys)
            self._failures = 0
            self._stale_s = self._clock() + self._auth.jwks_stale_s
            pause_s = self._refresh_s(fetched.max_age_s)
        finally:
            self._due_s = self._clock() + pause_s * (1.0 - 0.1 * random.random())  # noqa: S311 - spreads load

    def _refresh_s(self, max_age_s: float | None) -> float:
        """Return the configured interval, shortened by `max-age`, and in time before the keys are stale."""
        refresh_s = min(self._auth.jwks_refresh_s, self._auth.jwks_stale_s / 2)
        return refresh_s if max_age_s is None else min(refresh_s, max(_MIN_REFRESH_S, max_age_s))

    def replace(self, fresh: Sequence[Key]) -> None:
        had_none = not self._keys.keys
        super().replace(fresh)
        if fresh and had_none:
            self._on_ready()

    def _drop_stale(self) -> None:
        if self._clock() < self._stale_s:
            return
        self._stale_s = float("inf")
        log.warning("the keys of issuer %s are too old; its tokens are refused", self._issuer.name)
        self.replace([])


KeySource = StaticKeys | FetchedKeys


def _usable_keys(text: bytes, algorithms: Sequence[str]) -> list[Key]:
    if keys := parse_jwks(text, algorithms):
        return keys
    raise ValueError(f"none of its keys is for {', '.join(algorithms)}")
