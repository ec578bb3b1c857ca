"""An issuer's keys: which are taken, when they are fetched, and what an outage or a flood changes."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm

from cobatch.server.auth.fetch import Fetched
from cobatch.server.auth.jwks import FetchedKeys, KeysUnavailableError, StaticKeys
from cobatch.server.auth.keys import Key, load_key_files, load_secret, parse_jwks
from cobatch.server.settings.auth import REQUIRED_CLAIMS, Issuer
from cobatch.server.settings.values import SettingsError
from tests.support.auth.tokens import ISSUER, SECRET, Signer, auth_settings, b64, jwks, rsa_key, signer
from tests.support.virtual import loop as virtual

ALL = ("RS256", "PS256", "ES256", "EdDSA")
JWKS_URL = "https://issuer.test/jwks"


def parsed(*keys: Any, algorithms: tuple[str, ...] = ALL) -> list[tuple[str | None, str]]:
    """Name and algorithm of what is taken from a set of these."""
    found = parse_jwks(json.dumps({"keys": keys}).encode(), algorithms)
    return [(key.kid, key.algorithm) for key in found]


# Which keys are taken


@pytest.mark.parametrize("algorithm", ALL)
def test_rfc7517_4_4_a_key_with_alg(algorithm: str) -> None:
    good = signer(algorithm)
    assert parsed(good.jwk()) == [(good.kid, algorithm)]
    (key,) = parse_jwks(jwks(good), ALL)
    assert key.material == good.private.public_key()


def test_rfc8725_3_1_one_algorithm_for_a_key_without_alg() -> None:
    nameless = [signer(name).jwk(alg=None) for name in ("RS256", "ES256", "EdDSA")]
    assert [algorithm for _, algorithm in parsed(*nameless)] == ["RS256", "ES256", "EdDSA"]
    # The first that fits, as the configuration has them.
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
def test_rfc7517_5_keys_for_something_else_are_skipped(members: dict[str, object]) -> None:
    bad = {**signer("RS256").jwk(), **members}
    good = signer("ES256").jwk()
    for keys in ([bad, good], [good, bad]):
        assert parsed(*keys) == [("key-ES256", "ES256")]


@pytest.mark.parametrize("kind", ["RS256", "PS256", "ES256", "EdDSA"])
def test_rfc7517_4_what_is_missing_or_broken(kind: str) -> None:
    good = signer(kind).jwk()
    for name in {"kty", "n", "e", "crv", "x", "y"} & good.keys():
        assert parsed({other: good[other] for other in good if other != name}) == []
        values: list[object] = [None, 1, [], {}, "", "!", "A"]
        if kind != "EdDSA":
            # Of any 32 bytes an Ed25519 key can be made.
            values += [b64(b"\0" * 32), b64(b"\xff" * 32)]
        for value in values:
            assert parsed({**good, name: value}) == []


@pytest.mark.parametrize("junk", [None, 1, "text", [], {}, True])
def test_rfc7517_5_what_is_no_key(junk: object) -> None:
    assert parsed(junk, signer().jwk()) == [("key-RS256", "RS256")]


def test_rfc8725_3_5_weak_rsa_keys() -> None:
    for bits in (1024, 2047):
        assert parsed(Signer(rsa_key("weak", bits), "RS256", "weak").jwk()) == []
    # Nor absurdly large ones, which would take long for each token.
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


def test_rfc8725_3_4_a_point_that_is_not_on_the_curve() -> None:
    good = signer("ES256").jwk()
    assert parsed({**good, "y": good["x"]}) == []


@pytest.mark.parametrize("alg", ["HS256", None, "RS256"])
def test_rfc8725_3_1_no_secret_from_a_public_set(alg: str | None) -> None:
    jwk = {"kty": "oct", "k": b64(SECRET), "kid": "x", **({"alg": alg} if alg else {})}
    assert parsed(jwk, algorithms=("HS256",)) == []
    assert parsed(jwk, algorithms=(*ALL, "HS256")) == []


def test_rfc8725_3_1_hs256_takes_no_public_key() -> None:
    assert parsed(*(signer(name).jwk(alg=None) for name in ALL), algorithms=("HS256",)) == []
    assert parsed(signer().jwk(alg="HS256"), algorithms=("HS256",)) == []


@pytest.mark.parametrize("algorithm", ALL)
def test_private_members_are_left_behind(algorithm: str, caplog: pytest.LogCaptureFixture) -> None:
    private = signer(algorithm).private_jwk()
    (key,) = parse_jwks(json.dumps({"keys": [private]}).encode(), ALL)
    assert not hasattr(key.material, "sign")
    assert "private part" in caplog.text
    assert private["d"] not in caplog.text


def test_of_two_keys_with_one_name_the_first_counts(caplog: pytest.LogCaptureFixture) -> None:
    first, second = signer(kid="first"), Signer(signer(kid="second").private, "RS256", "first")
    (key,) = parse_jwks(jwks(first, second), ALL)
    assert key.material == first.private.public_key()
    assert "twice" in caplog.text
    # RFC 7517, 4.5: but one name for keys of different kinds is one key of each.
    assert parsed(first.jwk(), signer("ES256").jwk(kid="first")) == [("first", "RS256"), ("first", "ES256")]


def test_logs_name_keys_and_show_none(caplog: pytest.LogCaptureFixture) -> None:
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
def test_rfc7517_5_1_no_jwk_set(text: bytes) -> None:
    with pytest.raises(ValueError, match="it is"):
        parse_jwks(text, ALL)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_jwk_is_a_key_or_skipped(data: st.DataObject) -> None:
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


def test_key_files_together(tmp_path: Path) -> None:
    pem = write(tmp_path, "a.pem", signer("PS256").pem())
    several = write(tmp_path, "b.json", jwks(signer("ES256"), signer("EdDSA")))
    keys = load_key_files([pem, several], ("PS256", "ES256", "EdDSA"))
    assert [(key.kid, key.algorithm) for key in keys] == [
        (None, "PS256"),
        ("key-ES256", "ES256"),
        ("key-EdDSA", "EdDSA"),
    ]


def test_two_keys_that_no_token_could_tell_apart(tmp_path: Path) -> None:
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


def test_key_files_that_are_none(tmp_path: Path) -> None:
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


def test_rfc7518_3_2_a_secret_is_long_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in (SECRET, SECRET + b"\n", SECRET + b"\r\n"):
        key = load_secret(write(tmp_path, "secret", text))
        assert (key.kid, key.algorithm, key.material) == (None, "HS256", SECRET)
    # Only one newline is an editor's.
    assert load_secret(write(tmp_path, "secret", SECRET + b"\n\n")).material == SECRET + b"\n"
    assert not caplog.records
    for text in (b"", b"short", SECRET[:-1], SECRET[:-1] + b"\n"):
        with pytest.raises(SettingsError, match="fewer than 32") as caught:
            load_secret(write(tmp_path, "secret", text))
        assert "short" not in str(caught.value)
    with pytest.raises(SettingsError, match="cannot read"):
        load_secret(tmp_path / "missing")


def test_a_secret_that_others_can_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_secret(write(tmp_path, "secret", SECRET, 0o644))
    assert "chmod 600" in caplog.text
    assert SECRET.decode() not in caplog.text


def test_rfc8725_2_1_a_public_key_is_no_secret(tmp_path: Path) -> None:
    for text in (signer().pem(), signer().private_pem(), json.dumps(signer().jwk()).encode()):
        with pytest.raises(SettingsError, match="not a secret"):
            load_secret(write(tmp_path, "secret", text))


# Keys from files


async def test_static_keys() -> None:
    keys = StaticKeys([signer().key(), signer("ES256").key()])
    await keys.start()
    assert keys.ready
    assert (await keys.find("key-RS256", "RS256")) is keys.get("key-RS256", "RS256") is not None
    for kid, algorithm in (("key-RS256", "ES256"), ("unknown", "RS256"), (None, "EdDSA"), ("", "RS256")):
        assert await keys.find(kid, algorithm) is None
    await keys.stop()


def test_a_key_without_a_name_serves_any_unknown_name() -> None:
    pem = Key(None, "RS256", signer().private.public_key())
    keys = StaticKeys([pem, signer(kid="named").key()])
    assert keys.get("issuers-own-name", "RS256") is pem
    named = keys.get("named", "RS256")
    assert named is not None
    assert named is not pem
    assert keys.get("named", "ES256") is None
    assert keys.get("issuers-own-name", "ES256") is None
    # Without a name in the token there are two to choose from.
    assert keys.get(None, "RS256") is None


# Keys that are fetched, in virtual time


class FakeIssuer:
    """Publishes `keys`; a fetch takes `takes_s`, and fails while there is an `error`."""

    def __init__(self, *keys: Signer) -> None:
        self.body = jwks(*keys)
        self.max_age_s: float | None = None
        self.takes_s = 0.0
        self.error: Exception | None = None
        self.calls: list[float] = []
        self.withdrawn: list[str | None] = []
        self.open = 0

    async def fetch(self, url: str) -> Fetched:
        assert url == JWKS_URL
        assert not self.open, "two fetches at once"
        self.open += 1
        try:
            self.calls.append(asyncio.get_running_loop().time())
            await asyncio.sleep(self.takes_s)
            if self.error is not None:
                raise self.error
            return Fetched(self.body, self.max_age_s)
        finally:
            self.open -= 1

    def keys(self, **auth: float) -> FetchedKeys:
        one = Issuer(issuer=ISSUER, name="test", jwks_url=JWKS_URL)
        clock = asyncio.get_running_loop().time
        return FetchedKeys(
            one,
            auth_settings(one, **auth),
            lambda key: self.withdrawn.append(key.kid),
            self.fetch,
            clock,
        )


def in_virtual_time(main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await main()

    virtual.run(run())


async def start(issuer: FakeIssuer, **auth: float) -> FetchedKeys:
    """Running, with the first keys."""
    keys = issuer.keys(**auth)
    await keys.start()
    assert await keys.find("first", "RS256") is not None
    return keys


def first() -> Signer:
    return signer(kid="first")


def second() -> Signer:
    return signer(kid="second")


def test_the_first_tokens_wait_for_the_first_keys() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.takes_s = 2.0
        keys = issuer.keys()
        assert not keys.ready
        await keys.start()
        await keys.start()  # again changes nothing
        found = await asyncio.gather(*(keys.find("first", "RS256") for _ in range(10)))
        assert len(set(found)) == 1
        assert found[0] is not None
        assert keys.ready
        assert keys.get("first", "RS256") is found[0]
        assert issuer.calls == [0.0]
        await keys.stop()

    in_virtual_time(main)


def test_keys_are_fetched_even_if_nobody_started() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = issuer.keys()
        assert await keys.find("first", "RS256") is not None
        await keys.stop()

    in_virtual_time(main)


def test_rfc7517_4_5_by_kid_and_alg() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first(), second(), signer("ES256"))
        keys = await start(issuer)
        await asyncio.sleep(100)
        calls = len(issuer.calls)
        assert await keys.find("first", "PS256") is None
        assert await keys.find("first", "ES256") is None
        assert await keys.find(None, "RS256") is None  # two
        assert await keys.find(None, "EdDSA") is None  # none
        only = await keys.find(None, "ES256")
        assert only is not None
        assert only.kid == "key-ES256"
        # None of these names was unknown.
        assert len(issuer.calls) == calls
        await keys.stop()

    in_virtual_time(main)


def test_rotation_with_overlap() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer)
        old = keys.get("first", "RS256")
        await asyncio.sleep(20)
        issuer.body = jwks(second(), first())
        new = await keys.find("second", "RS256")
        assert new is not None
        assert new.material == second().private.public_key()
        # The key that stays is the same object, for tokens are remembered by it.
        assert keys.get("first", "RS256") is old
        assert issuer.withdrawn == []
        issuer.body = jwks(second())
        await asyncio.sleep(300)
        assert keys.get("first", "RS256") is None
        assert keys.get("second", "RS256") is new
        assert issuer.withdrawn == ["first"]
        await keys.stop()

    in_virtual_time(main)


def test_new_material_under_an_old_name_is_a_new_key() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer)
        old = keys.get("first", "RS256")
        issuer.body = jwks(Signer(second().private, "RS256", "first"))
        await asyncio.sleep(300)
        new = keys.get("first", "RS256")
        assert new is not None
        assert new is not old
        assert issuer.withdrawn == ["first"]
        await keys.stop()

    in_virtual_time(main)


def test_an_unknown_kid_is_fetched_for_once_per_cool_down() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.takes_s = 0.5
        keys = await start(issuer, jwks_cooldown_s=10)
        good = keys.get("first", "RS256")
        names = (f"invented-{n}" for n in itertools.count())
        for _ in range(1000):
            assert await keys.find(next(names), "RS256") is None
            await asyncio.sleep(0.1)
            assert keys.get("first", "RS256") is good
        # 100 s and a few more in which fetches ran.
        spent_s = asyncio.get_running_loop().time()
        assert spent_s // 10 <= len(issuer.calls) <= spent_s // 10 + 1
        assert all(later - before >= 10 for before, later in itertools.pairwise(issuer.calls))
        assert issuer.withdrawn == []
        await keys.stop()

    in_virtual_time(main)


def test_at_the_end_of_the_cool_down() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer, jwks_cooldown_s=10)
        issuer.body = jwks(first(), second())
        await asyncio.sleep(9.999)
        assert await keys.find("second", "RS256") is None
        assert len(issuer.calls) == 1
        await asyncio.sleep(0.001)
        assert await keys.find("second", "RS256") is not None
        assert len(issuer.calls) == 2
        await keys.stop()

    in_virtual_time(main)


def test_all_who_do_not_know_a_kid_share_one_fetch() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer)
        await asyncio.sleep(20)
        issuer.body = jwks(first(), second())
        issuer.takes_s = 3.0
        waiting = [asyncio.create_task(keys.find("second", "RS256")) for _ in range(50)]
        waiting += [asyncio.create_task(keys.find(f"other-{n}", "RS256")) for n in range(50)]
        await asyncio.sleep(1)
        # Who has a good token does not wait.
        assert keys.get("first", "RS256") is await keys.find("first", "RS256")
        assert asyncio.get_running_loop().time() == 21.0
        found = await asyncio.gather(*waiting)
        assert all(key is not None and key.kid == "second" for key in found[:50])
        assert found[50:] == [None] * 50
        assert len(issuer.calls) == 2
        await keys.stop()

    in_virtual_time(main)


def test_a_waiter_that_leaves_takes_nobody_along() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer)
        await asyncio.sleep(20)
        issuer.body = jwks(first(), second())
        issuer.takes_s = 3.0
        leaves, stays = (asyncio.create_task(keys.find("second", "RS256")) for _ in range(2))
        await asyncio.sleep(1)
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        assert (await stays) is not None
        assert len(issuer.calls) == 2
        await keys.stop()

    in_virtual_time(main)


def test_keys_are_refreshed_in_the_background() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer, jwks_refresh_s=300)
        await asyncio.sleep(3000)
        gaps = [later - before for before, later in itertools.pairwise(issuer.calls)]
        assert len(gaps) >= 10
        # A little early, and not all servers at once.
        assert all(270 <= gap <= 300 for gap in gaps)
        assert len(set(gaps)) > 1
        assert issuer.withdrawn == []
        await keys.stop()
        calls = len(issuer.calls)
        await asyncio.sleep(3000)
        assert len(issuer.calls) == calls

    in_virtual_time(main)


@pytest.mark.parametrize(
    ("max_age_s", "period_s"), [(100.0, 100.0), (1.0, 30.0), (0.0, 30.0), (86_400.0, 300.0), (None, 300.0)]
)
def test_max_age_makes_it_sooner_never_later(max_age_s: float | None, period_s: float) -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.max_age_s = max_age_s
        keys = await start(issuer, jwks_refresh_s=300)
        await asyncio.sleep(5 * period_s)
        gaps = [later - before for before, later in itertools.pairwise(issuer.calls)]
        assert all(0.9 * period_s <= gap <= period_s for gap in gaps)
        assert len(gaps) >= 4
        await keys.stop()

    in_virtual_time(main)


def test_an_outage_is_survived_within_the_bound() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        issuer = FakeIssuer(first())
        keys = await start(issuer, jwks_stale_s=3600)
        issuer.error = OSError("down")
        await asyncio.sleep(3600 - 0.001)
        assert keys.ready
        assert await keys.find("first", "RS256") is not None
        assert issuer.withdrawn == []
        await asyncio.sleep(0.001)
        assert loop.time() == 3600
        # The remembered tokens learn of it without anybody asking.
        await asyncio.sleep(0)
        assert issuer.withdrawn == ["first"]
        assert not keys.ready
        assert keys.get("first", "RS256") is None
        with pytest.raises(KeysUnavailableError) as caught:
            await keys.find("first", "RS256")
        assert 1.0 <= caught.value.retry_after_s <= 60.0
        # And when the issuer is back, so are its tokens.
        issuer.error = None
        await asyncio.sleep(60)
        assert await keys.find("first", "RS256") is not None
        assert keys.ready
        await keys.stop()

    in_virtual_time(main)


def test_keys_are_too_old_on_time_even_between_fetches() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = issuer.keys(jwks_stale_s=60)
        assert await keys.find("first", "RS256") is not None
        # Nothing runs in the background here.
        await asyncio.sleep(60)
        assert not keys.ready
        assert issuer.withdrawn == ["first"]
        await keys.stop()

    in_virtual_time(main)


def test_keys_are_refreshed_before_they_are_too_old_whatever_is_configured() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer, jwks_stale_s=60, jwks_refresh_s=300)
        await asyncio.sleep(1000)
        assert keys.ready
        assert issuer.withdrawn == []
        await keys.stop()

    in_virtual_time(main)


def test_failures_are_retried_ever_more_seldom() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.error = OSError("down")
        keys = issuer.keys()
        await keys.start()
        await asyncio.sleep(600)
        gaps = [later - before for before, later in itertools.pairwise(issuer.calls)]
        for gap, most in zip(gaps, [1, 2, 4, 8, 16, 32, *[60] * 20], strict=False):
            assert 0.9 * most <= gap <= most
        assert len(gaps) > 10
        issuer.error = None
        await asyncio.sleep(60)
        assert keys.ready
        # After a success, patience starts over.
        issuer.error = OSError("down")
        before = len(issuer.calls)
        await asyncio.sleep(305)
        assert len(issuer.calls) - before >= 3
        await keys.stop()

    in_virtual_time(main)


def test_without_any_keys_callers_are_told_when_to_come_back() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.error = OSError("down")
        keys = issuer.keys()
        await keys.start()
        for _ in range(200):
            with pytest.raises(KeysUnavailableError) as caught:
                await keys.find("first", "RS256")
            assert 1.0 <= caught.value.retry_after_s <= 60.0
            await asyncio.sleep(0.5)
        # 100 s: the backoff's 7 or 8, and at most one per cool-down because of callers.
        assert len(issuer.calls) <= 8 + 10
        await keys.stop()

    in_virtual_time(main)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"{}", b'{"keys":[]}', b'{"keys":[{"kty":"RSA"}]}',
     jwks(Signer(rsa_key("weak", 1024), "RS256"))],
)  # fmt: skip
def test_a_set_without_a_usable_key_replaces_none(body: bytes) -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer)
        good = keys.get("first", "RS256")
        issuer.body = body
        await asyncio.sleep(1000)
        assert keys.get("first", "RS256") is good
        assert issuer.withdrawn == []
        # It counts as a failure, so it is tried more often than every 300 s.
        assert len(issuer.calls) > 10
        await keys.stop()

    in_virtual_time(main)


def test_logs_say_what_failed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.error = TimeoutError()
        keys = issuer.keys()
        await keys.start()
        await asyncio.sleep(0.5)
        issuer.error = None
        await asyncio.sleep(5)
        await keys.stop()

    in_virtual_time(main)
    assert "no keys of issuer test: TimeoutError" in caplog.text
    assert "are available again" in caplog.text


def test_a_bug_in_a_fetch_ends_neither_the_waiters_nor_the_refreshing() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)
        issuer = FakeIssuer(first())
        issuer.error = RuntimeError("a bug")
        keys = issuer.keys()
        await keys.start()
        with pytest.raises(KeysUnavailableError):
            await keys.find("first", "RS256")
        issuer.error = None
        await asyncio.sleep(5)
        assert keys.ready
        await keys.stop()

    in_virtual_time(main)


def test_stopping_while_a_fetch_runs() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.takes_s = 1000.0
        keys = issuer.keys()
        await keys.stop()  # before it began
        await keys.start()
        waiting = asyncio.create_task(keys.find("first", "RS256"))
        await asyncio.sleep(1)
        await keys.stop()
        with pytest.raises(KeysUnavailableError):
            await waiting
        assert issuer.open == 0
        assert asyncio.get_running_loop().time() == 1.0
        await keys.stop()

    in_virtual_time(main)


def test_the_helpers_speak_of_what_the_settings_require() -> None:
    payload = signer().token().split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert set(REQUIRED_CLAIMS) <= claims.keys()
