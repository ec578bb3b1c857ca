"""The keys that tokens are checked with, and where they come from: JWK sets, PEM files, a secret file.

One key, one algorithm (RFC 8725, 3.1): what a key may check is fixed here, from the configuration and from
what its owner says of it, never from a token. Only what is public is kept, except HS256's secret. A key
that is weak, of another kind or meant for something else is left out and named by its `kid`.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt import PyJWTError
from jwt.algorithms import Algorithm, ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from cobatch.server.settings.values import SettingsError

log = logging.getLogger("cobatch.auth")

Material = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | bytes

MAX_KID = 256
_MOST_KEYS = 200
# RFC 7518, 3.3. More than the upper bound takes milliseconds per token.
_RSA_BITS = range(2048, 8193)
_RSA_EXPONENT = 2**33
_SECRET_BYTES = 32  # RFC 7518, 3.2: as long as the digest
_PUBLIC_MEMBERS: dict[str, tuple[type[Algorithm], tuple[str, ...]]] = {
    "RSA": (RSAAlgorithm, ("kty", "n", "e")),
    "EC": (ECAlgorithm, ("kty", "crv", "x", "y")),
    "OKP": (OKPAlgorithm, ("kty", "crv", "x")),
}


class Key:
    """A key and the one algorithm that it is used with. Two of them are equal only if they are the same."""

    __slots__ = ("algorithm", "kid", "material")

    def __init__(self, kid: str | None, algorithm: str, material: Material) -> None:
        self.kid = kid
        self.algorithm = algorithm
        self.material = material

    def __repr__(self) -> str:
        # Never the material: HS256's is secret.
        return f"Key({reprlib.repr(self.kid)}, {self.algorithm})"


def parse_jwks(text: bytes, algorithms: Sequence[str]) -> list[Key]:
    """The keys of a JWK set (RFC 7517, 5) that can check tokens with one of `algorithms`.

    A key's algorithm is its own `alg`; where it has none, the first of `algorithms` that fits. Keys of
    other kinds are skipped (RFC 7517, 5: "SHOULD ignore"); of two with the same name, the first counts.
    Raises ValueError where the text is no JWK set.
    """
    try:
        document = json.loads(text.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:
        raise ValueError("it is not JSON in UTF-8") from None
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise ValueError("it is not a JWK set: an object with a list 'keys'")  # noqa: TRY004 - a text's fault
    if len(listed) > _MOST_KEYS:
        raise ValueError(f"it has {len(listed)} keys, more than {_MOST_KEYS}")
    keys: list[Key] = []
    names: set[tuple[str | None, str]] = set()
    for jwk in listed:
        kid = jwk.get("kid") if isinstance(jwk, dict) else None
        try:
            key = _from_jwk(jwk, algorithms)
        except _Unusable as why:
            log.debug("a JWK is left out: kid %s, %s", reprlib.repr(kid), why)
            continue
        if key.kid is not None and (key.kid, key.algorithm) in names:
            log.warning("a JWK is left out: kid %s is there twice", reprlib.repr(kid))
            continue
        if "d" in jwk:
            log.warning(
                "a JWK set holds the private part of kid %s: whoever reads it can sign", reprlib.repr(kid)
            )
        names.add((key.kid, key.algorithm))
        keys.append(key)
    return keys


class _Unusable(Exception):
    """Why a key is left out; never quotes its material."""


def _from_jwk(jwk: Any, algorithms: Sequence[str]) -> Key:
    if not isinstance(jwk, dict):
        raise _Unusable("it is no object")
    kid, use, operations, own = (jwk.get(name) for name in ("kid", "use", "key_ops", "alg"))
    if kid is not None and not (isinstance(kid, str) and len(kid) <= MAX_KID):
        raise _Unusable(f"its kid is not a text of at most {MAX_KID} characters")
    if use not in (None, "sig"):
        raise _Unusable("its use is not sig")
    if operations is not None and not (isinstance(operations, list) and "verify" in operations):
        raise _Unusable("its key_ops are without verify")
    if own is not None and own not in algorithms:
        raise _Unusable("its alg is none of the configured algorithms")
    material = _material(jwk)
    return Key(kid, _algorithm_for(material, algorithms if own is None else [own]), material)


def _material(jwk: dict[str, Any]) -> Material:
    """The public key alone. A symmetric key (`oct`) never comes from a JWK set: such sets are public."""
    kind, members = jwk.get("kty"), jwk
    if not isinstance(kind, str) or kind not in _PUBLIC_MEMBERS:
        raise _Unusable("its kty is none of RSA, EC, OKP")
    family, names = _PUBLIC_MEMBERS[kind]
    try:
        made = family.from_jwk({name: members[name] for name in names})
    except (KeyError, TypeError, ValueError, OverflowError, PyJWTError, UnsupportedAlgorithm):
        raise _Unusable(f"its members make no {kind} key") from None
    if not isinstance(made, RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey):
        raise _Unusable("its curve is none of P-256, Ed25519")
    return made


def _algorithm_for(material: Material, algorithms: Iterable[str]) -> str:
    """The first algorithm that a key of this kind, size and curve can check."""
    fitting: tuple[str, ...]
    match material:
        case RSAPublicKey():
            if material.key_size not in _RSA_BITS:
                raise _Unusable(f"it has {material.key_size} bits, not {_RSA_BITS.start} to {_RSA_BITS[-1]}")
            if material.public_numbers().e >= _RSA_EXPONENT:
                raise _Unusable("its exponent is so large that each check would take long")
            fitting = ("RS256", "PS256")
        case EllipticCurvePublicKey():
            if not isinstance(material.curve, SECP256R1):
                raise _Unusable(f"its curve is {material.curve.name}, not P-256")
            fitting = ("ES256",)
        case Ed25519PublicKey():
            fitting = ("EdDSA",)
        case _:
            raise _Unusable("it is no public key")
    for algorithm in algorithms:
        if algorithm in fitting:
            return algorithm
    raise _Unusable(f"it is for {' or '.join(fitting)}, which is not among the algorithms")


def load_key_files(paths: Iterable[Path], algorithms: Sequence[str]) -> list[Key]:
    """The keys of PEM files, which have no `kid`, and of files with JWK sets. Raises SettingsError.

    A key without a `kid` serves every token whose `kid` no other key has, so there can be only one of an
    algorithm: with two, no token could say which is meant.
    """
    keys: list[Key] = []
    for path in paths:
        keys += _keys_in(path, algorithms)
    nameless = [key.algorithm for key in keys if key.kid is None]
    for algorithm in nameless:
        if nameless.count(algorithm) > 1:
            advice = "put them into a JWK set, each with a kid"
            raise SettingsError(f"auth: key_files: two keys for {algorithm} without a kid; {advice}")
    return keys


def _keys_in(path: Path, algorithms: Sequence[str]) -> list[Key]:
    text = _read(path)
    if b"-----BEGIN" in text:
        return [_from_pem(path, text, algorithms)]
    try:
        keys = parse_jwks(text, algorithms)
    except ValueError as error:
        raise SettingsError(f"auth: {path}: neither PEM nor a JWK set: {error}") from None
    if not keys:
        raise SettingsError(f"auth: {path}: no key in it is for one of {', '.join(algorithms)}")
    return keys


def _from_pem(path: Path, text: bytes, algorithms: Sequence[str]) -> Key:
    if b"PRIVATE KEY" in text:
        advice = f"keep it with the issuer and give the public one: openssl pkey -in {path.name} -pubout"
        raise SettingsError(f"auth: {path}: a private key; {advice}")
    if b"BEGIN CERTIFICATE" in text:
        advice = f"give its key: openssl x509 -in {path.name} -pubkey -noout"
        raise SettingsError(f"auth: {path}: a certificate; {advice}")
    try:
        material = load_pem_public_key(text)
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError(f"auth: {path}: not a public key in PEM") from None
    if not isinstance(material, RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey):
        raise SettingsError(f"auth: {path}: not an RSA, P-256 or Ed25519 key")
    try:
        return Key(None, _algorithm_for(material, algorithms), material)
    except _Unusable as why:
        raise SettingsError(f"auth: {path}: {why}") from None


def load_secret(path: Path) -> Key:
    """HS256's secret: the file's bytes without one newline at the end. Raises SettingsError."""
    secret = _read(path).removesuffix(b"\n").removesuffix(b"\r")
    if len(secret) < _SECRET_BYTES:
        advice = f"make one: openssl rand -base64 48 > {path.name}"
        raise SettingsError(f"auth: {path}: {len(secret)} bytes, fewer than {_SECRET_BYTES}; {advice}")
    try:
        # RFC 8725, 2.1: what is public somewhere else is no secret.
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except (PyJWTError, ValueError):
        raise SettingsError(f"auth: {path}: a key or certificate, not a secret of HS256") from None
    if path.stat().st_mode & 0o077:
        log.warning("%s is readable for others than its owner; chmod 600 it", path)
    return Key(None, "HS256", secret)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"auth: cannot read {path}: {error.strerror}") from None
