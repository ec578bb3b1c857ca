"""Credentials over the wire: refusals and their challenges, on both edges."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.auth import tokens
from tests.support.auth.protected import (
    METADATA,
    SIGNER,
    Protected,
    bearer,
    challenge,
    get_as,
    infer,
    protected,
    token,
)
from tests.support.auth.tokens import AUDIENCE, ISSUER, NOW_S, Signer, hs256, unsigned
from tests.support.fronts.linked import WAYS
from tests.support.http.serving import GATE, Answer, data_of, gate, get, post, rows_of

RESOURCE = {"resource_metadata": METADATA}


@pytest.fixture(scope="module", params=WAYS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Protected]:
    keys = {"job": ("infer:gate",), "reader": ("metadata",)}
    with protected(request.param, tmp_path_factory.mktemp("auth"), keys=keys) as running:
        yield running


def refused(answer: Answer, status: int, slug: str, error: str | None = None) -> dict[str, str]:
    """Check a refusal (RFC 6750, 3; RFC 9457); return the challenge's remaining parameters."""
    assert (answer.status, answer.slug) == (status, slug)
    assert answer.json.keys() >= {"type", "title", "status", "detail", "instance"}
    scheme, parameters = challenge(answer)
    assert scheme == "Bearer"
    assert parameters.pop("resource_metadata") == METADATA
    assert parameters.pop("error", None) == error
    assert (parameters.pop("error_description", None) is None) == (error is None)
    return parameters


# Authentication


def test_a_token_is_accepted(running: Protected) -> None:
    assert data_of(running.infer(token(), 3)) == [6]


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "bEaReR"])
def test_rfc6750_2_1_the_scheme_is_case_insensitive(running: Protected, scheme: str) -> None:
    assert data_of(running.ask(gate(3, headers={"Authorization": f"{scheme} {token()}"}))) == [6]


def test_an_api_key_is_accepted(running: Protected) -> None:
    assert data_of(running.ask(gate(3, headers={"X-API-Key": running.keys["job"]}))) == [6]


@pytest.mark.parametrize("request_", [gate(1), get("/v2"), get("/v2/models/gate"), post("/batch", {})])
def test_rfc6750_3_1_no_credentials_and_no_error_code(running: Protected, request_: bytes) -> None:
    assert refused(running.ask(request_), 401, "unauthenticated") == {}


def test_rfc9110_11_6_1_a_scheme_that_is_not_offered(running: Protected) -> None:
    for scheme in ("Basic YTpi", "Digest x", "Bearers x", ""):
        answer = running.ask(gate(1, headers={"Authorization": scheme}))
        assert refused(answer, 401, "unauthenticated") == {}


@pytest.mark.parametrize(
    "value", ["Bearer", "Bearer a b", "Bearer a,b", 'Bearer "a"', "Bearer =", "Bearer ä"]
)
def test_rfc6750_3_1_malformed(running: Protected, value: str) -> None:
    answer = running.ask(gate(1, headers={"Authorization": value}))
    assert refused(answer, 400, "bad-authorization", "invalid_request") == {}


def test_rfc6750_2_two_credentials(running: Protected) -> None:
    good = f"Bearer {token()}"
    both = gate(1, headers={"Authorization": good, "X-API-Key": running.keys["job"]})
    twice = gate(1, headers={"Authorization": f"{good}\r\nAuthorization: {good}"})
    for data in (both, twice):
        assert refused(running.ask(data), 400, "bad-authorization", "invalid_request") == {}


@pytest.mark.parametrize("name", ["access_token", "access%5Ftoken", "a=1&%61ccess_token", "access_token="])
def test_rfc6750_2_3_a_token_in_the_query(running: Protected, name: str) -> None:
    target = f"{GATE}?{name}={token()}"
    for headers in ({}, bearer(token())):
        answer = running.ask(post(target, rows_of(1), headers))
        assert refused(answer, 400, "bad-authorization", "invalid_request") == {}


HOSTILE = {
    "expired": SIGNER.token({"exp": int(NOW_S) - 60}),
    "not yet": SIGNER.token({"nbf": int(NOW_S) + 600}),
    "audience": SIGNER.token({"aud": "https://other.test"}),
    "issuer": SIGNER.token({"iss": ISSUER + "/"}),
    "type": SIGNER.token(typ="JWT"),
    "crit": SIGNER.token(crit=["exp"]),
    "kid": SIGNER.token(kid="../../etc/passwd"),
    "none": unsigned(b'{"alg":"none","typ":"at+jwt"}', tokens.as_json(tokens.good_claims()), b""),
    "confusion": hs256(secret=SIGNER.pem(), kid=SIGNER.kid),
    "stripped": SIGNER.token().rpartition(".")[0] + ".",
    "forged": Signer(ec.generate_private_key(ec.SECP256R1()), "ES256", SIGNER.kid).token(),
    "garbage": "garbage",
    "huge": "a" * 9000,
}


@pytest.mark.parametrize("how", HOSTILE)
def test_rfc6750_3_1_a_bad_token(running: Protected, how: str) -> None:
    for _ in range(2):  # first verified, then from the cache
        assert refused(running.infer(HOSTILE[how]), 401, "invalid-credentials", "invalid_token") == {}
        answer = running.ask(get_as(HOSTILE[how], "/v2"))
        assert refused(answer, 401, "invalid-credentials", "invalid_token") == {}


def test_a_bad_api_key(running: Protected) -> None:
    good = running.keys["job"]
    for key in (good[:-1] + ("A" if good[-1] != "A" else "B"), good.upper(), "x", "ä"):
        answer = running.ask(gate(1, headers={"X-API-Key": key}))
        assert refused(answer, 401, "invalid-credentials", "invalid_token") == {}


# Authorization


@pytest.mark.parametrize(
    ("scope", "data", "missing", "model"),
    [
        ("metadata", gate(1), "infer", "gate"),
        ("infer:other", gate(1), "infer", "gate"),
        ("infer:gat infer:gate2 INFER", gate(1), "infer", "gate"),
        ("admin", gate(1), "infer", "gate"),
        ("admin", post("/v1/models/gate/predictions", {}), "infer", "gate"),
        ("infer:other", get("/v2/models/gate"), "metadata", "gate"),
        ("infer metadata", get("/v2/models/gate/stats"), "admin", None),
        ("infer metadata", get("/v2/models/stats"), "admin", None),
        ("infer metadata", post("/v2/repository/index", b""), "admin", None),
        ("infer", get("/docs"), "metadata", None),
    ],
)
def test_rfc6750_3_1_insufficient_scope(
    running: Protected, scope: str, data: bytes, missing: str, model: str | None
) -> None:
    head, end, body = data.partition(b"\r\n\r\n")
    known = f"\r\nAuthorization: Bearer {token(scope=scope)}".encode()
    answer = running.ask(head + known + end + body)
    assert refused(answer, 403, "forbidden", "insufficient_scope") == {"scope": missing}
    assert answer.json["permission"] == missing
    assert answer.json.get("model") == model


def test_the_scopes_of_an_api_key(running: Protected) -> None:
    for key, model in (("job", "other"), ("reader", "gate")):
        request = post(f"/v2/models/{model}/infer", rows_of(1), {"X-API-Key": running.keys[key]})
        answer = running.ask(request)
        assert refused(answer, 403, "forbidden", "insufficient_scope") == {"scope": "infer"}


def test_permission_to_infer_includes_metadata(running: Protected) -> None:
    assert running.ask(get_as(token(scope="infer:gate"), "/v2/models/gate")).status == 200
    assert running.ask(get_as(token(scope="metadata"), "/v2/models/gate/config")).status == 200
    assert running.ask(get_as(token(scope="admin"), "/v2/models/gate/stats")).status == 200


def test_rfc9728_3_metadata_is_open_and_names_the_issuer(running: Protected) -> None:
    answer = running.ask(get(METADATA.removeprefix(AUDIENCE)))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json["resource"] == AUDIENCE
    assert answer.json["authorization_servers"] == [ISSUER]
    assert answer.json["bearer_methods_supported"] == ["header"]


def test_invisible_models_are_not_named(running: Protected) -> None:
    allowed = {"infer:gate": ["gate"], "infer": ["gate", "other"], "metadata": ["gate", "other"]}
    for scope, models in allowed.items():
        for target in ("/v2/models/none", "/v2/models/none/config"):
            answer = running.ask(get_as(token(scope=scope), target))
            if scope == "infer:gate":
                # The same answer as for an existing, forbidden model.
                assert answer.slug == running.ask(get_as(token(scope=scope), "/v2/models/other")).slug
            else:
                assert (answer.slug, answer.json["models"]) == ("unknown-model", models)
    answer = running.ask(get("/v2/models/none/ready"))
    assert (answer.slug, answer.json["models"]) == ("unknown-model", [])


def test_unusual_spellings_of_open_paths_stay_protected(running: Protected) -> None:
    for target in ("/v2/health/live/", "/v2/health/../models/gate", "/v2/health%2Flive/x", "//v2/health/live",
                   "/problems/../v2", "/problems/a/b", "/V2/health/live", "/.well-known/x"):  # fmt: skip
        assert running.ask(get(target)).status == 401


def test_rfc9068_no_token_in_logs_or_answers(running: Protected, caplog: pytest.LogCaptureFixture) -> None:
    secrets = [
        *HOSTILE.values(),
        token(),
        token(scope="metadata"),
        running.keys["job"],
        running.keys["job"][:-1],
    ]
    with caplog.at_level(logging.DEBUG):
        for secret in secrets:
            requests = [infer(secret), get_as(secret, "/v2"), get_as(secret, "/nothing"),
                     get(f"/v2?access_token={secret}"), get_as(secret, f"/v2?access_token={secret}"),
                     gate(1, headers={"X-API-Key": secret}),
                     gate(1, headers={"Authorization": f"Bearer {secret} x"}),
                     infer(secret) + b"not HTTP\r\n\r\n"]  # fmt: skip
            answers = [running.ask(data) for data in requests]
            for answer in answers:
                text = repr(answer.headers).encode() + answer.body
                for part in (secret, *secret.split("."), *secret.split("_")[2:]):
                    assert len(part) < 20 or part.encode() not in text
    for part in {part for secret in secrets for part in (*secret.split("."), *secret.split("_")[2:])}:
        assert len(part) < 20 or part not in caplog.text


def test_the_metadata_url_follows_the_settings(tmp_path: Path) -> None:
    with protected(True, tmp_path, resource="https://models.test/base/") as running:
        where = "https://models.test/.well-known/oauth-protected-resource/base"
        assert challenge(running.ask(gate(1))) == ("Bearer", {"resource_metadata": where})
        answer = running.ask(get("/.well-known/oauth-protected-resource/base"))
        assert answer.json["resource"] == "https://models.test/base/"
    with protected(True, tmp_path, audience=("cobatch",)) as running:
        assert running.ask(gate(1)).headers["www-authenticate"] == "Bearer"
        assert running.ask(get("/.well-known/oauth-protected-resource")).status == 404
