"""Development keys and tokens: what an issuer does, as far as `cobatch token` stands in for one.

Imported by the commands that need it alone, for it loads the cryptography.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from cobatch.server.auth.keys import Key, load_key_files, load_secret
from cobatch.server.settings.auth import AuthSettings, Issuer
from cobatch.server.settings.values import SettingsError

PrivateKey = RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey
PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

CLIENT_ID = "cobatch-token"
_RSA_BITS = 2048
_MAKERS: dict[str, Callable[[], PrivateKey]] = {
    "RS256": lambda: rsa.generate_private_key(65537, _RSA_BITS),
    "PS256": lambda: rsa.generate_private_key(65537, _RSA_BITS),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": Ed25519PrivateKey.generate,
}
# RFC 7638, 3.2, and RFC 8037, 2: the members that a thumbprint is of.
_THUMBPRINT = {"RSA": ("e", "kty", "n"), "EC": ("crv", "kty", "x", "y"), "OKP": ("crv", "kty", "x")}


class Pair(NamedTuple):
    """A key pair as its files hold it: PKCS #8 in PEM, and a JWK set of the public half."""

    pem: bytes
    jwks: bytes


class Signer(NamedTuple):
    """What signs a token. HS256's secret has no `kid`."""

    key: PrivateKey | bytes
    algorithms: tuple[str, ...]  # which it can sign with, the usual one first
    kid: str | None


def make_pair(algorithm: str) -> Pair:
    """A new key pair for RS256, PS256, ES256 or EdDSA."""
    private = _MAKERS[algorithm]()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    jwk = _jwk(private.public_key())
    # RFC 7517, 4.3: `use` and `key_ops` do not belong together, and `use` is what most readers look at.
    jwk |= {"use": "sig", "alg": algorithm, "kid": _thumbprint(jwk)}
    return Pair(pem, json.dumps({"keys": [jwk]}, indent=2).encode() + b"\n")


def load_signer(path: Path) -> Signer:
    """A private key in PEM, or the secret of HS256. Raises SettingsError."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror} (flag --key)") from None
    if b"-----BEGIN" not in text:
        return Signer(_secret(load_secret(path)), ("HS256",), None)
    private = _private_key(path, text)
    match private:
        case RSAPrivateKey():
            algorithms: tuple[str, ...] = ("RS256", "PS256")
            weak = private.key_size < _RSA_BITS
        case EllipticCurvePrivateKey():
            algorithms = ("ES256",)
            weak = not isinstance(private.curve, ec.SECP256R1)
        case Ed25519PrivateKey():
            algorithms, weak = ("EdDSA",), False
    if weak:
        expected = "RSA of 2048 bits at least, P-256 or Ed25519"
        raise SettingsError(f"{path}: no server takes this key; expected {expected} (flag --key)")
    return Signer(private, algorithms, _thumbprint(_jwk(private.public_key())))


def issuer_of(auth: AuthSettings, signer: Signer, source: str) -> tuple[Issuer, Key]:
    """The issuer that the signer belongs to, and its key as the server sees it. Raises SettingsError."""
    wanted = signer.key if isinstance(signer.key, bytes) else signer.key.public_key()
    for issuer in auth.issuers:
        if issuer.secret_file:
            keys = [load_secret(Path(issuer.secret_file))]
        else:
            keys = load_key_files([Path(name) for name in issuer.key_files], issuer.algorithms)
        for key in keys:
            if key.material == wanted:
                return issuer, key
    raise SettingsError(
        f"auth.issuers: the key is not among any issuer's key_files or secret_file ({source})"
    )


def sign(claims: dict[str, Any], signer: Signer, algorithm: str, kid: str | None, lifetime_s: int) -> str:
    """An access token as RFC 9068 wants it: `claims`, and what every token has."""
    now_s = int(time.time())
    times = {"iat": now_s, "exp": now_s + lifetime_s, "jti": secrets.token_urlsafe(16)}
    headers = {"typ": "at+jwt"} | ({} if kid is None else {"kid": kid})
    return jwt.encode({"client_id": CLIENT_ID} | claims | times, signer.key, algorithm, headers)


def _private_key(path: Path, text: bytes) -> PrivateKey:
    try:
        private = load_pem_private_key(text, None)
    except TypeError:
        raise SettingsError(
            f"{path}: the key is encrypted; take one without a passphrase (flag --key)"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError(f"{path}: not a private key in PEM (flag --key)") from None
    if not isinstance(private, RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey):
        raise SettingsError(f"{path}: not an RSA, P-256 or Ed25519 key (flag --key)")
    return private


def _secret(key: Key) -> bytes:
    assert isinstance(key.material, bytes)
    return key.material


def _jwk(public: PublicKey) -> dict[str, Any]:
    match public:
        case RSAPublicKey():
            jwk = RSAAlgorithm.to_jwk(public, as_dict=True)
        case EllipticCurvePublicKey():
            jwk = ECAlgorithm.to_jwk(public, as_dict=True)
        case Ed25519PublicKey():
            jwk = OKPAlgorithm.to_jwk(public, as_dict=True)
    return {name: jwk[name] for name in _THUMBPRINT[jwk["kty"]]}


def _thumbprint(jwk: dict[str, Any]) -> str:
    """RFC 7638: the same key has the same `kid`, wherever it is computed."""
    text = json.dumps(jwk, sort_keys=True, separators=(",", ":"))
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
