"""Keys that check tokens, read from JWK sets, PEM files and a secret file.

One key, one algorithm (RFC 8725, 3.1): the algorithm is fixed here, from the configuration and the key's own
`alg`, never from a token. Only public parts are kept, except HS256's secret. Keys that are weak, of another
kind or for another use are skipped, and the log names their `kid`.
"""

import json
import logging
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt import PyJWTError
from jwt.algorithms import Algorithm, ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from cobatch.server.settings.auth import Issuer
from cobatch.server.settings.values import SettingsError

log = logging.getLogger("cobatch.auth")

Material = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | bytes

MAX_KID = 256
_MAX_KEYS = 200
# RFC 7518, 3.3. Larger keys take milliseconds per token.
_RSA_BITS = range(2048, 8193)
_RSA_EXPONENT = 2**33
_SECRET_BYTES = 32  # RFC 7518, 3.2: the size of the digest
PUBLIC_MEMBERS: dict[str, tuple[type[Algorithm], tuple[str, ...]]] = {
    "RSA": (RSAAlgorithm, ("kty", "n", "e")),
    "EC": (ECAlgorithm, ("kty", "crv", "x", "y")),
    "OKP": (OKPAlgorithm, ("kty", "crv", "x")),
}


class Key(msgspec.Struct, eq=False):
    """A key and the only algorithm that it is used with. Keys compare by identity."""

    kid: str | None
    algorithm: str
    material: Material

    def __repr__(self) -> str:
        # Never the material: HS256's is secret.
        return f"Key({reprlib.repr(self.kid)}, {self.algorithm})"


class UnusableKeyError(Exception):
    """The reason why a key cannot be used; never quotes its material."""


def parse_jwks(text: bytes, algorithms: Sequence[str]) -> list[Key]:
    """Return the keys of a JWK set (RFC 7517, 5) that can check tokens with one of `algorithms`.

    A key's algorithm is its own `alg`, or the first of `algorithms` that fits. Other keys are skipped (RFC
    7517, 5: "SHOULD ignore"); of two keys with one name the first is used. Raises ValueError for other texts.
    """
    keys: dict[tuple[object, str], Key] = {}
    for index, jwk in enumerate(_jwk_list(text)):
        kid = jwk.get("kid") if isinstance(jwk, dict) else None
        try:
            key = _from_jwk(jwk, algorithms)
        except UnusableKeyError as reason:
            log.debug("skipped a JWK: kid %s, %s", reprlib.repr(kid), reason)
            continue
        # Keys without a name are all kept.
        name = index if kid is None else kid, key.algorithm
        if name in keys:
            log.warning("skipped a JWK: kid %s appears twice", reprlib.repr(kid))
            continue
        if "d" in jwk:
            log.warning("a JWK set contains the private part of kid %s", reprlib.repr(kid))
        keys[name] = key
    return list(keys.values())


def _jwk_list(text: bytes) -> list[Any]:
    try:
        document = json.loads(text.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:
        raise ValueError("it is not JSON in UTF-8") from None
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list):
        raise ValueError("it is not a JWK set: an object with a list 'keys'")  # noqa: TRY004 - the text's fault
    if len(keys) > _MAX_KEYS:
        raise ValueError(f"it is a set of {len(keys)} keys, more than {_MAX_KEYS}")
    return keys


def _from_jwk(jwk: Any, algorithms: Sequence[str]) -> Key:
    if not isinstance(jwk, dict):
        raise UnusableKeyError("it is not an object")
    kid, use, operations, own = (jwk.get(name) for name in ("kid", "use", "key_ops", "alg"))
    if kid is not None and not (isinstance(kid, str) and len(kid) <= MAX_KID):
        raise UnusableKeyError(f"its kid is not a text of at most {MAX_KID} characters")
    if use not in (None, "sig"):
        raise UnusableKeyError("its use is not sig")
    if operations is not None and not (isinstance(operations, list) and "verify" in operations):
        raise UnusableKeyError("its key_ops lack verify")
    if own is not None and own not in algorithms:
        raise UnusableKeyError("its alg is not configured")
    return _bound_key(kid, _public_key(jwk), algorithms if own is None else [own])


def _public_key(jwk: dict[str, Any]) -> Any:
    """Read the public members only. Symmetric keys (`oct`) are refused, since JWK sets are public."""
    kind = jwk.get("kty")
    if not isinstance(kind, str) or kind not in PUBLIC_MEMBERS:
        raise UnusableKeyError("its kty is none of RSA, EC, OKP")
    family, names = PUBLIC_MEMBERS[kind]
    try:
        return family.from_jwk({name: jwk[name] for name in names})
    except (KeyError, TypeError, ValueError, OverflowError, PyJWTError, UnsupportedAlgorithm):
        raise UnusableKeyError(f"its members are not a valid {kind} key") from None


def fitting_algorithms(public_key: object) -> tuple[str, ...]:
    """Return the algorithms that a key's kind, size and curve allow. Raises UnusableKeyError."""
    match public_key:
        case RSAPublicKey():
            if (bits := public_key.key_size) not in _RSA_BITS:
                raise UnusableKeyError(f"it has {bits} bits, not {_RSA_BITS.start} to {_RSA_BITS[-1]}")
            if public_key.public_numbers().e >= _RSA_EXPONENT:
                raise UnusableKeyError("its exponent is so large that each check would be slow")
            return "RS256", "PS256"
        case EllipticCurvePublicKey():
            if not isinstance(public_key.curve, SECP256R1):
                raise UnusableKeyError(f"its curve is {public_key.curve.name}, not P-256")
            return ("ES256",)
        case Ed25519PublicKey():
            return ("EdDSA",)
    raise UnusableKeyError("not an RSA, P-256 or Ed25519 key")


def _bound_key(kid: str | None, public_key: Any, algorithms: Iterable[str]) -> Key:
    """Bind a key to the first of `algorithms` that fits it."""
    fitting = fitting_algorithms(public_key)
    for algorithm in algorithms:
        if algorithm in fitting:
            return Key(kid, algorithm, public_key)
    raise UnusableKeyError(f"it is for {' or '.join(fitting)}, which is not configured")


def configured_keys(issuer: Issuer) -> list[Key]:
    """Return the keys in the issuer's files; none if they are fetched. Raises SettingsError."""
    if issuer.secret_file:
        return [load_secret(Path(issuer.secret_file))]
    return load_key_files([Path(name) for name in issuer.key_files], issuer.algorithms)


def load_key_files(paths: Iterable[Path], algorithms: Sequence[str]) -> list[Key]:
    """Read keys from PEM files, which have no `kid`, and JWK sets. Raises SettingsError.

    A key without a `kid` serves every token whose `kid` is unknown, so each algorithm may have only one.
    """
    keys = [key for path in paths for key in _keys_in(path, algorithms)]
    nameless = [key.algorithm for key in keys if key.kid is None]
    for algorithm in nameless:
        if nameless.count(algorithm) > 1:
            advice = "put them into a JWK set, each with a kid"
            raise SettingsError(f"auth.issuers: two keys for {algorithm} without a kid; {advice}")
    return keys


def _keys_in(path: Path, algorithms: Sequence[str]) -> list[Key]:
    text = _read(path)
    if b"-----BEGIN" in text:
        return [_from_pem(path, text, algorithms)]
    try:
        keys = parse_jwks(text, algorithms)
    except ValueError as error:
        raise SettingsError(f"auth.issuers: {path}: neither PEM nor a JWK set: {error}") from None
    if not keys:
        raise SettingsError(f"auth.issuers: {path}: no key in it is for one of {', '.join(algorithms)}")
    return keys


def _from_pem(path: Path, text: bytes, algorithms: Sequence[str]) -> Key:
    if b"PRIVATE KEY" in text:
        advice = f"keep it with the issuer and give the public one: openssl pkey -in {path.name} -pubout"
        raise SettingsError(f"auth.issuers: {path}: a private key; {advice}")
    if b"BEGIN CERTIFICATE" in text:
        advice = f"give its key: openssl x509 -in {path.name} -pubkey -noout"
        raise SettingsError(f"auth.issuers: {path}: a certificate; {advice}")
    try:
        return _bound_key(None, load_pem_public_key(text), algorithms)
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError(f"auth.issuers: {path}: not a public key in PEM") from None
    except UnusableKeyError as reason:
        raise SettingsError(f"auth.issuers: {path}: {reason}") from None


def load_secret(path: Path) -> Key:
    """Read HS256's secret: the file's bytes without one newline at the end. Raises SettingsError."""
    secret = _read(path).removesuffix(b"\n").removesuffix(b"\r")
    if len(secret) < _SECRET_BYTES:
        advice = f"make one: openssl rand -base64 48 > {path.name}"
        why = f"{len(secret)} bytes, fewer than {_SECRET_BYTES}; {advice}"
        raise SettingsError(f"auth.issuers: {path}: {why}")
    try:
        # RFC 8725, 2.1: refuses public keys and certificates, which are not secret.
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except (PyJWTError, ValueError):
        raise SettingsError(f"auth.issuers: {path}: a key or certificate, not a secret of HS256") from None
    if path.stat().st_mode & 0o077:
        log.warning("other users can read %s; chmod 600 it", path)
    return Key(None, "HS256", secret)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"auth.issuers: cannot read {path}: {error.strerror}") from None
