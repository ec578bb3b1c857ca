"""docs/security.md matches the code: snippets load, tables are complete, commands print the same."""

from __future__ import annotations

import re
import time
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cobatch.server.auth.api_keys import ApiKeys
from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.jwks import StaticKeys
from cobatch.server.auth.tokens import TokenError, TokenVerifier
from cobatch.server.http.problem import KINDS
from cobatch.server.openapi.document import AUTH_KINDS, describe
from cobatch.server.settings.auth import Issuer
from cobatch.server.settings.load import load_settings
from cobatch.server.settings.schema import Settings
from tests.server.openapi.test_openapi import operations, served
from tests.support.auth.certificates import Pair
from tests.support.auth.protected import settings_in
from tests.support.auth.token_commands import token
from tests.support.auth.tokens import signer
from tests.support.http.in_process import gated
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "security.md").read_text()
KID = "key-1"


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """Return the text under a heading, up to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[2]


def load(snippet: str, folder: Path) -> Settings:
    """Load settings as `cobatch serve --config FILE MODEL` would, for the model that a rule names."""
    config = folder / "cobatch.toml"
    config.write_text(snippet)
    (folder / "model.onnx").write_bytes(b"")
    document, pair = tomllib.loads(snippet), Pair()
    for name, content in (("tls_cert", pair.certificate), ("tls_key", pair.key())):
        if file := document.get("server", {}).get(name):
            (folder / file).write_bytes(content)
    rules = document.get("auth", {}).get("models", [{"model": "model"}])
    flags = {"model": folder / "model.onnx", "name": rules[0]["model"]}
    return load_settings(config, {}, flags)


@pytest.mark.parametrize("snippet", blocks(TEXT, "toml"))
def test_every_snippet_loads(snippet: str, tmp_path: Path) -> None:
    document = tomllib.loads(snippet)
    if "keys" in document:
        assert len(ApiKeys.parse(document, "docs")) == 1
        return
    assert load(snippet, tmp_path).auth is not None


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md", "CONTRIBUTING.md"])
def test_snippets_elsewhere_load(name: str, tmp_path: Path) -> None:
    for snippet in blocks((ROOT / name).read_text(), "toml"):
        for model in re.findall(r'path = "(.*?)"', snippet):
            (tmp_path / model).write_bytes(b"")
        config = tmp_path / "cobatch.toml"
        config.write_text(snippet)
        load_settings(config, {}, {})


# A token of each service as documented: its claims beside iss, aud, iat, exp; its `typ`; its permissions.
Token = tuple[dict[str, Any], str | None, set[str]]
TOKENS: dict[str, Token] = {
    "Keycloak": (
        {"sub": "f1c4", "azp": "ranker", "jti": "1", "typ": "Bearer", "scope": "profile email", "acr": "1",
         "realm_access": {"roles": ["offline_access", "infer", "metadata"]}},
        "JWT", {"infer", "metadata"},
    ),
    "Auth0": (
        {"sub": "abc@clients", "client_id": "abc", "jti": "1", "scope": "infer", "permissions": ["infer"]},
        "at+jwt", {"infer"},
    ),
    "Microsoft Entra ID": (
        {"sub": "b0f1", "azp": "99", "azpacr": "1", "oid": "b0f1", "roles": ["infer"], "tid": "aaaa",
         "uti": "x", "ver": "2.0", "aio": "E2", "rh": "0.A", "nbf": 0},
        "JWT", {"infer"},
    ),
    "Okta": (
        {"ver": 1, "jti": "AT.1", "cid": "0oa1", "scp": ["infer", "metadata"], "sub": "0oa1"},
        None, {"infer", "metadata"},
    ),
    "Amazon Cognito": (
        {"sub": "aa", "client_id": "57c", "token_use": "access", "version": 2, "username": "u",
         "scope": "openid https://infer.example.com/infer"},
        None, {"infer"},
    ),
    "Google service accounts": (
        {"sub": "103456789012345678901", "azp": "103456789012345678901", "email_verified": True,
         "email": "ranker@project.iam.gserviceaccount.com"},
        "JWT", {"infer", "metadata"},
    ),
    "Kubernetes service accounts (GKE, EKS, AKS)": (
        {"sub": "system:serviceaccount:search:ranker", "jti": "1", "nbf": 0,
         "kubernetes.io": {"namespace": "search", "serviceaccount": {"name": "ranker", "uid": "1"}}},
        None, {"infer:rank"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
async def test_a_token_as_its_issuer_documents_it_is_accepted(name: str, tmp_path: Path) -> None:
    auth = load(blocks(section(name), "toml")[0], tmp_path).auth
    assert auth is not None
    (issuer,) = auth.issuers
    claims, typ, permissions = TOKENS[name]
    now_s = int(time.time())
    # Claims of RFC 9068 that this service does not write are removed.
    absent: dict[str, Any] = dict.fromkeys(("client_id", "jti", "scope"))
    minted = {"iss": issuer.issuer, "aud": auth.audience[0], "iat": now_s, "exp": now_s + 600}
    key = signer("RS256", KID)
    verifier = TokenVerifier(auth, {issuer.issuer: StaticKeys([key.key()])})
    verified = await verifier.verify(key.token({**absent, **minted, **claims}, typ=typ))
    principal = Authenticator(auth)._token_principal(verified)
    assert principal.permissions == permissions
    assert principal.tenant.name == claims[issuer.tenant_claim]
    # Without the documented settings the token is refused, except for the service that follows the RFC.
    strict = msgspec.structs.replace(auth, issuers=(Issuer(issuer=issuer.issuer, name="x"),))
    verifier = TokenVerifier(strict, {issuer.issuer: StaticKeys([key.key()])})
    if name != "Auth0":
        with pytest.raises(TokenError):
            await verifier.verify(key.token({**absent, **minted, **claims}, typ=typ))


async def test_permissions_per_route(tmp_path: Path) -> None:
    auth, _ = settings_in(tmp_path)
    documented: dict[tuple[str, str], str] = {}
    for routes, needs in re.findall(
        r"^\| (`(?:GET|POST) /.*?) \| (.*?) \|$", section("Permissions"), re.MULTILINE
    ):
        for method, path in re.findall(r"`(GET|POST|DELETE) (/.*?)`", routes):
            assert (path, method.lower()) not in documented
            documented[path, method.lower()] = needs
    words = {
        "Needs no credentials": "open",
        "Needs credentials": "any credential",
        "permission `metadata`, or one to infer": "`metadata`, `infer` or `infer:MODEL`",
        "permission `infer`, or `infer:NAME`": "`infer` or `infer:MODEL`",
        "Needs the permission `metadata`.": "`metadata`",
        "Needs the permission `admin`.": "`admin`",
    }
    async with gated(auth=auth) as (running, _):
        assert set(documented) == served(running)
        for path, method, operation in operations(describe(running.inference)):
            (expected,) = [text for words_, text in words.items() if words_ in operation["description"]]
            assert documented[path, method].partition(" with a")[0].partition(";")[0] == expected, path


def test_problems_and_their_status() -> None:
    found = re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", section("Problems"), re.MULTILINE)
    assert {slug: int(status) for slug, status in found} == {slug: KINDS[slug].status for slug in AUTH_KINDS}


def test_commands_print_the_documented_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("negate.onnx").write_bytes(b"")
    for console in blocks(TEXT, "console"):
        for command, shown in re.findall(
            r"^\$ cobatch token (.*)\n((?:(?!\$ ).*\n)*)", console, re.MULTILINE
        ):
            result = token(*_words(command))
            assert result.exit_code == 0, result.output
            assert _without_key(result.output) == _without_key(shown)


def _words(command: str) -> list[str]:
    return [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]


def _without_key(text: str) -> str:
    return re.sub(r"cb_[a-z2-7]{12}_[A-Za-z0-9_-]{43}", "cb_KEY", text)


def test_links_resolve() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#(.*?)\)", TEXT)) <= headings
    for name in re.findall(r"\]\((?!https?:|#)(.*?)\)", TEXT):
        assert (ROOT / "docs" / name.partition("#")[0]).is_file()
