"""Keys and tokens as an issuer makes them, and tokens as no issuer would."""

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
    """A private key with its name and algorithm."""

    def __init__(self, private: Private, algorithm: str, kid: str | None = None) -> None:
        self.private = private
        self.algorithm = algorithm
        self.kid = kid

    def token(self, claims: Mapping[str, Any] | None = None, **header: Any) -> str:
        """An access token (RFC 9068); what is given replaces claims and header members, None drops them."""
        head = {"typ": "at+jwt", "alg": self.algorithm, "kid": self.kid, **header}
        return self.signed(as_json(head), as_json({**good_claims(), **(claims or {})}))

    def signed(self, header: bytes, payload: bytes) -> str:
        """These very bytes, signed."""
        start = f"{b64(header)}.{b64(payload)}"
        return f"{start}.{b64(self.signature(start.encode()))}"

    def signature(self, data: bytes) -> bytes:
        return bytes(PyJWS().get_algorithm_by_name(self.algorithm).sign(data, self.private))

    def jwk(self, **members: Any) -> dict[str, Any]:
        """The public key as an issuer publishes it; what is given replaces members, None drops them."""
        kind = self._kind()
        made = {**_FAMILY[kind].to_jwk(self.private.public_key(), as_dict=True), "use": "sig"}
        made.pop("key_ops", None)
        made.update(kid=self.kid, alg=self.algorithm)
        return {name: value for name, value in {**made, **members}.items() if value is not None}

    def private_jwk(self) -> dict[str, Any]:
        """With its private members, as no issuer should publish it."""
        made: dict[str, Any] = _FAMILY[self._kind()].to_jwk(self.private, as_dict=True)
        made.pop("key_ops", None)
        return {**made, "kid": self.kid, "alg": self.algorithm}

    def key(self) -> Key:
        """What a server keeps of it."""
        return Key(self.kid, self.algorithm, self.private.public_key())

    def pem(self) -> bytes:
        """The public key in PEM."""
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
    """Made once per name: it takes a while."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@functools.cache
def signer(algorithm: str = "RS256", kid: str | None = None) -> Signer:
    """The same key each time for the same name, which is the algorithm's where none is given."""
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
    """What RFC 9068, 2.2 asks for."""
    return {
        "iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "client_id": "app", "jti": "1",
        "iat": int(now_s), "exp": int(now_s) + 600, "scope": "infer",
    }  # fmt: skip


def jwks(*signers: Signer) -> bytes:
    """The public keys as a JWK set."""
    return json.dumps({"keys": [one.jwk() for one in signers]}).encode()


def hs256(claims: Mapping[str, Any] | None = None, secret: bytes = SECRET, **header: Any) -> str:
    """An access token under a secret, which may be anything."""
    head = as_json({"typ": "at+jwt", "alg": "HS256", **header})
    start = f"{b64(head)}.{b64(as_json({**good_claims(), **(claims or {})}))}"
    # By hand, for PyJWT refuses to take a public key for a secret.
    return f"{start}.{b64(hmac_sha256(secret, start.encode()))}"


def hmac_sha256(secret: bytes, data: bytes) -> bytes:
    return hmac.digest(secret, data, "sha256")


def b64(data: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def as_json(members: Mapping[str, Any]) -> bytes:
    """Without the members that are None."""
    return json.dumps({name: value for name, value in members.items() if value is not None}).encode()


def unsigned(header: bytes, payload: bytes, signature: bytes = b"not a signature") -> str:
    """Any bytes in a token's form."""
    return ".".join(map(b64, (header, payload, signature)))


def auth_settings(*issuers: Issuer, **fields: Any) -> AuthSettings:
    """For tokens of ISSUER, or of these issuers."""
    return AuthSettings(
        issuers=issuers or (Issuer(issuer=ISSUER, name="test"),), **{"audience": (AUDIENCE,), **fields}
    )


def all_keys() -> StaticKeys:
    """One key per algorithm with a public one."""
    return StaticKeys([signer(name).key() for name in ("RS256", "PS256", "ES256", "EdDSA")])
