"""`cobatch token`: files that the server accepts, and one-line refusals."""

import json
import tomllib
from pathlib import Path

import pytest

from cobatch.server.auth.api_keys import ApiKeys
from cobatch.server.auth.keys import load_key_files
from cobatch.server.cli.token import model_name
from cobatch.server.cli.token_keys import load_signer
from cobatch.server.settings.auth import REQUIRED_CLAIMS, AuthSettings
from cobatch.server.settings.load import load_settings
from tests.support.auth.token_commands import (
    ADDRESS,
    ISSUER,
    folder,
    generated,
    mode,
    output_of,
    refused,
    token,
    verified,
)

__all__ = ["folder", "generated"]  # fixtures

ALGORITHMS = ["RS256", "PS256", "ES256", "EdDSA"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "my model.onnx"
    path.write_bytes(b"not opened here")
    return path


def auth_in(folder: Path, model: Path) -> AuthSettings:
    auth = load_settings(folder / "cobatch.toml", {}, {"model": model, "name": "m"}).auth
    assert auth is not None
    return auth


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_init_makes_a_server_and_a_token_for_it(algorithm: str, tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "new" / "dev"
    output = output_of("init", folder, "--alg", algorithm, "--model", model)
    settings = load_settings(folder / "cobatch.toml", {}, {})
    assert settings.auth is not None
    (issuer,) = settings.auth.issuers
    assert (issuer.issuer, issuer.algorithms) == (ISSUER, (algorithm,))
    assert issuer.key_files == (str(folder / "dev-jwks.json"),)
    assert settings.auth.audience == (ADDRESS,)
    assert [(one.path, one.name) for one in settings.models] == [(str(model), "my-model")]
    claims = verified(output_of("mint", "--config", folder / "cobatch.toml").rstrip("\n"), folder, algorithm)
    assert set(REQUIRED_CLAIMS) <= claims.keys()
    assert (claims["sub"], claims["scope"], claims["exp"] - claims["iat"]) == ("me", "infer metadata", 3600)
    assert f"cobatch serve --config {folder}/cobatch.toml" in output
    assert f"TOKEN=$(cobatch token mint --config {folder}/cobatch.toml)" in output
    assert f'curl -H "Authorization: Bearer $TOKEN" {ADDRESS}/v2/models/my-model' in output


def test_init_restricts_private_files_to_their_owner(generated: Path) -> None:
    assert sorted(path.name for path in generated.iterdir()) == [
        "api-keys.toml",
        "cobatch.toml",
        "dev-jwks.json",
        "dev-key.pem",
    ]
    assert mode(generated / "dev-key.pem") == mode(generated / "api-keys.toml") == 0o600
    (jwk,) = json.loads((generated / "dev-jwks.json").read_bytes())["keys"]
    assert jwk.keys() == {"kty", "use", "alg", "kid", "n", "e"}


def test_init_shows_an_api_key_that_is_in_the_file(folder: Path) -> None:
    output = output_of("init", folder, "--force")
    (line,) = [line for line in output.splitlines() if "X-API-Key" in line]
    key = line.partition("X-API-Key: ")[2].partition('"')[0]
    found = ApiKeys.read(folder / "api-keys.toml").find(key, 0.0)
    assert found is not None
    assert (found.tenant, found.scopes) == ("me", ("infer", "metadata"))
    assert "cobatch serve MODEL --config" in output


def test_init_writes_a_relative_path_to_a_model_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.onnx").touch()
    output_of("init", tmp_path, "--model", tmp_path / "m" / "a.onnx")
    document = tomllib.loads((tmp_path / "cobatch.toml").read_text())
    assert document["models"] == [{"path": "m/a.onnx", "name": "a"}]


@pytest.mark.parametrize(
    ("file", "name"), [("a.onnx", "a"), ("my model.onnx", "my-model"), ("_x.plan", "x"), ("é.onnx", "model")]
)
def test_model_names_fit_into_urls(file: str, name: str) -> None:
    assert model_name(Path(file)) == name


@pytest.mark.parametrize("there", ["dev-key.pem", "dev-jwks.json", "api-keys.toml", "cobatch.toml"])
def test_init_overwrites_nothing(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("mine")
    assert refused("init", tmp_path) == f"{tmp_path / there} exists; --force replaces it"
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_force_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "dev-key.pem").symlink_to(other)
    refused("init", tmp_path / "dev")
    output_of("init", tmp_path / "dev", "--force")
    assert other.read_text() == "mine"
    assert mode(tmp_path / "dev" / "dev-key.pem") == 0o600


def test_init_refuses_bad_arguments(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refused("init", tmp_path / "file" / "dev").startswith("cannot write ")
    assert refused("init", tmp_path, "--model", tmp_path / "gone.onnx").endswith(
        "gone.onnx: no model file there (flag --model)"
    )
    assert refused("init", tmp_path, "--alg", "HS256") == (
        "alg: expected one of ES256, EdDSA, PS256, RS256, got 'HS256' (flag --alg)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_keypair_prints_the_configuration_for_it(algorithm: str, tmp_path: Path, model: Path) -> None:
    (tmp_path / "cobatch.toml").write_text(output_of("keypair", "-o", tmp_path / "k", "--alg", algorithm))
    assert mode(tmp_path / "k.pem") == 0o600
    (issuer,) = auth_in(tmp_path, model).issuers
    (key,) = load_key_files([Path(name) for name in issuer.key_files], issuer.algorithms)
    signer = load_signer(tmp_path / "k.pem")
    assert (key.algorithm, key.kid) == (algorithm, signer.kid)
    assert algorithm in signer.algorithms
    assert refused("keypair", "-o", tmp_path / "k").endswith("k.pem exists; --force replaces it")
    before = (tmp_path / "k.pem").read_bytes()
    output_of("keypair", "-o", tmp_path / "k", "--force")
    assert (tmp_path / "k.pem").read_bytes() != before


def test_api_key_is_alone_on_stdout_and_its_hash_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "api-keys.toml"
    first = token(
        "api-key", "--tenant", "a", "--scope", "infer:m gold", "--name", 'the "job"', "--file", path
    )
    assert mode(path) == 0o600
    second = token("api-key", "--tenant", "b", "--file", path, "--expires-in", "90d")
    keys = ApiKeys.read(path)
    assert len(keys) == 2
    one, other = (keys.find(generated.stdout.removesuffix("\n"), 0.0) for generated in (first, second))
    assert one is not None
    assert other is not None
    assert (one.tenant, one.scopes) == ("a", ("infer:m", "gold"))
    assert keys.find(second.stdout.rstrip("\n"), other.expires_s) is None
    entries = tomllib.loads(path.read_text())["keys"]
    assert entries[0]["name"] == 'the "job"'
    assert entries[1]["expires"].timestamp() == other.expires_s


def test_api_key_without_a_file_prints_the_entry() -> None:
    result = token("api-key", "--tenant", "a")
    keys = ApiKeys.parse(tomllib.loads(result.stderr), "stderr")
    assert keys.find(result.stdout.rstrip("\n"), 0.0) is not None


def test_api_key_is_added_after_a_line_without_newline(folder: Path) -> None:
    path = folder / "api-keys.toml"
    path.write_text(path.read_text() + "# a comment")
    output_of("api-key", "--tenant", "a", "--file", path)
    assert len(ApiKeys.read(path)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[[keys]", "PATH: not a file of API keys: "),
        (b"\xff", "PATH: not a file of API keys: "),
        (b"keys = []\n", "PATH: not a file of API keys: "),
        (b"[server]\nport = 1\n", "server: unknown key; expected [[keys]] only (file PATH)"),
    ],
)
def test_api_key_leaves_an_invalid_file_unchanged(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "api-keys.toml"
    path.write_bytes(content)
    output = refused("api-key", "--tenant", "a", "--file", path)
    assert output.startswith(message.replace("PATH", str(path)))
    assert path.read_bytes() == content


def test_api_key_refuses_entries_that_the_server_would_refuse(tmp_path: Path) -> None:
    assert refused("api-key", "--tenant", "", "--file", tmp_path / "k").startswith("keys[0].tenant: expected")
    assert refused("api-key", "--tenant", "a", "--scope", "infre").startswith("keys[0].scopes: expected")
    assert refused("api-key", "--tenant", "a", "--scope", "").startswith("keys[0].scopes: expected")
    assert refused("api-key", "--tenant", "a", "--file", tmp_path / "no" / "k").startswith("cannot write")
    assert list(tmp_path.iterdir()) == []


def test_help_says_that_it_is_for_development() -> None:
    for command in ([], ["init"], ["mint"], ["keypair"]):
        assert "In production an issuer signs" in " ".join(output_of(*command, "--help").split())
