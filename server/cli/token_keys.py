"""Development keys and tokens: the part of an issuer that `cobatch token` stands in for."""

import base64
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_pem
from jwt.algorithms import get_default_algorithms

from cobatch.server.auth.keys import (
    PUBLIC_MEMBERS,
    Key,
    UnusableKeyError,
    configured_keys,
    fitting_algorithms,
    load_secret,
)
from cobatch.server.settings.auth import AuthSettings, Issuer
from cobatch.server.settings.values import SettingsError

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | Ed25519PrivateKey

CLIENT_ID = "cobatch-token"
PRIVATE = 0o600
PUBLIC = 0o644
_MAKERS: dict[str, Callable[[], PrivateKey]] = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "PS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": Ed25519PrivateKey.generate,
}


class Signer(NamedTuple):
    """A key that signs tokens, its algorithms (the usual one first), and its `kid`; HS256's has none."""

    key: PrivateKey | bytes
    algorithms: tuple[str, ...]
    kid: str | None


def make_pair(algorithm: str) -> tuple[bytes, bytes]:
    """Make a key for RS256, PS256, ES256 or EdDSA: PKCS #8 in PEM, and a JWK set of its public half."""
    private = _MAKERS[algorithm]()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    jwk = _jwk(private, algorithm)
    # RFC 7517, 4.3: `use` and `key_ops` do not belong together, and most readers look at `use`.
    jwk |= {"use": "sig", "alg": algorithm, "kid": _thumbprint(jwk)}
    return pem, json.dumps({"keys": [jwk]}, indent=2).encode() + b"\n"


def load_signer(path: Path) -> Signer:
    """Load a private key in PEM, or the secret of HS256. Raises SettingsError."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror} (flag --key)") from None
    if b"-----BEGIN" not in text:
        secret = load_secret(path).material
        assert isinstance(secret, bytes)
        return Signer(secret, ("HS256",), None)
    try:
        private = load_pem(text, None)
        algorithms = fitting_algorithms(private.public_key())
    except TypeError:
        why = "the key is encrypted; give one without a passphrase"
        raise SettingsError(f"{path}: {why} (flag --key)") from None
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError(f"{path}: not a private key in PEM (flag --key)") from None
    except UnusableKeyError as reason:
        raise SettingsError(f"{path}: {reason} (flag --key)") from None
    assert isinstance(private, PrivateKey)
    return Signer(private, algorithms, _thumbprint(_jwk(private, algorithms[0])))


def issuer_of(auth: AuthSettings, signer: Signer, source: str) -> tuple[Issuer, Key]:
    """Return the issuer that has the signer's key, and the server's key. Raises SettingsError."""
    wanted = signer.key if isinstance(signer.key, bytes) else signer.key.public_key()
    for issuer in auth.issuers:
        for key in configured_keys(issuer):
            if key.material == wanted:
                return issuer, key
    raise SettingsError(
        f"auth.issuers: the key is not among any issuer's key_files or secret_file ({source})"
    )


def sign(claims: dict[str, Any], signer: Signer, algorithm: str, kid: str | None, lifetime_s: int) -> str:
    """Sign an access token (RFC 9068) with `claims` and those that every token has."""
    now_s = int(time.time())
    times = {"iat": now_s, "exp": now_s + lifetime_s, "jti": secrets.token_urlsafe(16)}
    headers = {"typ": "at+jwt"} | ({} if kid is None else {"kid": kid})
    return jwt.encode({"client_id": CLIENT_ID} | claims | times, signer.key, algorithm, headers)


def write(private: dict[Path, bytes], public: dict[Path, bytes], *, force: bool) -> None:
    """Write all files, or none if one exists and `force` is not set. Raises SettingsError."""
    for path in (*private, *public):
        if os.path.lexists(path) and not force:
            raise SettingsError(f"{path} exists; --force replaces it")
    for path, content in (private | public).items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            # O_EXCL: the mode holds from the first byte on, and no link leads elsewhere.
            mode = PRIVATE if path in private else PUBLIC
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        except OSError as error:
            raise SettingsError(f"cannot write {path}: {error.strerror}") from None


def _jwk(private: PrivateKey, algorithm: str) -> dict[str, Any]:
    """Return the public half as a JWK of the members that RFC 7638, 3.2 hashes."""
    jwk: dict[str, Any] = get_default_algorithms()[algorithm].to_jwk(private.public_key(), as_dict=True)
    return {name: jwk[name] for name in PUBLIC_MEMBERS[jwk["kty"]][1]}


def _thumbprint(jwk: dict[str, Any]) -> str:
    """Return the RFC 7638 thumbprint: the same key has the same `kid` on every machine."""
    text = json.dumps(jwk, sort_keys=True, separators=(",", ":"))
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
