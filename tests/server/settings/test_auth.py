"""`[auth]` of the configuration file: its values and every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from cobatch.server.settings.auth import AuthSettings, Issuer, ModelRule, TenantRule, is_safe_url
from cobatch.server.settings.load import load_settings
from cobatch.server.settings.values import SettingsError

ISSUER = "[[auth.issuers]]\nissuer = 'https://a.test'\n"
AUTH = "[auth]\naudience = 'https://me.test'\n"
GOOD = AUTH + ISSUER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m.onnx").write_bytes(b"")
    return tmp_path


def read(folder: Path, text: str, **flags: object) -> AuthSettings:
    config = folder / "cobatch.toml"
    config.write_text(f"{text}\n[[models]]\npath = 'm.onnx'\n")
    auth = load_settings(config, {}, flags).auth
    assert auth is not None
    return auth


def refusal(folder: Path, text: str, **flags: object) -> str:
    """Return the only message, without the folder's name."""
    with pytest.raises(SettingsError) as caught:
        read(folder, text, **flags)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{folder}/", "").replace(" (file cobatch.toml)", "")


def test_an_issuer_and_an_audience_are_enough(folder: Path) -> None:
    auth = read(folder, GOOD)
    assert auth == AuthSettings(
        issuers=(Issuer(issuer="https://a.test", name="https://a.test"),), audience=("https://me.test",)
    )
    assert auth.issuers[0].require_typ
    assert "HS256" not in auth.issuers[0].algorithms


def test_every_key_is_read(folder: Path) -> None:
    text = """
[auth]
audience = ["a", "b"]
resource = "https://me.test"
api_keys_file = "keys.toml"
leeway_s = 0
max_token_bytes = 4096
remembered_tokens = 0
jwks_refresh_s = 60
jwks_cooldown_s = 0.5
jwks_stale_s = 3600
rate_limit_headers = true
[[auth.issuers]]
issuer = "one"
name = "short"
key_files = ["one.pem", "/etc/two.pem"]
algorithms = ["ES256"]
require_typ = false
required_claims = ["exp"]
tenant_claim = "org.id"
permission_claims = ["scope", "roles"]
[auth.issuers.permissions]
user = ["infer:m", "metadata"]
[[auth.issuers]]
issuer = "two"
secret_file = "secret"
algorithms = ["HS256"]
[[auth.tenants]]
tenant = "t"
max_concurrent = 1
max_queue_rows = 2
requests_per_s = 0.5
burst = 3
[[auth.models]]
model = "m"
tenants = ["t"]
scopes = ["gold"]
"""
    auth = read(folder, text)
    assert auth.issuers[0] == Issuer(
        issuer="one",
        name="short",
        key_files=(f"{folder}/one.pem", "/etc/two.pem"),
        algorithms=("ES256",),
        require_typ=False,
        required_claims=("exp",),
        tenant_claim="org.id",
        permission_claims=("scope", "roles"),
        permissions={"user": ("infer:m", "metadata")},
    )
    assert auth.issuers[1].secret_file == f"{folder}/secret"
    assert auth.api_keys_file == f"{folder}/keys.toml"
    assert auth.tenants == (
        TenantRule(tenant="t", max_concurrent=1, max_queue_rows=2, requests_per_s=0.5, burst=3),
    )
    assert auth.models == (ModelRule(model="m", tenants=("t",), scopes=("gold",)),)
    assert (auth.audience, auth.leeway_s, auth.remembered_tokens) == (("a", "b"), 0.0, 0)
    assert auth.rate_limit_headers


def test_with_api_keys_alone_there_is_no_issuer_and_no_audience(folder: Path) -> None:
    assert read(folder, "[auth]\napi_keys_file = 'keys.toml'").issuers == ()


ONE = "auth.issuers[0]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auth = 1", "auth: expected a table, got 1"),
        ("[auth]", "auth: needs [[auth.issuers]] or api_keys_file, or no client could call"),
        (AUTH, "auth: needs [[auth.issuers]] or api_keys_file, or no client could call"),
        (ISSUER, "auth.audience: missing; expected the name of this server in a token's aud"),
        (
            GOOD.replace("me.test", "me.tes[t"),
            "auth.audience: expected an http:// or https:// address, got the text 'https://me.tes[t'",
        ),
        (
            AUTH + "resource = 'me.test'\n" + ISSUER,
            "auth.resource: expected an http:// or https:// address, got the text 'me.test'",
        ),
        ("[auth]\nissuer = 'x'", "auth.issuer: unknown key"),
        ("[auth]\naudiense = 'x'", "auth.audiense: unknown key; did you mean audience?"),
        (
            "[auth]\naudience = 1",
            "auth.audience: expected an array of text that is not empty, got 1",
        ),
        ("[auth]\nleeway_s = 301", "auth.leeway_s: expected a number from 0 to 300, got 301"),
        ("[auth]\nleeway_s = -1", "auth.leeway_s: expected a number from 0 to 300, got -1"),
        (
            "[auth]\nmax_token_bytes = 255",
            "auth.max_token_bytes: expected an integer from 256 to 65536, got 255",
        ),
        ("[auth]\njwks_refresh_s = 0", "auth.jwks_refresh_s: expected a number above 0"),
        ("[auth]\nrate_limit_headers = 1", "auth.rate_limit_headers: expected true or false, got 1"),
        (
            "[auth.issuers]",
            "auth.issuers: expected an array of tables, written [[auth.issuers]], got a table",
        ),
        (AUTH + "issuers = [1]", f"{ONE}: expected a table, got 1"),
        (AUTH + "[[auth.issuers]]", f"{ONE}.issuer: missing"),
        (
            AUTH + "[[auth.issuers]]\nissuer = ''",
            f"{ONE}.issuer: expected text without spaces and |, got the text ''",
        ),
        (GOOD + "jwks = 'x'", f"{ONE}.jwks: unknown key; did you mean"),
        (GOOD + "algorithms = []", f"{ONE}.algorithms: expected an array of any of ES256"),
        (
            GOOD + "algorithms = ['none']",
            f"{ONE}.algorithms: expected an array of any of ES256",
        ),
        (
            GOOD + "algorithms = ['RS512']",
            f"{ONE}.algorithms: expected an array of any of ES256",
        ),
        (
            GOOD + "jwks_url = 'https://a.test/k'\nkey_files = ['k.pem']",
            f"{ONE}: jwks_url and key_files together; give one",
        ),
        (
            GOOD + "key_files = ['k.pem']\nsecret_file = 's'",
            f"{ONE}: key_files and secret_file together; give one",
        ),
        (
            GOOD + "secret_file = 's'\nalgorithms = ['HS256', 'RS256']",
            f"{ONE}.algorithms: HS256 only alone, as algorithms = ['HS256']",
        ),
        (GOOD + "algorithms = ['HS256']", f"{ONE}: HS256 needs secret_file, and only HS256 has one"),
        (GOOD + "secret_file = 's'", f"{ONE}: HS256 needs secret_file, and only HS256 has one"),
        (
            GOOD + "jwks_url = 'http://a.test/k'",
            f"{ONE}.jwks_url: expected an https:// URL, or http:// on loopback, got the text",
        ),
        (
            GOOD.replace("https://a", "http://a"),
            f"{ONE}.issuer: expected an https:// URL, or http:// on loopback, got the text",
        ),
        (GOOD + ISSUER, "auth.issuers[1]: 'https://a.test' is there twice"),
        (
            GOOD + "name = 'n'\n" + ISSUER.replace("a.test", "b.test") + "name = 'n'",
            "auth.issuers[1]: 'n' is there twice",
        ),
        (
            GOOD + "permissions = {user = ['write']}",
            f"{ONE}.permissions.user: expected permissions: infer, infer:MODEL, metadata, admin",
        ),
        (
            GOOD + "permissions = {user = 'infer'}",
            f"{ONE}.permissions: expected a table whose values are arrays",
        ),
        (
            GOOD + "[[auth.tenants]]\ntenant = 't'\nscope = 's'",
            "auth.tenants[0]: tenant and scope together; give one",
        ),
        (GOOD + "[[auth.tenants]]\nburst = 3", "auth.tenants[0].burst: needs requests_per_s"),
        (
            GOOD + "[[auth.tenants]]\nmax_concurrent = 0",
            "auth.tenants[0].max_concurrent: expected an integer from 1",
        ),
        (
            GOOD + "[[auth.tenants]]\nrequests_per_s = 0",
            "auth.tenants[0].requests_per_s: expected a number above 0",
        ),
        (GOOD + "[[auth.tenants]]\nrate = 1", "auth.tenants[0].rate: unknown key"),
        (GOOD + "[[auth.models]]\nmodel = 'm'", "auth.models[0]: needs tenants or scopes"),
        (GOOD + "[[auth.models]]\nscopes = ['s']", "auth.models[0].model: missing"),
    ],
)
def test_a_mistake_is_refused_by_key_and_expectation(folder: Path, text: str, expected: str) -> None:
    assert refusal(folder, text).startswith(expected)


def test_auth_allows_other_hosts_and_excludes_allow_anonymous(folder: Path) -> None:
    read(folder, GOOD, host="0.0.0.0")
    assert refusal(folder, GOOD, allow_anonymous=True).startswith(
        "server.allow_anonymous: not together with [auth]"
    )


@pytest.mark.parametrize(
    "url",
    ["https://a.test", "https://a.test:1/x", "http://127.0.0.1:8", "http://[::1]/k", "http://localhost"],
)
def test_safe_urls_of_keys(url: str) -> None:
    assert is_safe_url(url)


@pytest.mark.parametrize(
    "url",
    ["", "a.test", "http://a.test", "http://10.0.0.1", "http://localhost.a.test", "ftp://localhost",
     "file:///etc/k", "https://", "https://user@a.test", "https://a.test:0", "https://a.test:99999",
     "https://[x]/", "https:a.test"],
)  # fmt: skip
def test_unsafe_urls_of_keys(url: str) -> None:
    assert not is_safe_url(url)


def test_a_rule_names_a_served_model(tmp_path: Path) -> None:
    (tmp_path / "tiny.onnx").write_bytes(b"")
    (tmp_path / "secret").write_text("x" * 32)
    config = tmp_path / "cobatch.toml"
    config.write_text(
        '[[models]]\npath = "tiny.onnx"\n[auth]\naudience = "a"\n[[auth.issuers]]\nissuer = "i"\n'
        'secret_file = "secret"\nalgorithms = ["HS256"]\n[[auth.models]]\nmodel = "tini"\nscopes = ["s"]\n'
    )
    with pytest.raises(SettingsError, match=r"there is no model 'tini'; did you mean tiny\?"):
        load_settings(config, {}, {})
