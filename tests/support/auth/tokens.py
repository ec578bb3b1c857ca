"""Keys, and valid and malformed tokens."""

from __future__ import annotations

import base64
import functools
import hmac
import json
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt import PyJWS
from jwt.algorithms import Algorithm, ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from cobatch.server.auth.jwks import StaticKeys
from cobatch.server.auth.keys import Key
from cobatch.server.settings.auth import AuthSettings, Issuer

ISSUER = "https://issuer.test"
AUDIENCE = "https://cobatch.test"
NOW_S = 1_700_000_000.0
SECRET = b"0123456789abcdef0123456789abcdef"

Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
_FAMILY: dict[str, type[Algorithm]] = {"RSA": RSAAlgorithm, "EC": ECAlgorithm, "OKP": OKPAlgorithm}


class Signer:
    """A private key with its kid and algorithm."""

    def __init__(self, private: Private, algorithm: str, kid: str | None = None) -> None:
        self.private = private
        self.algorithm = algorithm
        self.kid = kid

    def token(self, claims: Mapping[str, Any] | None = None, **header: Any) -> str:
        """Return an access token (RFC 9068). Given members replace the defaults, None drops them."""
        head = {"typ": "at+jwt", "alg": self.algorithm, "kid": self.kid, **header}
        return self.signed(as_json(head), as_json({**good_claims(), **(claims or {})}))

    def signed(self, header: bytes, payload: bytes) -> str:
        """Return a token of exactly these bytes, signed."""
        start = f"{b64(header)}.{b64(payload)}"
        return f"{start}.{b64(self.signature(start.encode()))}"

    def signature(self, data: bytes) -> bytes:
        return bytes(PyJWS().get_algorithm_by_name(self.algorithm).sign(data, self.private))

    def jwk(self, **members: Any) -> dict[str, Any]:
        """Return the public key as a JWK. Given members replace the defaults, None drops them."""
        kind = self._kind()
        jwk = {**_FAMILY[kind].to_jwk(self.private.public_key(), as_dict=True), "use": "sig"}
        jwk.pop("key_ops", None)
        jwk.update(kid=self.kid, alg=self.algorithm)
        return {name: value for name, value in {**jwk, **members}.items() if value is not None}

    def private_jwk(self) -> dict[str, Any]:
        """Return the JWK with its private members, as no issuer should publish it."""
        jwk: dict[str, Any] = _FAMILY[self._kind()].to_jwk(self.private, as_dict=True)
        jwk.pop("key_ops", None)
        return {**jwk, "kid": self.kid, "alg": self.algorithm}

    def key(self) -> Key:
        """Return the key as the server stores it."""
        return Key(self.kid, self.algorithm, self.private.public_key())

    def pem(self) -> bytes:
        """Return the public key in PEM."""
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def private_pem(self) -> bytes:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def _kind(self) -> str:
        match self.private:
            case rsa.RSAPrivateKey():
                return "RSA"
            case ec.EllipticCurvePrivateKey():
                return "EC"
            case _:
                return "OKP"


@functools.cache
def rsa_key(name: str = "", bits: int = 2048) -> rsa.RSAPrivateKey:
    """Generate a key, once per name because it is slow."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@functools.cache
def signer(algorithm: str = "RS256", kid: str | None = None) -> Signer:
    """Return the signer with this kid, by default `key-ALGORITHM`; always the same key."""
    kid = kid or f"key-{algorithm}"
    private: Private
    match algorithm:
        case "ES256":
            private = ec.generate_private_key(ec.SECP256R1())
        case "EdDSA":
            private = ed25519.Ed25519PrivateKey.generate()
        case _:
            private = rsa_key(kid)
    return Signer(private, algorithm, kid)


def good_claims(now_s: float = NOW_S) -> dict[str, Any]:
    """Return the claims that RFC 9068, 2.2 requires."""
    return {
        "iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "client_id": "app", "jti": "1",
        "iat": int(now_s), "exp": int(now_s) + 600, "scope": "infer",
    }  # fmt: skip


def jwks(*signers: Signer) -> bytes:
    """Return the public keys as a JWK set."""
    return json.dumps({"keys": [one.jwk() for one in signers]}).encode()


def hs256(claims: Mapping[str, Any] | None = None, secret: bytes = SECRET, **header: Any) -> str:
    """Return an access token signed with any secret."""
    head = as_json({"typ": "at+jwt", "alg": "HS256", **header})
    start = f"{b64(head)}.{b64(as_json({**good_claims(), **(claims or {})}))}"
    # Signed here, since PyJWT refuses a public key as a secret.
    return f"{start}.{b64(hmac_sha256(secret, start.encode()))}"


def hmac_sha256(secret: bytes, data: bytes) -> bytes:
    return hmac.digest(secret, data, "sha256")


def b64(data: bytes) -> str:
    """Encode as base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def as_json(members: Mapping[str, Any]) -> bytes:
    """Encode as JSON, without the members that are None."""
    return json.dumps({name: value for name, value in members.items() if value is not None}).encode()


def unsigned(header: bytes, payload: bytes, signature: bytes = b"not a signature") -> str:
    """Join any three parts into a token."""
    return ".".join(map(b64, (header, payload, signature)))


def auth_settings(*issuers: Issuer, **fields: Any) -> AuthSettings:
    """Return `[auth]` for tokens of ISSUER, or of these issuers."""
    return AuthSettings(
        issuers=issuers or (Issuer(issuer=ISSUER, name="test"),), **{"audience": (AUDIENCE,), **fields}
    )


def all_keys() -> StaticKeys:
    """Return one key for each asymmetric algorithm."""
    return StaticKeys([signer(name).key() for name in ("RS256", "PS256", "ES256", "EdDSA")])
