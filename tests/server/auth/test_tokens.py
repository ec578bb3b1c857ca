"""Access tokens: valid ones are accepted, and each defect is refused with its own reason.

A test named after an RFC section checks one of its MUSTs (`../shared/reference/auth.md` lists them).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from cobatch.server.auth.jwks import KeysUnavailableError, StaticKeys
from cobatch.server.auth.keys import Key
from cobatch.server.auth.tokens import TokenError, TokenVerifier, VerifiedToken, claim_at
from cobatch.server.settings.auth import AuthSettings, Issuer
from tests.support.auth.tokens import (
    AUDIENCE,
    ISSUER,
    NOW_S,
    SECRET,
    Signer,
    all_keys,
    as_json,
    auth_settings,
    b64,
    good_claims,
    hs256,
    rsa_key,
    signer,
    unsigned,
)
from tests.support.examples import examples

HS_ISSUER = Issuer(issuer=ISSUER, name="test", algorithms=("HS256",), secret_file="secret")


def verify(
    token: str, auth: AuthSettings | None = None, keys: StaticKeys | None = None, now_s: float = NOW_S
) -> VerifiedToken:
    auth = auth or auth_settings()
    keys = keys or all_keys()
    verifier = TokenVerifier(auth, {issuer.issuer: keys for issuer in auth.issuers}, lambda: now_s)
    return asyncio.run(verifier.verify(token))


def refusal(
    token: str, auth: AuthSettings | None = None, keys: StaticKeys | None = None, now_s: float = NOW_S
) -> TokenError:
    with pytest.raises(TokenError) as caught:
        verify(token, auth, keys, now_s)
    return caught.value


def refused_unchecked(token: str, about: str, auth: AuthSettings | None = None) -> None:
    """Check a permanent refusal for this reason, before the signature check."""
    error = refusal(token, auth)
    assert about in error.detail
    assert not error.forged
    assert error.permanent


def relaxed(**fields: Any) -> AuthSettings:
    return auth_settings(Issuer(issuer=ISSUER, name="test", require_typ=False, **fields))


# Valid tokens


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
def test_a_valid_token_of_each_algorithm(algorithm: str) -> None:
    verified = verify(signer(algorithm).token())
    assert verified.claims == good_claims()
    assert verified.issuer.issuer == ISSUER
    assert verified.key.algorithm == algorithm
    assert verified.expires_s == NOW_S + 600 + 10


def test_a_valid_hs256_token() -> None:
    keys = StaticKeys([Key(None, "HS256", SECRET)])
    for kid in (None, "any"):
        assert verify(hs256(kid=kid), auth_settings(HS_ISSUER), keys).key.algorithm == "HS256"
    error = refusal(hs256(secret=SECRET + b"!"), auth_settings(HS_ISSUER), keys)
    assert error.forged
    assert error.permanent


def test_pyjwt_reads_the_same_claims() -> None:
    token = signer().token()
    options: Any = {"verify_exp": False}
    key = signer().private.public_key()
    assert jwt.decode(token, key, ["RS256"], options, audience=AUDIENCE) == verify(token).claims


def test_several_issuers() -> None:
    other = Issuer(issuer="https://other.test", name="other")
    auth = auth_settings(Issuer(issuer=ISSUER, name="test"), other)
    mine, theirs = signer(kid="mine"), signer(kid="theirs")
    keys = {ISSUER: StaticKeys([mine.key()]), other.issuer: StaticKeys([theirs.key()])}
    verifier = TokenVerifier(auth, keys, lambda: NOW_S)
    assert asyncio.run(verifier.verify(theirs.token({"iss": other.issuer}))).issuer is other
    # An issuer's keys check only its own tokens, also under an equal kid.
    for token in (theirs.token(), theirs.token(kid="mine"), mine.token({"iss": other.issuer}, kid="theirs")):
        with pytest.raises(TokenError):
            asyncio.run(verifier.verify(token))


# Signatures


def test_rfc7515_5_2_a_wrong_signature() -> None:
    token = signer().token()
    start, _, signature = token.rpartition(".")
    header = start.split(".")[0]
    other = b64(as_json({**good_claims(), "sub": "mallory"}))
    turned = ("A" if signature[0] != "A" else "B") + signature[1:]
    for forged in (f"{start}.{turned}", f"{header}.{other}.{signature}", f"{start}.{signature[:-2]}"):
        error = refusal(forged)
        assert error.forged
        assert error.permanent
        assert error.detail == "the token's signature is wrong"


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
def test_rfc7515_5_2_another_key_with_the_same_kid(algorithm: str) -> None:
    private = {
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": signer("EdDSA", "untrusted").private,
    }.get(algorithm, rsa_key("untrusted"))
    assert refusal(Signer(private, algorithm, signer(algorithm).kid).token()).forged


@pytest.mark.parametrize("signature", [b"\0" * 64, b"\0", b"\xff" * 64, b"\0" * 256, b"0" * 8])
@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
def test_rfc8725_3_4_degenerate_signatures(algorithm: str, signature: bytes) -> None:
    # Some libraries accepted r = s = 0 for every ECDSA key.
    head = as_json({"typ": "at+jwt", "alg": algorithm, "kid": signer(algorithm).kid})
    assert refusal(unsigned(head, as_json(good_claims()), signature)).forged


def test_a_throttled_address_is_refused_before_the_signature_check() -> None:
    class Throttled(Exception):
        pass

    def stop() -> None:
        raise Throttled

    verifier = TokenVerifier(auth_settings(), {ISSUER: all_keys()}, lambda: NOW_S)
    with pytest.raises(Throttled):
        asyncio.run(verifier.verify(signer().token(), stop))
    # Without a signature check the throttle is not asked.
    for token in (signer().token({"exp": 1}), signer().token(kid="unknown"), "x"):
        with pytest.raises(TokenError):
            asyncio.run(verifier.verify(token, stop))


# Algorithms


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "nOnE", "", " none", "none\u0000", "\uff4eone"])
def test_rfc9068_4_and_rfc8725_3_1_alg_none(alg: str) -> None:
    head, claims = as_json({"typ": "at+jwt", "alg": alg}), as_json(good_claims())
    refused_unchecked(unsigned(head, claims), "alg")
    refused_unchecked(f"{b64(head)}.{b64(claims)}.", "three parts")
    refused_unchecked(f"{b64(head)}.{b64(claims)}", "three parts")


def test_rfc8725_3_1_hs256_signed_with_the_rsa_public_key() -> None:
    good = signer()
    spki = good.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    for secret in (good.pem(), good.pem().strip(), spki, json.dumps(good.jwk()).encode()):
        refused_unchecked(hs256(secret=secret, kid=good.kid), "alg")


def test_rfc8725_3_1_hs256_with_a_mixed_configuration() -> None:
    # The settings refuse this mixture; the key's own algorithm prevents it too.
    mixed = Issuer(issuer=ISSUER, name="test", algorithms=("RS256", "HS256"))
    error = refusal(hs256(secret=signer().pem(), kid=signer().kid), auth_settings(mixed))
    assert not error.forged
    assert "kid and alg" in error.detail


@pytest.mark.parametrize("alg", ["RS384", "RS512", "PS512", "ES384", "HS384", "HS512", "ES256K", "rs256"])
def test_rfc8725_3_1_an_unconfigured_algorithm(alg: str) -> None:
    refused_unchecked(signer().token(alg=alg), "alg")


def test_rfc8725_3_1_an_algorithm_not_configured_for_this_issuer() -> None:
    only = auth_settings(Issuer(issuer=ISSUER, name="test", algorithms=("ES256",)))
    refused_unchecked(signer("RS256").token(), "alg", only)
    assert verify(signer("ES256").token(), only)


def test_rfc8725_3_1_one_key_one_algorithm() -> None:
    # The same RSA key with another padding: known kid, wrong algorithm.
    good = signer("RS256")
    error = refusal(Signer(good.private, "PS256", good.kid).token())
    assert "kid and alg" in error.detail
    assert not error.forged


def test_rfc8725_3_1_a_key_source_that_ignores_the_algorithm() -> None:
    class Careless(StaticKeys):
        async def find(self, kid: str | None, algorithm: str) -> Key | None:
            return signer("RS256").key()

    same = Signer(signer("RS256").private, "PS256", "key-RS256")
    assert "kid and alg" in refusal(same.token(), keys=Careless([])).detail


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1()])
def test_rfc8725_3_2_es256_with_another_curve(curve: ec.EllipticCurve) -> None:
    other = ec.generate_private_key(curve)
    named = {"secp384r1": "ES384", "secp521r1": "ES512", "secp256k1": "ES256K"}[curve.name]
    token = Signer(other, named, signer("ES256").kid).token(alg="ES256")
    assert refusal(token).forged
    # Even among the trusted keys it would check nothing.
    wrong = StaticKeys([Key("x", "ES256", other.public_key())])
    assert "cannot be checked" in refusal(signer("ES256").token(kid="x"), keys=wrong).detail


def test_rfc8725_3_5_a_weak_rsa_key_checks_nothing() -> None:
    weak = Signer(rsa_key("weak", 1024), "RS256", "weak")
    head, claims = as_json({"typ": "at+jwt", "alg": "RS256", "kid": "weak"}), as_json(good_claims())
    token = unsigned(head, claims, b"\1" * 128)
    assert "cannot be checked" in refusal(token, keys=StaticKeys([weak.key()])).detail


@pytest.mark.parametrize("alg", [None, 1, True, ["RS256"], {"alg": "RS256"}, [], {}])
def test_rfc7515_4_1_1_alg_must_be_text(alg: object) -> None:
    head = json.dumps({"typ": "at+jwt", "kid": signer().kid, "alg": alg}).encode()
    refused_unchecked(signer().signed(head, as_json(good_claims())), "alg")
    no_alg = as_json({"typ": "at+jwt", "kid": signer().kid})
    refused_unchecked(signer().signed(no_alg, as_json(good_claims())), "alg")


# The header


@pytest.mark.parametrize(
    "crit", [["exp"], ["b64"], ["urn:example"], [], "exp", {}, 1, None, ["alg"], ["exp", "exp"]]
)
def test_rfc7515_4_1_11_crit(crit: object) -> None:
    head = {"typ": "at+jwt", "alg": "RS256", "kid": signer().kid, "crit": crit, "urn:example": 1}
    refused_unchecked(signer().signed(json.dumps(head).encode(), as_json(good_claims())), "crit")


@pytest.mark.parametrize("b64_member", [False, True, "false"])
def test_rfc7797_6_b64(b64_member: object) -> None:
    refused_unchecked(signer().token(b64=b64_member), "b64")
    refused_unchecked(signer().token(b64=b64_member, crit=["b64"]), "crit")


def test_rfc7797_detached_payload() -> None:
    header, _, signature = signer().token().split(".")
    refused_unchecked(f"{header}..{signature}", "three parts")
    raw = as_json({"typ": "at+jwt", "alg": "RS256", "kid": signer().kid, "b64": False, "crit": ["b64"]})
    text = as_json(good_claims()).decode()
    refused_unchecked(f"{b64(raw)}.{text}.{signature}", "three parts")


def test_rfc8725_3_10_keys_and_urls_in_the_header_are_ignored() -> None:
    # Signed with an untrusted key that the header brings along, under its own kid and under a trusted one.
    untrusted = signer(kid="untrusted")
    for brought in (
        {"jwk": untrusted.jwk()},
        {"jku": "https://evil.test/jwks.json"},
        {"x5u": "https://evil.test/cert.pem"},
        {"x5c": [b64(untrusted.pem())]},
        {"jwk": untrusted.jwk(), "jku": "http://169.254.169.254/latest", "x5t": "abc"},
    ):
        assert "no key" in refusal(untrusted.token(**brought)).detail
        assert refusal(untrusted.token(**brought, kid=signer().kid)).forged
        # A valid token stays valid with them.
        assert verify(signer().token(**brought))


@pytest.mark.parametrize(
    "kid",
    [
        "../../../../dev/null", "/etc/passwd", "file:///dev/null", "https://evil.test/key", "' OR '1'='1",
        "x' UNION SELECT 'secret'; --", "\0", "key-RS256\0", "key-RS256 ", "KEY-RS256", "${jndi:ldap://x}",
        "| id", "\r\nX: y", "k\u0435y-RS256", "", "x" * 256,
    ],
)  # fmt: skip
def test_rfc8725_3_10_a_kid_is_only_looked_up(kid: str) -> None:
    error = refusal(signer().token(kid=kid))
    assert error.detail == "the issuer has no key with the token's kid and alg"
    # A key with that kid may appear later.
    assert not error.permanent
    assert not error.forged


@pytest.mark.parametrize("kid", [1, True, None, [], ["key-RS256"], {"a": 1}, 1.5, "x" * 257])
def test_rfc7515_4_1_4_kid_must_be_text(kid: object) -> None:
    head = {"typ": "at+jwt", "alg": "RS256", "kid": kid}
    refused_unchecked(signer().signed(json.dumps(head).encode(), as_json(good_claims())), "kid")


def test_without_kid_the_only_key_of_the_algorithm_is_used() -> None:
    assert verify(signer().token(kid=None)).key.kid == "key-RS256"
    two = StaticKeys([signer().key(), signer(kid="second").key()])
    assert not refusal(signer().token(kid=None), keys=two).permanent


@pytest.mark.parametrize("cty", ["JWT", "application/jwt", "", None])
def test_rfc7519_5_2_nested_tokens(cty: object) -> None:
    head = {"typ": "at+jwt", "alg": "RS256", "kid": signer().kid, "cty": cty}
    refused_unchecked(signer().signed(json.dumps(head).encode(), as_json(good_claims())), "cty")


def test_an_encrypted_token() -> None:
    head = b64(as_json({"alg": "RSA-OAEP", "enc": "A256GCM"}))
    refused_unchecked(f"{head}.YWJj.YWJj.YWJj.YWJj", "three parts")
    refused_unchecked(unsigned(as_json({"alg": "dir", "enc": "A256GCM"}), as_json(good_claims())), "alg")


# Token types


@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "application/at+jwt", "Application/At+Jwt"])
def test_rfc9068_4_typ_of_an_access_token(typ: str) -> None:
    assert verify(signer().token(typ=typ))
    assert verify(signer().token(typ=typ), relaxed())


@pytest.mark.parametrize(
    "typ",
    [None, "", "JWT", "jwt", "at", "at+jwt ", "at+jwt;v=1", "text/at+jwt", "logout+jwt", "dpop+jwt", 1, [],
     "application/application/at+jwt", "\u0430t+jwt"],
)  # fmt: skip
def test_rfc9068_4_any_other_typ(typ: object) -> None:
    refused_unchecked(signer().token(typ=typ), "typ")


@pytest.mark.parametrize("typ", [None, "JWT", "jwt", "application/jwt"])
def test_typ_may_be_relaxed_for_issuers_that_do_not_send_it(typ: str | None) -> None:
    assert verify(signer().token(typ=typ), relaxed())


@pytest.mark.parametrize(
    "typ", ["logout+jwt", "secevent+jwt", "dpop+jwt", "token-introspection+jwt", 1, [], {}, True]
)
def test_rfc8725_3_11_other_token_types_stay_refused(typ: object) -> None:
    refused_unchecked(signer().token(typ=typ), "typ", relaxed())


@pytest.mark.parametrize(
    "mark",
    [{"nonce": "n"}, {"at_hash": "h"}, {"c_hash": "h"}, {"nonce": 1}, {"typ": "ID"}, {"typ": "Refresh"},
     {"token_use": "id"}, {"token_use": []}],
)  # fmt: skip
def test_rfc9068_5_an_id_token_is_not_an_access_token(mark: dict[str, object]) -> None:
    refused_unchecked(signer().token(mark, typ="JWT"), "typ")
    refused_unchecked(signer().token(mark, typ="JWT"), "not an access token", relaxed())


def test_rfc9068_5_an_id_token_lacks_required_claims() -> None:
    claims = {name: good_claims()[name] for name in ("iss", "aud", "sub", "iat", "exp")}
    head = as_json({"typ": "JWT", "alg": "RS256", "kid": signer().kid})
    refused_unchecked(signer().signed(head, as_json(claims)), "client_id", relaxed())


# Claims


@pytest.mark.parametrize("name", ["iss", "exp", "aud", "sub", "client_id", "iat", "jti"])
def test_rfc9068_2_2_required_claims(name: str) -> None:
    refused_unchecked(signer().token({name: None}), name)
    null = {**good_claims(), name: None}
    head = as_json({"typ": "at+jwt", "alg": "RS256", "kid": signer().kid})
    refused_unchecked(signer().signed(head, json.dumps(null).encode()), name)


def test_exp_and_aud_are_always_required() -> None:
    few = auth_settings(Issuer(issuer=ISSUER, name="test", required_claims=("iss",)))
    dropped: dict[str, object] = dict.fromkeys(("client_id", "iat", "jti"))
    assert verify(signer().token(dropped), few)
    for name in ("exp", "aud", "sub"):
        refused_unchecked(signer().token({name: None}), name, few)


@pytest.mark.parametrize(
    "iss",
    [
        "https://issuer.test/", "https://ISSUER.test", "http://issuer.test", "https://issuer.test.evil.test",
        "https://issuer.test@evil.test", " https://issuer.test", "https://issuer.test\0", "", "https://\u0456ssuer.test",
        1, True, ["https://issuer.test"], {"https://issuer.test": 1}, [],
    ],
)  # fmt: skip
def test_rfc9068_4_iss_must_match_exactly(iss: object) -> None:
    refused_unchecked(signer().token({"iss": iss}), "iss")


@pytest.mark.parametrize("aud", [AUDIENCE, [AUDIENCE], ["https://a.test", AUDIENCE]])
def test_rfc9068_4_aud_contains_this_server(aud: object) -> None:
    assert verify(signer().token({"aud": aud}))


def test_one_of_several_audiences_is_enough() -> None:
    assert verify(signer().token(), auth_settings(audience=("https://old.test", AUDIENCE)))


@pytest.mark.parametrize(
    "aud",
    [
        "https://other.test", AUDIENCE + "/", AUDIENCE.upper(), AUDIENCE[:-1], f"{AUDIENCE} https://other.test",
        "", [], ["https://other.test"], [[AUDIENCE]], [AUDIENCE, 1], [AUDIENCE, None], {AUDIENCE: 1},
        1, 1.5, True, False, [None],
    ],
)  # fmt: skip
def test_rfc9068_4_another_or_malformed_aud(aud: object) -> None:
    refused_unchecked(signer().token({"aud": aud}), "aud")


@pytest.mark.parametrize("name", ["sub", "client_id", "jti"])
@pytest.mark.parametrize("value", [1, True, [], ["a"], {"a": 1}, 1.5])
def test_rfc7519_4_1_text_claims_must_be_text(name: str, value: object) -> None:
    refused_unchecked(signer().token({name: value}), name)


@pytest.mark.parametrize("late_s", [0, 9.999])
def test_rfc9068_4_exp_within_the_leeway(late_s: float) -> None:
    assert verify(signer().token({"exp": NOW_S}), now_s=NOW_S + late_s)


@pytest.mark.parametrize("late_s", [10, 11, 1e6])
def test_rfc9068_4_expired(late_s: float) -> None:
    error = refusal(signer().token({"exp": NOW_S}), now_s=NOW_S + late_s)
    assert error.detail == "the token has expired"
    # A clock that was ahead may be set back.
    assert not error.permanent
    assert not error.forged


@pytest.mark.parametrize("name", ["nbf", "iat"])
def test_rfc7519_4_1_5_not_valid_yet(name: str) -> None:
    token = signer().token({name: NOW_S + 100})
    error = refusal(token, now_s=NOW_S + 89)
    assert name in error.detail
    # The refusal is not permanent.
    assert not error.permanent
    assert verify(token, now_s=NOW_S + 90)


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
@pytest.mark.parametrize(
    "value",
    ["1700000600", "now", "", True, False, [], [1700000600], {}, {"$gt": 0}, 10**400, -(10**400),
     2**53 + 1, 1e300],
)  # fmt: skip
def test_rfc7519_2_times_must_be_numbers(name: str, value: object) -> None:
    refused_unchecked(signer().token({name: value}), name)


@pytest.mark.parametrize(
    "written", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" * 5000, "0x7fffffff", "01"]
)
@pytest.mark.parametrize("name", ["exp", "nbf", "iat", "anything"])
def test_rfc8259_6_invalid_numbers(name: str, written: str) -> None:
    payload = as_json({**good_claims(), name: "HERE"}).replace(b'"HERE"', written.encode())
    head = as_json({"typ": "at+jwt", "alg": "RS256", "kid": signer().kid})
    refused_unchecked(signer().signed(head, payload), "JSON")


def test_times_may_have_fractions() -> None:
    assert verify(signer().token({"exp": NOW_S + 0.5})).expires_s == NOW_S + 10.5


def test_times_are_checked_again_after_a_fetch() -> None:
    now_s = NOW_S

    class Slow(StaticKeys):
        async def find(self, kid: str | None, algorithm: str) -> Key | None:
            nonlocal now_s
            now_s += 20
            return await super().find(kid, algorithm)

    verifier = TokenVerifier(auth_settings(), {ISSUER: Slow([signer().key()])}, lambda: now_s)
    with pytest.raises(TokenError, match="expired"):
        asyncio.run(verifier.verify(signer().token({"exp": NOW_S + 1})))


def test_unavailable_keys_are_not_a_token_error() -> None:
    class NoKeys(StaticKeys):
        async def find(self, kid: str | None, algorithm: str) -> Key | None:
            raise KeysUnavailableError(3.0)

    verifier = TokenVerifier(auth_settings(), {ISSUER: NoKeys([])}, lambda: NOW_S)
    with pytest.raises(KeysUnavailableError) as caught:
        asyncio.run(verifier.verify(signer().token()))
    assert caught.value.retry_after_s == 3.0
    # A token that is invalid for another reason does not wait for keys.
    with pytest.raises(TokenError):
        asyncio.run(verifier.verify(signer().token({"aud": "x"})))


# Tenants


@pytest.mark.parametrize("name", ["alice", "tenant/7", "M\u00fcller & S\u00f6hne", "x" * 256])
def test_tenant_names(name: str) -> None:
    assert verify(signer().token({"sub": name})).claims["sub"] == name


@pytest.mark.parametrize(
    "name",
    ["", "x" * 257, "a\nb", "a\0", "a\x1b[31m", "\u202ealice", "a\u200bb", "\ud800", "a\u2028b", "\x7f"],
)
def test_unprintable_tenant_names(name: str) -> None:
    error = refusal(signer().token({"sub": name}))
    assert not error.forged
    by_claim = auth_settings(Issuer(issuer=ISSUER, name="test", tenant_claim="org"))
    assert not refusal(signer().token({"org": name}), by_claim).forged


@pytest.mark.parametrize("value", [None, 1, True, [], ["a"], {"a": 1}])
def test_the_tenant_claim_must_be_text(value: object) -> None:
    by_claim = auth_settings(Issuer(issuer=ISSUER, name="test", tenant_claim="org"))
    refused_unchecked(signer().token({"org": value}), "org", by_claim)


def test_the_tenant_claim_may_be_nested() -> None:
    inside = auth_settings(Issuer(issuer=ISSUER, name="test", tenant_claim="org.id"))
    assert verify(signer().token({"org": {"id": "acme"}}), inside)
    refused_unchecked(signer().token({"org": {"name": "acme"}}), "org.id", inside)
    refused_unchecked(signer().token({"org": "acme"}), "org.id", inside)


def test_a_claim_by_name_or_path() -> None:
    claims = {"a": {"b": {"c": 1}}, "https://x.test/org": "named", "a.b": "whole"}
    assert claim_at(claims, "https://x.test/org") == "named"
    assert claim_at(claims, "a.b") == "whole"
    assert claim_at(claims, "a.b.c") == 1
    assert claim_at(claims, "a.x") is None
    assert claim_at(claims, "a.b.c.d") is None


# Syntax


def test_rfc8725_the_size_is_limited() -> None:
    auth = auth_settings(max_token_bytes=2000)
    size = len(signer().token({"pad": ""}))
    fits = signer().token({"pad": "x" * ((2000 - size) * 3 // 4)})
    assert 1990 < len(fits) <= 2000
    assert verify(fits, auth)
    refused_unchecked(signer().token({"pad": "x" * 1500}), "more than 2000 bytes", auth)
    refused_unchecked("a" * 10_000_000, "more than 8192 bytes")


@pytest.mark.parametrize(
    "token",
    ["", ".", "..", "...", "a", "a.b", "a.b.c.d", "a..c", ".b.c", "a.b.", "Bearer", "a.b.c\n", "a b.c.d"],
)
def test_rfc7515_7_1_three_parts(token: str) -> None:
    refused_unchecked(token, "three parts")


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    "added", ["=", "==", "+", "/", " ", "\n", "\0", "%", "\u00e9", "\uff21", "\u212a", "\ud800", "."]
)
def test_rfc7515_2_base64url_only(index: int, added: str) -> None:
    parts = signer().token().split(".")
    parts[index] += added
    assert "three parts" in refusal(".".join(parts)).detail


@pytest.mark.parametrize("index", [0, 1, 2])
def test_rfc4648_3_5_only_the_canonical_encoding(index: int) -> None:
    # In the last character of each part some bits are unused; they must be 0.
    parts = signer().token({"pad": ""}).split(".")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    spare = {0: 1, 2: 16, 3: 4}[len(parts[index]) % 4]
    if spare == 1:
        # No unused bits: add a character instead.
        parts[index] += "A"
    else:
        last = alphabet.index(parts[index][-1])
        assert last % spare == 0
        parts[index] = parts[index][:-1] + alphabet[last + 1]
    error = refusal(".".join(parts))
    assert "base64url" in error.detail
    assert not error.forged


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b'"text"', b"null", b"1", b"{", b"{}{}", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}",
     b'{"a":"\xff"}', b'{"a":\'b\'}', b'{"a":1,}', b"{a:1}", b'{"a":"\xed\xa0\x80"}', b'{"a":"\\ud800"}',
     b'{"a":"\n"}', b"\0{}"],
)  # fmt: skip
def test_rfc7519_7_2_header_and_payload_are_json_objects(text: bytes) -> None:
    good_head = as_json({"typ": "at+jwt", "alg": "RS256", "kid": signer().kid})
    error = refusal(signer().signed(good_head, text))
    assert not error.forged
    assert not refusal(signer().signed(text, as_json(good_claims()))).forged


@pytest.mark.parametrize("claims", [{"scope": "\ud800"}, {"x": [{"\udfff": 1}]}, {"jti": "a\udc00\ud800"}])
def test_rfc8259_8_2_unpaired_surrogates(claims: dict[str, Any]) -> None:
    refused_unchecked(signer().token(claims), "JSON")
    refused_unchecked(signer().token(x=claims), "JSON")
    # A complete pair is one character.
    assert verify(signer().token({"scope": "\U0001f600"}))


def test_rfc7515_4_duplicate_header_members() -> None:
    claims = as_json(good_claims())
    for head in (
        b'{"alg":"none","typ":"at+jwt","kid":"key-RS256","alg":"RS256"}',
        b'{"alg":"RS256","typ":"at+jwt","kid":"key-RS256","alg":"RS256"}',
        b'{"alg":"RS256","typ":"at+jwt","kid":"evil","kid":"key-RS256"}',
        b'{"alg":"RS256","typ":"at+jwt","kid":"key-RS256","\\u006bid":"key-RS256"}',
        b'{"alg":"RS256","typ":"at+jwt","kid":"key-RS256","x":{"y":[{"a":1,"a":2}]}}',
    ):
        refused_unchecked(signer().signed(head, claims), "twice")


@pytest.mark.parametrize(
    "twice",
    ['"sub":"mallory"', '"aud":"x"', '"exp":9999999999', '"s\\u0075b":"mallory"', '"x":{"a":1,"a":1}',
     '"x":[[{"a":1,"a":2}]]'],
)  # fmt: skip
def test_rfc7519_4_duplicate_claims(twice: str) -> None:
    head = as_json({"typ": "at+jwt", "alg": "RS256", "kid": signer().kid})
    text = as_json(good_claims()).decode()
    for payload in (f"{text[:-1]},{twice}}}", f"{{{twice},{text[1:]}"):
        refused_unchecked(signer().signed(head, payload.encode()), "twice")


@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting(opened: str, closed: str) -> None:
    auth = auth_settings(max_token_bytes=65536)
    head = as_json({"typ": "at+jwt", "alg": "RS256", "kid": signer().kid})
    for depth in (900, 8000):
        deep = (opened * depth + "1" + closed * depth).encode()
        for payload in (deep, as_json({**good_claims(), "x": "HERE"}).replace(b'"HERE"', deep)):
            try:
                verify(signer().signed(head, payload), auth)
            except TokenError as error:
                assert not error.forged  # noqa: PT017 - whether Python can read it depends on its version
        assert not refusal(signer().signed(deep, as_json(good_claims())), auth).forged
    surrogates = f'{{"x":"\\u0041","y":{"[" * 8000}1{"]" * 8000}}}'.encode()
    assert not refusal(signer().signed(head, surrogates), auth).forged


def test_rfc6750_5_2_no_refusal_quotes_the_token() -> None:
    word = "QUOTED"
    head = {"typ": "at+jwt", "alg": "RS256", "kid": signer().kid}
    tokens = [signer().token({name: word}) for name in ("iss", "aud", "exp", "nbf", "iat")]
    tokens += [signer().token({name: [word]}) for name in ("sub", "jti", "client_id")]
    tokens += [signer().token({"sub": word + "\n"}), signer().token({"sub": word * 100})]
    tokens += [signer().token(None, **{name: word}) for name in ("kid", "alg", "typ", "crit", "b64", "cty")]
    tokens += [signer().signed(word.encode(), b"{}"), signer().signed(as_json(head), word.encode())]
    tokens += [
        signer().signed(as_json(head), f'{{"{word}":1,"{word}":1}}'.encode()),
        f"{word}.{word}.{word}",
        word,
    ]
    start, _, _ = signer().token({"jti": word}).rpartition(".")
    tokens.append(f"{start}.{b64(word.encode())}")
    for token in tokens:
        error = refusal(token)
        assert word not in str(error)
        assert b64(word.encode()) not in error.detail
        # Exception chains may be logged, so they must not contain it either.
        assert error.__cause__ is None
        assert error.__suppress_context__ or error.__context__ is None


# Random input

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([ISSUER, AUDIENCE]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_HEADERS = st.dictionaries(
    st.sampled_from(["alg", "typ", "kid", "crit", "b64", "cty", "jwk", "jku", "x5u", "x5c", "zip"]), _VALUES
)
_CLAIMS = st.dictionaries(
    st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "jti", "client_id", "scope", "nonce", "typ"]),
    _VALUES,
)


def accepted_or_refused(token: str, auth: AuthSettings | None = None) -> None:
    """Verify a token; any exception but TokenError fails the test."""
    try:
        verify(token, auth)
    except TokenError as error:
        error.detail.encode("ascii")


@examples(100)
@given(token=st.text() | st.from_regex(r"[A-Za-z0-9_\-]{0,20}(\.[A-Za-z0-9_\-=]{0,20}){0,5}", fullmatch=True))
def test_random_text_is_refused(token: str) -> None:
    assert not refusal(token).forged


@examples(100)
@given(header=st.binary(), payload=st.binary(), signature=st.binary(min_size=1))
def test_random_bytes_as_parts_are_refused(header: bytes, payload: bytes, signature: bytes) -> None:
    assert not refusal(unsigned(header, payload, signature)).forged


@examples(100)
@given(header=_HEADERS, claims=_CLAIMS)
def test_random_json_in_a_signed_token_is_accepted_or_refused(
    header: dict[str, Any], claims: dict[str, Any]
) -> None:
    base = {"typ": "at+jwt", "alg": "ES256", "kid": signer("ES256").kid}
    token = signer("ES256").signed(
        json.dumps({**base, **header}).encode(), json.dumps({**good_claims(), **claims}).encode()
    )
    accepted_or_refused(token)
    accepted_or_refused(token, relaxed(required_claims=("iss",)))


@examples(100)
@given(data=st.data())
def test_a_token_changed_anywhere_is_refused(data: st.DataObject) -> None:
    token = signer("ES256").token()
    at = data.draw(st.integers(0, len(token) - 1))
    instead = data.draw(st.characters(max_codepoint=0x17F).filter(lambda one: one != token[at]))
    refusal(token[:at] + instead + token[at + 1 :])


@examples(100)
@given(
    claims=st.fixed_dictionaries(
        {},
        optional={
            "aud": st.sampled_from([AUDIENCE, [AUDIENCE], [], "x", None, ["x", AUDIENCE], [1, AUDIENCE]]),
            "iss": st.sampled_from([ISSUER, "x", None, [ISSUER]]),
            "exp": st.integers(int(NOW_S) - 20, int(NOW_S) + 20),
            "nbf": st.integers(int(NOW_S) - 20, int(NOW_S) + 20),
            "jti": st.sampled_from(["1", 1, None]),
            "sub": st.sampled_from(["a", 1, None]),
        },
    )
)
def test_pyjwt_accepts_every_accepted_token(claims: dict[str, Any]) -> None:
    now_s = NOW_S
    token = signer("ES256").token(claims)
    try:
        verified = verify(token, now_s=now_s)
    except TokenError:
        return
    # PyJWT reads the real clock, so its time checks are off.
    options: Any = {"verify_exp": False, "verify_nbf": False, "verify_iat": False, "require": ["exp", "sub"]}
    key = signer("ES256").private.public_key()
    assert verified.claims == jwt.decode(token, key, ["ES256"], options, audience=AUDIENCE, issuer=ISSUER)
