"""Run the `cobatch token` commands, and check their files and tokens."""

import shutil
import stat
from pathlib import Path
from typing import Any

import jwt
import pytest
from typer.testing import CliRunner, Result

from cobatch.server.auth.keys import load_key_files
from cobatch.server.cli.token import token_app

ISSUER, ADDRESS = "https://cobatch.dev.invalid", "http://127.0.0.1:8000"


def token(*arguments: str | Path) -> Result:
    return CliRunner().invoke(token_app, [str(argument) for argument in arguments])


def output_of(*arguments: str | Path) -> str:
    result = token(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path) -> str:
    result = token(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("cobatch: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("cobatch: ").rstrip()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that `init` generated. Tests that change it use `folder`, a copy."""
    folder = tmp_path_factory.mktemp("generated") / "dev"
    output_of("init", folder)
    return folder


@pytest.fixture
def folder(generated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(generated, tmp_path / "dev"))


def verified(minted: str, folder: Path, algorithm: str = "RS256") -> dict[str, Any]:
    (key,) = load_key_files([folder / "dev-jwks.json"], [algorithm])
    header = jwt.get_unverified_header(minted)
    assert header == {"typ": "at+jwt", "alg": algorithm, "kid": key.kid}
    return dict(jwt.decode(minted, key.material, [algorithm], audience=ADDRESS, issuer=ISSUER))
