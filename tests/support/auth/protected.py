"""A real server (tests/support/http/serving.py) with authentication, and clocks that the test moves.

It trusts the issuer of tests/support/auth/tokens.py, whose key is in a file, and has API keys. Wall clock and
monotonic clock run `ahead_s` ahead of the real ones: a test adds to it to make a token expire, say.
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
from cobatch.server.dashboard.feed import Feed
from cobatch.server.settings.auth import AuthSettings, Issuer
from cobatch.server.settings.schema import ModelSettings
from tests.support.auth import tokens
from tests.support.auth.tokens import AUDIENCE, ISSUER, signer
from tests.support.fronts.linked import way
from tests.support.http.serving import GATE, Answer, Client, GatedEngine, Served, post, rows_of, serve

METADATA = f"{AUDIENCE}/.well-known/oauth-protected-resource"
SIGNER = signer("ES256")
JSON = {"Content-Type": "application/json"}


class Clock:
    """The server's wall clock and monotonic clock."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self._start_s = time.monotonic()

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def wall(self) -> float:
        """Return seconds since the epoch; starts at the time when tokens.py issues its tokens."""
        return tokens.NOW_S + self.monotonic() - self._start_s

    @property
    def module(self) -> Any:
        """A replacement of the module `time` where that is read directly."""
        return SimpleNamespace(time=self.wall, monotonic=self.monotonic)


class Protected:
    """A running server with its first engine, its clock and its API keys by tenant."""

    def __init__(self, served: Served, engine: GatedEngine, clock: Clock, keys: Mapping[str, str]) -> None:
        self.served = served
        self.engine = engine
        self.clock = clock
        self.keys = keys

    @property
    def auth(self) -> Authenticator:
        assert self.served.inference.auth is not None
        return self.served.inference.auth

    @property
    def auths(self) -> list[Authenticator]:
        """The authenticators of all processes that clients connect to, in the order of connections."""
        return [one.auth for one in self.served.server.inferences() if one.auth is not None]

    def ask(self, data: bytes) -> Answer:
        return self.served.ask(data)

    def infer(self, token: str, *rows: int, model: str = "gate", **headers: str) -> Answer:
        """Send one infer request on a new connection."""
        return self.ask(infer(token, *rows, model=model, **headers))

    def account(self, tenant: str) -> tuple[int, int]:
        """Return open requests and queued rows of a tenant, over all its accounts."""
        accounts = dict(self.auth.tenants._all)
        found = [one for (name, _), one in accounts.items() if name == tenant]
        return sum(one.open_requests for one in found), sum(one.queued_rows for one in found)

    def occupy(self, stack: contextlib.ExitStack) -> list[Client]:
        """Block the engine with as many batches as it has slots, so that all further requests are queued."""
        self.engine.hold()
        batcher = self.served.batcher()
        clients: list[Client] = []
        while len(clients) < self.engine.slots:
            clients.append(self.send(stack, infer(token("occupant"), 1, 1, 1, 1)))
            while self.served.call(lambda: batcher.running_batches) < len(clients):
                pass
        return clients

    def send(self, stack: contextlib.ExitStack, data: bytes) -> Client:
        """Send a request and wait until it is accepted, not for its answer."""
        counters = self.served.batcher().counters
        accepted = counters.accepted
        client = stack.enter_context(self.served.connect())
        client.send(data)
        self.served.until(lambda: counters.accepted > accepted)
        return client


def settings_in(folder: Path, keys: Mapping[str, tuple[str, ...]] | None = None, **fields: Any) -> Any:
    """Return `[auth]` for ISSUER, and an API key for each tenant in `keys` with its scopes."""
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
    path: bool | str,
    folder: Path,
    *,
    keys: Mapping[str, tuple[str, ...]] | None = None,
    server: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Iterator[Protected]:
    """Serve the models `gate` and `other`, each with a gated engine; the test controls the first.

    `path`: one of `linked.WAYS`, or whether to use the fast path.
    """
    auth, minted = settings_in(folder, keys, **fields)
    engines = {name: GatedEngine() for name in ("gate", "other")}
    models = tuple(ModelSettings(path=name, max_batch_size=4, max_queue_rows=100) for name in engines)
    ways = way(path) if isinstance(path, str) else {"fast": path}
    clock = Clock()
    make = functools.partial(Authenticator, wall_clock=clock.wall, clock=clock.monotonic)
    batcher = functools.partial(Batcher, clock=clock.monotonic)
    feed = functools.partial(Feed, wall_clock=clock.wall)
    with (
        mock.patch("cobatch.server.inference.service.Authenticator", make),
        mock.patch("cobatch.server.inference.model.Batcher", batcher),
        mock.patch("cobatch.server.app.Feed", feed),
        mock.patch("cobatch.server.edge.fast_path.time", clock.module),
        mock.patch("cobatch.server.inference.service.time", clock.module),
        mock.patch("cobatch.server.auth.gate.time", clock.module),
        mock.patch("cobatch.server.links.remote.time", clock.module),
        mock.patch("cobatch.server.batch.routes.time", clock.module),
        serve(models=models, engines=engines, auth=auth, **ways, **(server or {})) as served,
    ):
        yield Protected(served, engines["gate"], clock, minted)


def token(tenant: str = "alice", scope: str = "infer", **claims: Any) -> str:
    """Return a valid token; another `jti` makes another token."""
    return SIGNER.token({"sub": tenant, "scope": scope} | claims)


def bearer(credential: str) -> dict[str, str]:
    """Return the Authorization header."""
    return {"Authorization": f"Bearer {credential}"}


def infer(credential: str, *rows: int, model: str = "gate", **headers: str) -> bytes:
    """Build an infer request."""
    target = GATE.replace("gate", model)
    return post(target, rows_of(*rows or (1,)), bearer(credential) | headers)


def predict(credential: str, *rows: int, **headers: str) -> bytes:
    """Build a prediction request."""
    message = {"inputs": {"x": [[row] for row in rows or (3,)]}}
    return post("/v1/models/gate/predictions", message, JSON | bearer(credential) | headers)


def batch(credential: str | None, *items: dict[str, Any]) -> bytes:
    """Build a POST /batch with these items."""
    return post("/batch", {"requests": items}, bearer(credential) if credential else {})


def item(url: str = GATE, method: str = "POST", **more: Any) -> dict[str, Any]:
    """Build an item of a batch; a POST has one row for `gate`."""
    fields = {"id": url, "url": url, "method": method}
    return {**fields, **({"body": rows_of(1)} if method == "POST" else {}), **more}


def get_as(credential: str, target: str, method: str = "GET") -> bytes:
    """Build a request without a body."""
    return f"{method} {target} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {credential}\r\n\r\n".encode()


def challenge(answer: Answer) -> tuple[str, dict[str, str]]:
    """Return scheme and parameters of the answer's challenge."""
    scheme, _, rest = answer.headers["www-authenticate"].partition(" ")
    found = re.findall(r'(\w+)="([^"\\]*)"', rest)
    assert ", ".join(f'{name}="{value}"' for name, value in found) == rest
    assert len(dict(found)) == len(found)
    return scheme, dict(found)
