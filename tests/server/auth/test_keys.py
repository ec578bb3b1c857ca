"""Reading keys: which keys of a JWK set, a PEM file or a secret file are accepted."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm

from cobatch.server.auth.keys import Key, load_key_files, load_secret, parse_jwks
from cobatch.server.settings.auth import REQUIRED_CLAIMS
from cobatch.server.settings.values import SettingsError
from tests.support.auth.tokens import SECRET, Signer, b64, jwks, rsa_key, signer
from tests.support.examples import examples

ALL = ("RS256", "PS256", "ES256", "EdDSA")


def parsed(*keys: Any, algorithms: tuple[str, ...] = ALL) -> list[tuple[str | None, str]]:
    """Return kid and algorithm of the accepted keys of a JWK set."""
    found = parse_jwks(json.dumps({"keys": keys}).encode(), algorithms)
    return [(key.kid, key.algorithm) for key in found]


# JWK sets


@pytest.mark.parametrize("algorithm", ALL)
def test_rfc7517_4_4_a_key_with_alg(algorithm: str) -> None:
    good = signer(algorithm)
    assert parsed(good.jwk()) == [(good.kid, algorithm)]
    (key,) = parse_jwks(jwks(good), ALL)
    assert key.material == good.private.public_key()


def test_rfc8725_3_1_one_algorithm_for_a_key_without_alg() -> None:
    nameless = [signer(name).jwk(alg=None) for name in ("RS256", "ES256", "EdDSA")]
    assert [algorithm for _, algorithm in parsed(*nameless)] == ["RS256", "ES256", "EdDSA"]
    # The first fitting algorithm, in the order of the configuration.
    assert parsed(nameless[0], algorithms=("ES256", "PS256", "RS256")) == [("key-RS256", "PS256")]
    assert parsed(nameless[0], algorithms=("ES256", "EdDSA")) == []


@pytest.mark.parametrize(
    "members",
    [
        {"use": "enc"}, {"use": ""}, {"use": 1}, {"use": []}, {"key_ops": []}, {"key_ops": ["sign"]},
        {"key_ops": "verify"}, {"key_ops": {"verify": 1}}, {"alg": "RS512"}, {"alg": "RSA-OAEP"},
        {"alg": "none"}, {"alg": "HS256"}, {"alg": "ES256"}, {"alg": "EdDSA"}, {"alg": 1}, {"alg": ["RS256"]},
        {"alg": ""},
        {"kid": 1}, {"kid": []}, {"kid": {}}, {"kid": True}, {"kid": "x" * 257},
        {"kty": "oct"}, {"kty": "rsa"}, {"kty": "EC"}, {"kty": "OKP"}, {"kty": 1}, {"kty": []}, {"kty": {}},
        {"n": 1}, {"n": ""}, {"n": "AA"}, {"n": "\u00e9"}, {"n": None}, {"e": 1}, {"e": ""}, {"e": "Ag"},
        {"e": "AQ"}, {"e": []}, {"e": "____________"},
    ],
)  # fmt: skip
def test_rfc7517_5_keys_for_other_uses_are_skipped(members: dict[str, object]) -> None:
    bad = {**signer("RS256").jwk(), **members}
    good = signer("ES256").jwk()
    for keys in ([bad, good], [good, bad]):
        assert parsed(*keys) == [("key-ES256", "ES256")]


@pytest.mark.parametrize("kind", ["RS256", "PS256", "ES256", "EdDSA"])
def test_rfc7517_4_missing_or_invalid_members(kind: str) -> None:
    good = signer(kind).jwk()
    for name in {"kty", "n", "e", "crv", "x", "y"} & good.keys():
        assert parsed({other: good[other] for other in good if other != name}) == []
        values: list[object] = [None, 1, [], {}, "", "!", "A"]
        if kind != "EdDSA":
            # Any 32 bytes are a valid Ed25519 key.
            values += [b64(b"\0" * 32), b64(b"\xff" * 32)]
        for value in values:
            assert parsed({**good, name: value}) == []


@pytest.mark.parametrize("junk", [None, 1, "text", [], {}, True])
def test_rfc7517_5_items_that_are_not_keys(junk: object) -> None:
    assert parsed(junk, signer().jwk()) == [("key-RS256", "RS256")]


def test_rfc8725_3_5_weak_rsa_keys() -> None:
    for bits in (1024, 2047):
        assert parsed(Signer(rsa_key("weak", bits), "RS256", "weak").jwk()) == []
    # A very large key would make each check slow.
    huge = {**signer().jwk(), "n": b64(b"\xff" * 1025)}
    assert parsed(huge) == []


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1()])
@pytest.mark.parametrize("alg", [None, "ES256"])
def test_rfc7518_3_4_other_curves(curve: ec.EllipticCurve, alg: str | None) -> None:
    public = ec.generate_private_key(curve).public_key()
    jwk = {**ECAlgorithm.to_jwk(public, as_dict=True), "kid": "x", **({"alg": alg} if alg else {})}
    assert parsed(jwk) == []


def test_rfc8037_2_other_curves() -> None:
    public = ed448.Ed448PrivateKey.generate().public_key()
    assert parsed({**OKPAlgorithm.to_jwk(public, as_dict=True), "kid": "x", "alg": "EdDSA"}) == []
    assert parsed({**signer("EdDSA").jwk(), "crv": "X25519"}) == []


def test_rfc8725_3_4_a_point_off_the_curve() -> None:
    good = signer("ES256").jwk()
    assert parsed({**good, "y": good["x"]}) == []


@pytest.mark.parametrize("alg", ["HS256", None, "RS256"])
def test_rfc8725_3_1_no_secret_from_a_public_jwk_set(alg: str | None) -> None:
    jwk = {"kty": "oct", "k": b64(SECRET), "kid": "x", **({"alg": alg} if alg else {})}
    assert parsed(jwk, algorithms=("HS256",)) == []
    assert parsed(jwk, algorithms=(*ALL, "HS256")) == []


def test_rfc8725_3_1_hs256_accepts_no_public_key() -> None:
    assert parsed(*(signer(name).jwk(alg=None) for name in ALL), algorithms=("HS256",)) == []
    assert parsed(signer().jwk(alg="HS256"), algorithms=("HS256",)) == []


@pytest.mark.parametrize("algorithm", ALL)
def test_private_members_are_dropped(algorithm: str, caplog: pytest.LogCaptureFixture) -> None:
    private = signer(algorithm).private_jwk()
    (key,) = parse_jwks(json.dumps({"keys": [private]}).encode(), ALL)
    assert not hasattr(key.material, "sign")
    assert "private part" in caplog.text
    assert private["d"] not in caplog.text


def test_the_first_of_two_keys_with_one_kid_is_used(caplog: pytest.LogCaptureFixture) -> None:
    first, second = signer(kid="first"), Signer(signer(kid="second").private, "RS256", "first")
    (key,) = parse_jwks(jwks(first, second), ALL)
    assert key.material == first.private.public_key()
    assert "twice" in caplog.text
    # RFC 7517, 4.5: keys of different types may share a kid.
    assert parsed(first.jwk(), signer("ES256").jwk(kid="first")) == [("first", "RS256"), ("first", "ES256")]


def test_logs_contain_kids_and_no_key_material(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    bad = signer().jwk(use="enc", kid="evil\nline")
    assert parsed(bad) == []
    assert "'evil\\nline'" in caplog.text
    assert bad["n"] not in caplog.text
    assert SECRET.decode() not in repr(Key("k", "HS256", SECRET))


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"null", b'"keys"', b'{"keys":{}}', b'{"keys":"x"}', b'{"keys":null}', b"<html>",
     b"\xff", b"[" * 100_000, b'{"keys":[' + b"[" * 100_000, b'{"keys":[],"n":' + b"1" * 5000 + b"}"],
)  # fmt: skip
def test_rfc7517_5_1_not_a_jwk_set(text: bytes) -> None:
    with pytest.raises(ValueError, match="it is"):
        parse_jwks(text, ALL)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@examples(100)
@given(data=st.data())
def test_any_jwk_is_accepted_or_skipped(data: st.DataObject) -> None:
    jwk = signer(data.draw(st.sampled_from(ALL))).jwk()
    name = data.draw(st.sampled_from([*jwk, "key_ops", "d", "x5c"]))
    parsed({**jwk, name: data.draw(_JSON)}, signer("ES256").jwk())


# Files


def write(folder: Path, name: str, text: bytes, mode: int = 0o600) -> Path:
    path = folder / name
    path.write_bytes(text)
    path.chmod(mode)
    return path


def file_refusal(path: Path, algorithms: tuple[str, ...] = ALL) -> str:
    with pytest.raises(SettingsError) as caught:
        load_key_files([path], algorithms)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_public_key_in_pem(tmp_path: Path, algorithm: str) -> None:
    (key,) = load_key_files([write(tmp_path, "a.pem", signer(algorithm).pem())], ALL)
    assert (key.kid, key.algorithm) == (None, algorithm)
    assert key.material == signer(algorithm).private.public_key()


def test_several_key_files(tmp_path: Path) -> None:
    pem = write(tmp_path, "a.pem", signer("PS256").pem())
    several = write(tmp_path, "b.json", jwks(signer("ES256"), signer("EdDSA")))
    keys = load_key_files([pem, several], ("PS256", "ES256", "EdDSA"))
    assert [(key.kid, key.algorithm) for key in keys] == [
        (None, "PS256"),
        ("key-ES256", "ES256"),
        ("key-EdDSA", "EdDSA"),
    ]


def test_two_keys_without_a_kid_for_one_algorithm(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{kid}.pem", signer(kid=kid).pem()) for kid in ("first", "second")]
    with pytest.raises(SettingsError, match="two keys for RS256 without a kid"):
        load_key_files(files, ALL)


def test_a_private_key_is_refused_with_advice(tmp_path: Path) -> None:
    for text in (signer().private_pem(), signer("ES256").private_pem() + signer("ES256").pem()):
        message = file_refusal(write(tmp_path, "a.pem", text))
        assert "a private key" in message
        assert "openssl pkey -in a.pem -pubout" in message


def test_rfc8725_3_5_weak_keys_in_files(tmp_path: Path) -> None:
    weak = Signer(rsa_key("weak", 1024), "RS256")
    assert "1024 bits" in file_refusal(write(tmp_path, "weak.pem", weak.pem()))
    curve = Signer(ec.generate_private_key(ec.SECP384R1()), "ES256")
    assert "secp384r1" in file_refusal(write(tmp_path, "curve.pem", curve.pem()))


def test_invalid_key_files(tmp_path: Path) -> None:
    other = dsa.generate_private_key(1024).public_key()
    spki = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for text, about in (
        (b"", "neither PEM nor a JWK set"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a public key"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "a certificate"),
        (spki, "not an RSA, P-256 or Ed25519 key"),
        (json.dumps(signer().jwk()).encode(), "not a JWK set"),
        (b'{"keys":[]}', "no key in it"),
        (jwks(signer("ES256")), "no key in it is for one of RS256"),
        (signer("ES256").pem(), "it is for ES256"),
    ):
        assert about in file_refusal(write(tmp_path, "file", text), ("RS256",))
    assert "No such file" in file_refusal(tmp_path / "missing")
    assert "Is a directory" in file_refusal(tmp_path)


def test_rfc7518_3_2_a_secret_has_at_least_32_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in (SECRET, SECRET + b"\n", SECRET + b"\r\n"):
        key = load_secret(write(tmp_path, "secret", text))
        assert (key.kid, key.algorithm, key.material) == (None, "HS256", SECRET)
    # Only one newline is removed.
    assert load_secret(write(tmp_path, "secret", SECRET + b"\n\n")).material == SECRET + b"\n"
    assert not caplog.records
    for text in (b"", b"short", SECRET[:-1], SECRET[:-1] + b"\n"):
        with pytest.raises(SettingsError, match="fewer than 32") as caught:
            load_secret(write(tmp_path, "secret", text))
        assert "short" not in str(caught.value)
    with pytest.raises(SettingsError, match="cannot read"):
        load_secret(tmp_path / "missing")


def test_a_secret_readable_by_other_users_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_secret(write(tmp_path, "secret", SECRET, 0o644))
    assert "chmod 600" in caplog.text
    assert SECRET.decode() not in caplog.text


def test_rfc8725_2_1_a_public_key_is_not_a_secret(tmp_path: Path) -> None:
    for text in (signer().pem(), signer().private_pem(), json.dumps(signer().jwk()).encode()):
        with pytest.raises(SettingsError, match="not a secret"):
            load_secret(write(tmp_path, "secret", text))


def test_tokens_of_the_test_issuer_have_all_required_claims() -> None:
    payload = signer().token().split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert set(REQUIRED_CLAIMS) <= claims.keys()
