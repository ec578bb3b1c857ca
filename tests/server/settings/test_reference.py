"""docs/configuration.md and the JSON schema: generated from the structs, complete and correct."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from cobatch.server.settings.describe import settings_of
from cobatch.server.settings.load import load_settings
from cobatch.server.settings.schema import (
    FILE_ONLY,
    MODEL_FIELDS,
    SERVER_FIELDS,
    ModelSettings,
    ServerSettings,
)
from tests.support.auth.certificates import Pair
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
REFERENCE = (DOCS / "configuration.md").read_text()
SCHEMA = jsonschema_rs.validator_for(json.loads((DOCS / "cobatch.schema.json").read_text()))


def documents() -> list[dict[str, Any]]:
    """Return the configurations in the documentation."""
    pages = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    texts = [text for page in pages for text in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)]
    found = [tomllib.loads(text) for text in texts]
    return [document for document in found if document.keys() & {"server", "models", "auth"}]


def test_the_generated_files_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "docs.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_every_setting_is_in_the_reference_with_flag_and_variable() -> None:
    for name in [*SERVER_FIELDS, *(MODEL_FIELDS.keys() - {"path"})]:
        flag, variable = f"--{name.replace('_', '-')}", f"COBATCH_{name.upper()}"
        assert re.search(
            rf"^\| `{name}` \| .* \| `{flag}`.* \| `{variable}` \| [A-Z]", REFERENCE, re.MULTILINE
        )


def test_every_setting_has_a_meaning() -> None:
    for struct in (ServerSettings, ModelSettings):
        for setting in settings_of(struct).values():
            assert setting.help
            assert setting.is_switch or setting.placeholder or setting.name in FILE_ONLY


def test_the_example_is_accepted(tmp_path: Path) -> None:
    example = REFERENCE.partition("```toml\n")[2].partition("```")[0]
    for name in ("encoder.onnx", "ranker.plan"):
        (tmp_path / name).touch()
    pair = Pair()
    (tmp_path / "server.pem").write_bytes(pair.certificate + pair.key())
    (tmp_path / "cobatch.toml").write_text(example)
    settings = load_settings(tmp_path / "cobatch.toml", {}, {})
    assert [model.name for model in settings.models] == ["encoder", "ranker"]
    assert settings.models[1].devices == (0, 1)
    assert settings.auth is not None


@pytest.mark.parametrize("document", documents())
def test_the_schema_accepts_the_configurations_of_the_documentation(document: dict[str, Any]) -> None:
    SCHEMA.validate(document)


@pytest.mark.parametrize(
    "text",
    [
        "[sever]",
        "[server]\nprot = 1",
        "[server]\nport = 65536",
        "[server]\nlog_level = 'loud'",
        "[[models]]\nname = 'a'",
        "[[models]]\npath = 'a'\nname = 'a/b'",
        "[[models]]\npath = 'a'\npad = [{axis = 0}]",
        "[auth]\nissuers = [{issuer = 'a', algorithms = ['none']}]",
        "[auth]\ntenants = [{rate = 1}]",
    ],
)
def test_the_schema_refuses_mistakes(text: str) -> None:
    assert not SCHEMA.is_valid(tomllib.loads(text))


def test_the_schema_accepts_lists_and_text() -> None:
    for devices in ([0, 1], "0,1"):
        SCHEMA.validate({"models": [{"path": "a.plan", "devices": devices, "name": "a.Z-1"}]})
    for audience in (["a"], "a"):
        SCHEMA.validate({"auth": {"audience": audience}})
