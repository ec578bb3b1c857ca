"""A real issuer of access tokens: oidc-provider, certified by the OpenID Foundation, as a child process.

    with issuer.started(issuer.Client("alice", scope="infer metadata")) as issuing:
        auth = issuing.auth(jwks_cooldown_s=5)
        token = issuing.token("alice")

Its program is tests/support/auth/issuer_app/issuer.mjs; this module controls it. The first use installs it
(`npm ci`, a second or two). Where node or npm is missing, or npm cannot download, the test is skipped with
the reason; under CI it fails. All calls are synchronous, nothing sleeps, and only a bug reaches a deadline.
The process ends with its `with` block, or when its stdin closes because this process died.
"""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import secrets
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cobatch.server.settings.auth import Algorithm, AuthSettings
from cobatch.server.settings.auth import Issuer as IssuerSettings
from tests.support.auth import node

APP = Path(__file__).with_name("issuer_app")
RESOURCE = "https://cobatch.test/"
# Only bounds a test that would otherwise hang.
DEADLINE_S = 60.0


class Client(NamedTuple):
    """An OAuth client. `scope` lists all scopes it may request; `claims` are added to its tokens."""

    id: str
    scope: str = "infer metadata"
    claims: Mapping[str, object] = {}


class RequestCounts(NamedTuple):
    """Requests so far, answered or not. `cut`: connections cut while it was down("closed")."""

    jwks: int
    metadata: int
    cut: int


class Refused(Exception):
    """The issuer refused a token. The text is its OAuth error code."""


class Issuer:
    """A running issuer. Its methods raise OSError, and Refused for a refused token."""

    def __init__(
        self, process: subprocess.Popen[str], lines: queue.SimpleQueue[str], passwords: Mapping[str, str]
    ) -> None:
        self._process = process
        self._lines = lines
        self._passwords = passwords
        self.issuer: str = self._answer()["issuer"]

    def _answer(self) -> dict[str, Any]:
        line = self._lines.get(timeout=DEADLINE_S)
        assert line, "the issuer ended, see its stderr"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer
        return answer

    def _do(self, command: str, **more: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command, **more}) + "\n")
        self._process.stdin.flush()
        return self._answer()["ok"]

    # Settings of the server under test

    def settings(self, **more: Any) -> IssuerSettings:
        """Return its `[[auth.issuers]]`. Its metadata leads to the keys unless `jwks_url` is given."""
        return IssuerSettings(issuer=self.issuer, **{"name": "real", **more})

    def auth(self, **more: Any) -> AuthSettings:
        """Return `[auth]` with only this issuer."""
        return AuthSettings(**{"issuers": (self.settings(),), "audience": (RESOURCE,), **more})

    @property
    def jwks_url(self) -> str:
        """The URL of its keys."""
        return f"{self.issuer}/jwks"

    # Requests of its clients

    def token(self, client: str, scope: str | None = None, resource: str | None = RESOURCE) -> str:
        """Request an access token by client credentials (RFC 6749, 4.4). Without a resource it is opaque."""
        fields = {"grant_type": "client_credentials", "scope": scope, "resource": resource}
        form = urllib.parse.urlencode({name: value for name, value in fields.items() if value is not None})
        basic = base64.b64encode(f"{client}:{self._passwords[client]}".encode()).decode()
        request = urllib.request.Request(
            f"{self.issuer}/token", form.encode(), {"Authorization": f"Basic {basic}"}
        )
        try:
            answer = get(request)
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in {400, 401}:
                    raise
                raise Refused(json.load(error)["error"]) from None
        assert answer["token_type"] == "Bearer"
        token: str = answer["access_token"]
        return token

    def jwks(self) -> list[dict[str, Any]]:
        """Fetch its public keys; this counts as a request."""
        keys: list[dict[str, Any]] = get(self.jwks_url)["keys"]
        return keys

    # Control

    def reset(self) -> None:
        """Restore its first state at the same URL, with a new key and counts of 0."""
        self._do("reset")

    def rotate(self, alg: Algorithm | None = None) -> str:
        """Sign with a new key, by default of the first one's type; old keys stay published."""
        kid: str = self._do("rotate", alg=alg)
        return kid

    def drop(self) -> None:
        """Publish only the signing key."""
        self._do("drop")

    @property
    def kid(self) -> str:
        """The signing key's kid."""
        kid: str = self._do("kid")
        return kid

    def down(self, how: Literal["closed", "unavailable"] = "closed") -> None:
        """Cut every connection at once, or answer 503 to everything."""
        self._do("mode", mode=how)

    def hold(self) -> None:
        """Delay responses with keys until `up` or `down`; other requests are answered."""
        self._do("mode", mode="held")

    def up(self) -> None:
        """Serve again."""
        self._do("mode", mode="up")

    @property
    def counts(self) -> RequestCounts:
        """The requests so far."""
        return RequestCounts(**self._do("counts"))

    @property
    def jwks_requests(self) -> int:
        """Requests for its keys, answered or not."""
        return self.counts.jwks

    def wait_for_jwks_requests(self, count: int) -> None:
        """Wait until it has received this number of requests for its keys."""
        assert self._do("wait_for_jwks_requests", count=count) >= count


@contextlib.contextmanager
def started(
    *clients: Client,
    alg: Algorithm = "RS256",
    ttl_s: int = 3600,
    path: str = "",
    discovery: Literal["openid", "oauth"] = "openid",
) -> Iterator[Issuer]:
    """Run an issuer on a free port, with `path` ("/realms/x") as part of its URL.

    A start takes 0.3 s, `reset` less; an RSA key adds 0.1 s or more. With `discovery` "oauth" its metadata is
    at RFC 8414's location instead of OpenID Connect Discovery's.
    """
    program = [node.installed(APP), "issuer.mjs"]
    passwords = {client.id: secrets.token_urlsafe() for client in clients}
    known = [client._asdict() | {"secret": passwords[client.id]} for client in clients]
    config = {"clients": known, "alg": alg, "ttl_s": ttl_s, "path": path, "discovery": discovery}
    with _running([*program, json.dumps(config)]) as (process, lines):
        yield Issuer(process, lines, passwords)


@contextlib.contextmanager
def _running(program: list[str]) -> Iterator[tuple[subprocess.Popen[str], queue.SimpleQueue[str]]]:
    """Start the process; yield it and its lines on stdout, "" at its end. pytest captures stderr."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True, cwd=APP, env=node.environ())
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as stdout:
            for line in stdout:
                lines.put(line)
        lines.put("")

    reader = threading.Thread(target=read, name="issuer-stdout", daemon=True)
    reader.start()
    assert process.stdin is not None
    try:
        yield process, lines
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(DEADLINE_S)
        # A process that died cannot take the rest of the buffer.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(request: str | urllib.request.Request) -> Any:
    """GET a JSON document, without a proxy. Raises OSError."""
    with _OPENER.open(request, timeout=DEADLINE_S) as answer:
        return json.load(answer)


def part(token: str, index: int) -> dict[str, Any]:
    """Decode the header (0) or claims (1) of a JWT without verifying it."""
    text = token.split(".")[index]
    decoded: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return decoded
