"""A real server (tests/support/http/serving.py) that asks who calls, with clocks that the test moves.

Its issuer is tests/support/auth/tokens.py's, whose key lies in a file, and it has API keys. Wall clock and
monotonic clock go on as always but are put off by `ahead_s`: a test that wants a token to expire, or a bucket
to fill, jumps there.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from cobatch.batcher.batcher import Batcher
from cobatch.server.auth import api_keys
from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.dashboard.feed import Live
from cobatch.server.settings.auth import AuthSettings, Issuer
from cobatch.server.settings.schema import ModelSettings
from tests.support.auth import tokens
from tests.support.auth.tokens import AUDIENCE, ISSUER, signer
from tests.support.http.serving import GATE, Answer, Client, GatedEngine, Served, post, rows_of, serve

METADATA = f"{AUDIENCE}/.well-known/oauth-protected-resource"
SIGNER = signer("ES256")
JSON = {"Content-Type": "application/json"}


class Clock:
    """Both clocks of the server."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self._start_s = time.monotonic()

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def wall(self) -> float:
        """Begins when the tokens of tests/support/auth/tokens.py are new."""
        return tokens.NOW_S + self.monotonic() - self._start_s

    @property
    def module(self) -> Any:
        """In place of the module `time`, where that is read directly."""
        return SimpleNamespace(time=self.wall, monotonic=self.monotonic)


class Protected:
    """What a test has of the server."""

    def __init__(self, served: Served, engine: GatedEngine, clock: Clock, keys: Mapping[str, str]) -> None:
        self.served = served
        self.engine = engine
        self.clock = clock
        self.keys = keys

    @property
    def auth(self) -> Authenticator:
        assert self.served.core.auth is not None
        return self.served.core.auth

    def ask(self, data: bytes) -> Answer:
        return self.served.ask(data)

    def infer(self, token: str, *rows: int, model: str = "gate", **headers: str) -> Answer:
        """One infer request on a connection of its own."""
        return self.ask(infer(token, *rows, model=model, **headers))

    def account(self, tenant: str) -> tuple[int, int]:
        """Open requests and queued rows of a tenant, over all its accounts."""
        accounts = dict(self.auth.tenants._all)
        found = [one for (name, _), one in accounts.items() if name == tenant]
        return sum(one.open_requests for one in found), sum(one.queued_rows for one in found)

    def occupy(self, stack: contextlib.ExitStack) -> list[Client]:
        """Hold the engine and give it all the batches that it takes; whatever comes now is queued."""
        self.engine.hold()
        batcher = self.served.batcher()
        clients: list[Client] = []
        while len(clients) < self.engine.slots:
            clients.append(self.send(stack, infer(token("occupant"), 1, 1, 1, 1)))
            while self.served.call(lambda: batcher.running_batches) < len(clients):
                pass
        return clients

    def send(self, stack: contextlib.ExitStack, data: bytes) -> Client:
        """Send a request that will be accepted, wait until it is, and do not wait for its answer."""
        counters = self.served.batcher().counters
        accepted = counters.accepted
        client = stack.enter_context(self.served.connect())
        client.send(data)
        self.served.until(lambda: counters.accepted > accepted)
        return client


def settings_in(folder: Path, keys: Mapping[str, tuple[str, ...]] | None = None, **fields: Any) -> Any:
    """`[auth]` for ISSUER, and the API keys of tenants by name with the scopes that are given for them."""
    jwks = folder / "jwks.json"
    jwks.write_bytes(tokens.jwks(SIGNER))
    issuer = Issuer(issuer=ISSUER, name="test", key_files=(str(jwks),))
    minted = {tenant: api_keys.mint(tenant, scopes) for tenant, scopes in (keys or {}).items()}
    if minted:
        path = folder / "api-keys.toml"
        path.write_text("".join(table for _, table in minted.values()))
        fields["api_keys_file"] = str(path)
    auth = AuthSettings(**{"issuers": (issuer,), "audience": (AUDIENCE,), **fields})
    return auth, {tenant: key for tenant, (key, _) in minted.items()}


@contextlib.contextmanager
def protected(
    fast: bool,
    folder: Path,
    *,
    keys: Mapping[str, tuple[str, ...]] | None = None,
    server: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Iterator[Protected]:
    """Serve `gate` and `other`, both held by one engine's gate each; the test has the first one's."""
    auth, minted = settings_in(folder, keys, **fields)
    engines = {name: GatedEngine() for name in ("gate", "other")}
    models = tuple(ModelSettings(path=name, max_batch_size=4, max_queue_rows=100) for name in engines)
    clock = Clock()
    make = functools.partial(Authenticator, wall_clock=clock.wall, clock=clock.monotonic)
    batcher = functools.partial(Batcher, clock=clock.monotonic)
    live = functools.partial(Live, wall_clock=clock.wall)
    with (
        mock.patch("cobatch.server.inference.service.Authenticator", make),
        mock.patch("cobatch.server.inference.model.Batcher", batcher),
        mock.patch("cobatch.server.app.Live", live),
        mock.patch("cobatch.server.edge.fast_path.time", clock.module),
        mock.patch("cobatch.server.edge.fast_cycle.time", clock.module),
        mock.patch("cobatch.server.auth.gate.time", clock.module),
        mock.patch("cobatch.server.batch.routes.time", clock.module),
        serve(fast, models, engines=engines, auth=auth, **(server or {})) as served,
    ):
        yield Protected(served, engines["gate"], clock, minted)


def token(tenant: str = "alice", scope: str = "infer", **claims: Any) -> str:
    """A good token, a new one each time if its `jti` is."""
    return SIGNER.token({"sub": tenant, "scope": scope} | claims)


def bearer(credential: str) -> dict[str, str]:
    """The header that carries it."""
    return {"Authorization": f"Bearer {credential}"}


def infer(credential: str, *rows: int, model: str = "gate", **headers: str) -> bytes:
    """A request for a model."""
    target = GATE.replace("gate", model)
    return post(target, rows_of(*rows or (1,)), bearer(credential) | headers)


def predict(credential: str, *rows: int, **headers: str) -> bytes:
    """The same by the native resource."""
    message = {"inputs": {"x": [[row] for row in rows or (3,)]}}
    return post("/v1/models/gate/predictions", message, JSON | bearer(credential) | headers)


def batch(credential: str | None, *items: dict[str, Any]) -> bytes:
    """Several in one call."""
    return post("/batch", {"requests": items}, bearer(credential) if credential else {})


def item(url: str = GATE, method: str = "POST", **more: Any) -> dict[str, Any]:
    """One of them, with a row for `gate` where it has a body."""
    made = {"id": url, "url": url, "method": method}
    return {**made, **({"body": rows_of(1)} if method == "POST" else {}), **more}


def get_as(credential: str, target: str, method: str = "GET") -> bytes:
    """A request without a body."""
    return f"{method} {target} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {credential}\r\n\r\n".encode()


def challenge(answer: Answer) -> tuple[str, dict[str, str]]:
    """Scheme and parameters of the answer's challenge."""
    scheme, _, rest = answer.headers["www-authenticate"].partition(" ")
    found = re.findall(r'(\w+)="([^"\\]*)"', rest)
    assert ", ".join(f'{name}="{value}"' for name, value in found) == rest
    assert len(dict(found)) == len(found)
    return scheme, dict(found)
