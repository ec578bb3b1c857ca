"""Forged access tokens of many kinds, beside good ones to begin with."""

from __future__ import annotations

import base64
import hmac
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt import PyJWS
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "https://trial.test"
ISSUER, FETCHED, SYMMETRIC = "https://files.test", "https://fetched.test", "https://symmetric.test"
SECRET = b"a secret of the trial, with more than 32 bytes"
_ALGORITHMS: dict[str, Any] = {
    "RS256": RSAAlgorithm, "PS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm,
}  # fmt: skip
Claims = dict[str, Any]


@dataclass(frozen=True)
class Signer:
    """A private key of an issuer."""

    issuer: str
    algorithm: str
    kid: str
    private: Any

    def sign(self, data: bytes) -> bytes:
        """Return a signature."""
        if self.algorithm == "HS256":
            return hmac.digest(self.private, data, "sha256")
        return bytes(PyJWS().get_algorithm_by_name(self.algorithm).sign(data, self.private))

    def token(self, claims: Mapping[str, Any] | None = None, **header: Any) -> str:
        """Return a token. Given members replace the usual ones, None drops them."""
        head = {"typ": "at+jwt", "alg": self.algorithm, "kid": self.kid} | header
        return self.raw(as_json(head), as_json(good(self.issuer) | dict(claims or {})))

    def raw(self, header: bytes, payload: bytes) -> str:
        """Return a token of these bytes."""
        start = f"{b64(header)}.{b64(payload)}"
        return f"{start}.{b64(self.sign(start.encode()))}"

    def jwk(self) -> dict[str, Any]:
        """Return the public key."""
        jwk = dict(_ALGORITHMS[self.algorithm].to_jwk(self.private.public_key(), as_dict=True))
        jwk.pop("key_ops", None)
        return jwk | {"kid": self.kid, "alg": self.algorithm, "use": "sig"}


def make(issuer: str, algorithm: str, kid: str) -> Signer:
    """Return a signer with a new key."""
    private: Any = SECRET
    if algorithm == "ES256":
        private = ec.generate_private_key(ec.SECP256R1())
    elif algorithm == "EdDSA":
        private = ed25519.Ed25519PrivateKey.generate()
    elif algorithm in ("RS256", "PS256"):
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return Signer(issuer, algorithm, kid, private)


@cache
def signers() -> tuple[Signer, ...]:
    """Return the keys of the issuers that the server trusts."""
    files = [make(ISSUER, name, f"key-{name}") for name in _ALGORITHMS]
    return (*files, make(FETCHED, "ES256", "fetched"), make(SYMMETRIC, "HS256", "secret"))


@cache
def stranger() -> Signer:
    """Return a key that the server does not trust."""
    return make(ISSUER, "ES256", "key-ES256")


def good(issuer: str) -> Claims:
    """Return the claims of a good token."""
    now = int(time.time())
    return {
        "iss": issuer, "aud": AUDIENCE, "sub": "alice", "client_id": "app", "jti": str(random.random()),
        "iat": now, "exp": now + 600, "scope": "infer metadata",
    }  # fmt: skip


def b64(data: bytes) -> str:
    """Encode as base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def as_json(members: Mapping[str, Any]) -> bytes:
    """Encode as JSON, without the members that are None."""
    return json.dumps({name: value for name, value in members.items() if value is not None}).encode()


def _each(name: str, *values: Any) -> list[Claims]:
    return [{name: value} for value in values]


@dataclass(frozen=True)
class Forger:
    """Makes forged tokens from a signer's; `trap` is a URL that must not be asked."""

    signer: Signer
    rng: random.Random
    trap: str

    def unsigned(self) -> str:
        """Claim that there is no signature."""
        algorithms: list[Any] = ["none", "None", "NONE", "nOnE", "", "null", None, 0, [], "HS256", "none "]
        head = {
            "typ": "at+jwt",
            "alg": self.rng.choice(algorithms),
            "kid": self.rng.choice([self.signer.kid, None]),
        }
        signature = self.rng.choice(["", b64(b"x" * 64), "AA"])
        return f"{b64(as_json(head))}.{b64(as_json(good(self.signer.issuer)))}.{signature}"

    def confused(self) -> str:
        """Sign with HMAC and a public key, or name another algorithm than the signature's."""
        signer, rng = self.signer, self.rng
        if signer.algorithm == "HS256" or rng.random() < 0.3:
            others = {*_ALGORITHMS, "HS384", "HS512", "RS512", "ES384", "ES256K", "RS256 ", "hs256"}
            return signer.token(alg=rng.choice(sorted(others - {signer.algorithm})))
        public = signer.private.public_key()
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        secrets = [pem, pem.strip(), der, json.dumps(signer.jwk()).encode(), b"", b"\0", signer.kid.encode()]
        issuer = rng.choice([signer.issuer, SYMMETRIC])
        forger = Signer(issuer, "HS256", signer.kid, rng.choice(secrets))
        return forger.token(kid=rng.choice([signer.kid, None, "secret"]))

    def kid(self) -> str:
        """Name a key that is a path, a URL, a query or no text."""
        kid, rng = self.signer.kid, self.rng
        kids: list[Any] = [
            "../../../../dev/null", "/dev/null", "' OR 1=1 --", "\0", kid + "\0", "", self.trap, "x" * 2000,
            0, f"{self.trap}/jwks.json", True, [kid], {"kid": kid}, "file:///dev/zero", "key-RS256",
            "fetched", "${jndi:x}",
        ]  # fmt: skip
        empty = Signer(self.signer.issuer, "HS256", "", rng.choice([b"", b"\0", b"x"]))
        forger = empty if rng.random() < 0.5 else stranger()
        return forger.token({"iss": self.signer.issuer}, kid=rng.choice(kids))

    def embedded(self) -> str:
        """Bring a key along, or name the place of one."""
        forger, trap = stranger(), self.trap
        members: Claims = {
            "jwk": forger.jwk(), "jku": f"{trap}/jku", "x5u": f"{trap}/x5u", "x5c": ["MIIB"], "x5t": "AAAA",
            "iss": trap, "jwks_uri": f"{trap}/jwks",
        }  # fmt: skip
        names = self.rng.sample(sorted(members), self.rng.randint(1, 3))
        header = {name: members[name] for name in names}
        return forger.token({"iss": self.signer.issuer}, **header, kid=self.signer.kid)

    def claims(self) -> str:
        """Have one wrong claim, signed by the issuer."""
        now, issuer = int(time.time()), self.signer.issuer
        texts = ("https://other.test", AUDIENCE + "/", AUDIENCE.upper(), "")
        others = [other for other in (ISSUER, FETCHED, SYMMETRIC) if other != issuer]
        big = 10**400
        wrong = [
            *[{name: None} for name in ("iss", "aud", "sub", "client_id", "iat", "exp", "jti")],
            *_each("aud", *texts, [], [[AUDIENCE]], 1, {}),
            *_each("iss", self.trap, issuer + "/", issuer.upper(), "", 1, [issuer], *others),
            *_each("exp", now - 3600, 0, -1, str(now + 600), "", True, [now + 600], {}, now - 11),
            *_each("exp", float("nan"), float("inf"), big, -big),
            *_each("nbf", now + 3600, "soon", [], big),
            *_each("iat", now + 3600, "x", [], float("inf")),
            *_each("sub", 1, [], {"a": 1}),
        ]
        return self.signer.token(self.rng.choice(wrong))

    def header(self) -> str:
        """Have a header that asks for an unsupported extension, signed by the issuer."""
        wrong = [
            *_each("typ", "JWT", "id+jwt", "", 1, "at+jwt2", "secevent+jwt", ["at+jwt"], None),
            *_each("crit", ["exp"], [], "b64", ["zip"]),
            {"b64": False},
            {"b64": False, "crit": ["b64"]},
            {"zip": "DEF", "crit": ["zip"]},
            {"enc": "A128GCM", "crit": ["enc"]},
        ]
        return self.signer.token(**self.rng.choice(wrong))

    def damaged(self) -> str:
        """Change the text of a good token somewhere."""
        rng, token = self.rng, self.signer.token()
        at = rng.randrange(len(token))
        head, payload, signature = token.split(".")
        match rng.randrange(8):
            case 0:
                return token[:at]
            case 1:
                return token[:at] + rng.choice("AQgw_-.=+/~") + token[at:]
            case 2:
                return token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
            case 3:
                return token + rng.choice([".", "..", "=", "==", ".AA", "A", "AAAA", "-"])
            case 4:
                return ".".join(rng.sample([head, payload, signature], 3)) + "A"
            case 5:
                return ".".join(rng.sample([head, payload, signature, "", "AA"], rng.choice([1, 2, 4, 5])))
            case 6:
                return rng.choice([f"{head}=.{payload}.{signature}", f"{head}.{payload}.{signature}=="])
            case _:
                return f"{head}.{payload}.{b64(rng.choice([b'', bytes(64), bytes(256), rng.randbytes(64)]))}"

    def doubled(self) -> str:
        """Name a member twice, signed by the issuer."""
        rng = self.rng
        head, payload = self._parts()
        name = rng.choice([b"sub", b"aud", b"exp", b"scope", b"iss"])
        if rng.random() < 0.5:
            return self.signer.raw(head, b'{"%b": "x", %b' % (name, payload[1:]))
        return self.signer.raw(b'{"%b": "x", %b' % (rng.choice([b"alg", b"kid", b"typ"]), head[1:]), payload)

    def payload(self) -> str:
        """Sign a payload that is no object in UTF-8, or too large a one."""
        head, right = self._parts()
        more = right[:-1]
        payloads = (
            b"", b"[]", b"1", b'"x"', b"null", b"{", right + b"{}", more + b",}", b"\xef\xbb\xbf" + right,
            right.decode().encode("utf-16"), right.replace(b"alice", b"\xff"), b"[" * 5000, b"'" + right,
            b'{"a":' * 1000 + b"1" + b"}" * 1000, more + b', "a": NaN}',
            more + b', "a": "' + b"x" * 9000 + b'"}',
            more + b', "n": ' + b"1" * 7000 + b"}", right.replace(b"alice", b"\\ud800"),
        )  # fmt: skip
        return self.signer.raw(head, self.rng.choice(payloads))

    def huge(self) -> str:
        """Send too long a text, or no token."""
        long = self.signer.token(a="x" * 20_000)
        return self.rng.choice(["x" * 30_000, "." * 9000, "a.b.c", "a." * 3000, "A" * 8192, long, "~" * 100])

    def _parts(self) -> tuple[bytes, bytes]:
        head = {"typ": "at+jwt", "alg": self.signer.algorithm, "kid": self.signer.kid}
        return as_json(head), as_json(good(self.signer.issuer))


FORGERIES: dict[str, Callable[[Forger], str]] = {
    "no signature": Forger.unsigned,
    "another algorithm": Forger.confused,
    "kid": Forger.kid,
    "a key of its own": Forger.embedded,
    "claims": Forger.claims,
    "header": Forger.header,
    "damaged": Forger.damaged,
    "a member twice": Forger.doubled,
    "payload": Forger.payload,
    "huge": Forger.huge,
}
