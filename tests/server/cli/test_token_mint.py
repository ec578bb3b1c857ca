"""`cobatch token mint`: tokens that the configured server accepts, and one-line refusals."""

from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from jwt.algorithms import OKPAlgorithm

from cobatch.server.cli.token_keys import load_signer
from tests.support.auth.token_commands import ADDRESS, ISSUER, folder, generated, output_of, refused, verified

__all__ = ["folder", "generated"]  # fixtures


def test_mint_takes_its_claims_from_flags(generated: Path) -> None:
    key = generated / "dev-key.pem"
    flags = ["--issuer", ISSUER, "--audience", ADDRESS, "--tenant", "t", "--scope", "infer:a admin"]
    claims = verified(output_of("mint", "--key", key, *flags, "--expires-in", "90s").rstrip("\n"), generated)
    assert (claims["sub"], claims["scope"], claims["client_id"]) == ("t", "infer:a admin", "cobatch-token")
    assert claims["exp"] - claims["iat"] == 90


def test_no_two_tokens_are_the_same(generated: Path) -> None:
    config = generated / "cobatch.toml"
    ids = {verified(output_of("mint", "--config", config).rstrip("\n"), generated)["jti"] for _ in range(5)}
    assert len(ids) == 5


def test_flags_of_mint_win_over_the_file(generated: Path) -> None:
    flags = ["--issuer", "https://other.example", "--audience", "elsewhere", "--kid", "k", "--alg", "PS256"]
    minted = output_of("mint", "--config", generated / "cobatch.toml", *flags).rstrip("\n")
    claims = jwt.decode(minted, options={"verify_signature": False})
    assert (claims["iss"], claims["aud"]) == ("https://other.example", "elsewhere")
    assert jwt.get_unverified_header(minted) == {"typ": "at+jwt", "alg": "PS256", "kid": "k"}


def test_mint_uses_the_claims_that_the_issuer_is_configured_with(folder: Path) -> None:
    config = folder / "cobatch.toml"
    config.write_text(config.read_text() + 'tenant_claim = "org"\npermission_claims = ["scp"]\n')
    claims = verified(output_of("mint", "--config", config, "--tenant", "acme").rstrip("\n"), folder)
    assert (claims["org"], claims["scp"], claims["sub"]) == ("acme", "infer metadata", "acme")
    assert "scope" not in claims


def test_mint_finds_the_issuer_that_has_the_key(folder: Path) -> None:
    output_of("keypair", "-o", folder / "second", "--alg", "EdDSA")
    config = folder / "cobatch.toml"
    second = '\n[[auth.issuers]]\nissuer = "https://second.invalid"\nkey_files = ["second.jwks.json"]\n'
    config.write_text(config.read_text() + second)
    minted = output_of("mint", "--config", config, "--key", folder / "second.pem").rstrip("\n")
    assert jwt.decode(minted, options={"verify_signature": False})["iss"] == "https://second.invalid"
    assert jwt.get_unverified_header(minted)["alg"] == "EdDSA"


def test_mint_signs_for_a_public_key_in_pem(folder: Path) -> None:
    signer = load_signer(folder / "dev-key.pem")
    assert not isinstance(signer.key, bytes)
    public = signer.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    config = folder / "cobatch.toml"
    config.write_text(config.read_text().replace("dev-jwks.json", "public.pem").replace("RS256", "PS256"))
    minted = output_of("mint", "--config", config).rstrip("\n")
    assert jwt.get_unverified_header(minted)["alg"] == "PS256"


def test_mint_signs_with_a_secret(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s" * 32 + "\n")
    secret.chmod(0o600)
    config = tmp_path / "cobatch.toml"
    config.write_text(
        "[auth]\naudience = ['here']\n[[auth.issuers]]\nissuer = 'me'\n"
        "secret_file = 'secret'\nalgorithms = ['HS256']\n"
    )
    minted = output_of("mint", "--config", config, "--key", secret).rstrip("\n")
    assert jwt.decode(minted, b"s" * 32, ["HS256"], audience="here", issuer="me")["sub"] == "me"
    assert jwt.get_unverified_header(minted) == {"typ": "at+jwt", "alg": "HS256"}


def test_mint_refuses_a_token_that_no_server_would_accept(folder: Path) -> None:
    key, config = folder / "dev-key.pem", folder / "cobatch.toml"
    wanted = "give --config, or --issuer and --audience: a token needs both"
    assert refused("mint", "--key", key) == wanted
    assert refused("mint", "--key", key, "--issuer", ISSUER) == wanted
    assert refused("mint", "--config", config, "--alg", "ES256") == (
        "alg: expected one of RS256, PS256, got 'ES256' (flag --alg)"
    )
    output_of("keypair", "-o", folder / "other", "--alg", "ES256")
    assert refused("mint", "--config", config, "--key", folder / "other.pem") == (
        f"auth.issuers: the key is not among any issuer's key_files or secret_file (file {config})"
    )
    config.write_text("[auth]\napi_keys_file = 'api-keys.toml'\n")
    assert refused("mint", "--config", config).startswith("auth.issuers: missing; the server accepts API")
    config.write_text("")
    assert refused("mint", "--config", config).startswith("auth: missing; the server would not ask")
    assert refused("mint", "--config", folder / "gone").startswith("config: cannot read ")


@pytest.mark.parametrize("text", ["", "0s", "1", "h", "-1h", "1.5h", "1w", "999999s", "٣h", "1h\n"])
def test_a_time_is_a_number_and_its_unit(text: str, generated: Path) -> None:
    assert refused("mint", "--config", generated / "cobatch.toml", "--expires-in", text) == (
        f"expires-in: expected 90s, 30m, 12h or 7d, got {text!r} (flag --expires-in)"
    )


def pem(key: Any, encryption: KeySerializationEncryption | None = None) -> bytes:
    generated = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    assert isinstance(generated, bytes)
    return generated


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pem(rsa.generate_private_key(65537, 1024)), "it has 1024 bits, not 2048 to 8192"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "its curve is secp384r1, not P-256"),
        (pem(ed448.Ed448PrivateKey.generate()), "not an RSA, P-256 or Ed25519 key"),
        (
            pem(ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"x")),
            "the key is encrypted; give one without a passphrase",
        ),
        (b"-----BEGIN PUBLIC KEY-----\nnothing\n-----END PUBLIC KEY-----\n", "not a private key in PEM"),
    ],
)
def test_a_key_that_cannot_sign_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    assert (
        refused("mint", "--key", path, "--issuer", "a", "--audience", "b")
        == f"{path}: {message} (flag --key)"
    )


def test_a_short_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("short")
    assert "fewer than 32" in refused("mint", "--key", path, "--issuer", "a", "--audience", "b")


def test_rfc7638_3_1_kid_is_the_thumbprint(tmp_path: Path) -> None:
    # RFC 8037, A.1 and A.3: a private key and its public half's thumbprint.
    private = OKPAlgorithm.from_jwk(
        {
            "kty": "OKP",
            "crv": "Ed25519",
            "d": "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A",
            "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
        }
    )
    path = tmp_path / "key.pem"
    path.write_bytes(pem(private))
    assert load_signer(path).kid == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
