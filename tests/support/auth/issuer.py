"""A real issuer of access tokens: oidc-provider, certified by the OpenID foundation, as a child process.

    with issuer.started(issuer.Client("alice", scope="infer metadata")) as issuing:
        auth = issuing.auth(jwks_cooldown_s=5)
        token = issuing.token("alice")

tests/support/auth/issuer_app/issuer.mjs is its program; here is what a test says to it. The first use
installs it (`npm ci`, a second or two). Where node or npm is missing, or npm cannot download, the test is
skipped with the reason, but fails under CI. All of this is synchronous; nothing here sleeps, and deadlines
are only reached where something is broken. The process ends with its `with`, and also if this one dies,
because its stdin ends then.
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
    """Who may ask for tokens. `scope` is all that it may have; `claims` are in its tokens as well."""

    id: str
    scope: str = "infer metadata"
    claims: Mapping[str, object] = {}


class Seen(NamedTuple):
    """What the issuer was asked so far, whether it answered or not.

    `metadata` counts only where it is; `cut` are connections while it was down("closed").
    """

    jwks: int
    metadata: int
    cut: int


class Refused(Exception):
    """The issuer gives no token. The text is its OAuth error code."""


class Issuer:
    """A running issuer. Its methods raise OSError or Refused where it gives nothing."""

    def __init__(
        self, process: subprocess.Popen[str], said: queue.SimpleQueue[str], passwords: Mapping[str, str]
    ) -> None:
        self._process = process
        self._said = said
        self._passwords = passwords
        self.issuer: str = self._answer()["issuer"]

    def _answer(self) -> dict[str, Any]:
        line = self._said.get(timeout=DEADLINE_S)
        assert line, "the issuer ended, see its stderr"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer
        return answer

    def _do(self, command: str, **more: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command, **more}) + "\n")
        self._process.stdin.flush()
        return self._answer()["ok"]

    # What the server under test is told of it

    def settings(self, **more: Any) -> IssuerSettings:
        """`[[auth.issuers]]` for it; keys are found through its metadata unless `jwks_url` is given."""
        return IssuerSettings(issuer=self.issuer, **{"name": "real", **more})

    def auth(self, **more: Any) -> AuthSettings:
        """`[auth]` with this issuer alone."""
        return AuthSettings(**{"issuers": (self.settings(),), "audience": (RESOURCE,), **more})

    @property
    def jwks_url(self) -> str:
        """Where its keys are, also without its metadata."""
        return f"{self.issuer}/jwks"

    # What its clients get of it

    def token(self, client: str, scope: str | None = None, resource: str | None = RESOURCE) -> str:
        """An access token by client credentials, RFC 6749, 4.4. Without a resource it is no JWT.

        Without `scope` it has none.
        """
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
        """Its public keys, as everybody gets them. Counts as a request, as all others."""
        keys: list[dict[str, Any]] = get(self.jwks_url)["keys"]
        return keys

    # What happens to it

    def reset(self) -> None:
        """As if newly started, in the same place: a new key, nothing asked yet. For the next test."""
        self._do("reset")

    def rotate(self, alg: Algorithm | None = None) -> str:
        """Sign with a new key, of the first one's kind by default; the old are published too. Its `kid`."""
        kid: str = self._do("rotate", alg=alg)
        return kid

    def drop(self) -> None:
        """Publish no key but the one that signs."""
        self._do("drop")

    @property
    def kid(self) -> str:
        """Which key signs."""
        kid: str = self._do("kid")
        return kid

    def down(self, how: Literal["closed", "unavailable"] = "closed") -> None:
        """Cut every connection at once, or answer 503 to everything."""
        self._do("mode", mode=how)

    def hold(self) -> None:
        """Let requests for the keys wait, until `up` or `down`. All others are answered."""
        self._do("mode", mode="held")

    def up(self) -> None:
        """Serve again."""
        self._do("mode", mode="up")

    @property
    def seen(self) -> Seen:
        """What it was asked so far."""
        return Seen(**self._do("seen"))

    @property
    def jwks_requests(self) -> int:
        """How often its keys were asked for, whether it answered or not."""
        return self.seen.jwks

    def jwks_asked(self, count: int) -> None:
        """Wait until its keys were asked for that often."""
        assert self._do("jwks_asked", count=count) >= count


@contextlib.contextmanager
def started(
    *clients: Client,
    alg: Algorithm = "RS256",
    ttl_s: int = 3600,
    path: str = "",
    discovery: Literal["openid", "oauth"] = "openid",
) -> Iterator[Issuer]:
    """Run an issuer on a free port; with `path` ("/realms/x") its name has one.

    It starts in 0.3 s, `reset` takes less; each RSA key takes 0.1 s or more, others nothing.

    Its metadata is where OpenID Connect Discovery puts it or, with "oauth", only where RFC 8414 does.
    """
    program = [node.installed(APP), "issuer.mjs"]
    passwords = {client.id: secrets.token_urlsafe() for client in clients}
    known = [client._asdict() | {"secret": passwords[client.id]} for client in clients]
    config = {"clients": known, "alg": alg, "ttl_s": ttl_s, "path": path, "discovery": discovery}
    with _running([*program, json.dumps(config)]) as (process, said):
        yield Issuer(process, said, passwords)


@contextlib.contextmanager
def _running(program: list[str]) -> Iterator[tuple[subprocess.Popen[str], queue.SimpleQueue[str]]]:
    """The process, and what it says line by line, "" at its end. stderr is pytest's, which shows it."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True, cwd=APP, env=node.environ())
    said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                said.put(line)
        said.put("")

    reader = threading.Thread(target=read, name="issuer-stdout", daemon=True)
    reader.start()
    assert process.stdin is not None
    try:
        yield process, said
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(DEADLINE_S)
        # An end that it never saw has nothing left to flush into.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(request: str | urllib.request.Request) -> Any:
    """The JSON that is there, past any proxy. Raises OSError."""
    with _OPENER.open(request, timeout=DEADLINE_S) as answer:
        return json.load(answer)


def part(token: str, index: int) -> dict[str, Any]:
    """Header (0) or claims (1) of a JWT, unchecked."""
    text = token.split(".")[index]
    decoded: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return decoded
