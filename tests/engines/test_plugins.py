"""Engines of other packages, from the metadata that pip writes to an answer over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cobatch.engines.errors import EngineLoadError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.server.cli import app
from cobatch.server.settings.load import load_settings
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.settings.values import SettingsError
from tests.support.http.in_process import in_process
from tests.support.plugin import ENGINE, install

ADDING = "adding = adding_engine:Adding\n.number = adding_engine:Adding"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the packages `adding_engine` and `broken_engine`, which cannot be imported."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    install(folder, "adding_engine", ENGINE, ADDING)
    install(folder, "broken_engine", "import no_such_library", "broken = broken_engine:Broken", "2.3")
    for module in ("adding_engine", "broken_engine"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "five.number"
    path.write_text("5")
    return path


@pytest.mark.parametrize("engine", ["auto", "adding"])
async def test_an_engine_of_a_package_serves(packages: Path, model: Path, engine: str) -> None:
    settings = ModelSettings(path=str(model), engine=engine, engine_options={"times": 2})
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    async with in_process(settings) as running:
        answer = await running.http.post("/v2/models/five/infer", json={"inputs": [tensor]})
        about = await running.http.get("/v2/models/five")
    assert answer.json()["outputs"][0]["data"] == [11, 12, 13]
    assert about.json()["platform"] == "adding"


def test_only_the_engine_that_is_asked_for_is_imported(packages: Path, model: Path) -> None:
    load_engine("onnxruntime", "model.onnx", 4)
    with pytest.raises(EngineLoadError, match="no engine for"):
        load_engine("auto", "model.unknown", 4)
    assert not {"adding_engine", "broken_engine"} & set(sys.modules)
    load_engine("auto", model, 4)
    assert {"adding_engine", "broken_engine"} & set(sys.modules) == {"adding_engine"}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("Other = 1", "AttributeError: module 'broken_engine' has no attribute 'Broken'"),
        ("raise OSError('no driver')", "OSError: no driver"),
        ("def Broken(*_): return 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_engine_that_cannot_be_imported_is_named(packages: Path, model: Path, code: str, why: str) -> None:
    (packages / "broken_engine.py").write_text(code)
    with pytest.raises(EngineLoadError) as refused:
        load_engine("broken", model, 4)
    assert str(refused.value) == f"engine 'broken' of broken_engine 2.3 cannot be used here: {why}"
    assert load_engine("adding", model, 4).platform == "adding"


def test_an_engine_of_two_packages_is_refused(packages: Path, model: Path) -> None:
    install(packages, "also_adding", ENGINE, "adding = also_adding:Adding")
    with pytest.raises(EngineLoadError, match=r"in several packages: adding_engine 1\.0, also_adding 1\.0"):
        load_engine("adding", model, 4)


def test_an_unknown_engine_is_refused_with_those_there_are(packages: Path, model: Path) -> None:
    expected = "one of auto, onnxruntime, tensorrt, adding, broken"
    with pytest.raises(SettingsError) as refused:
        load_settings(None, {}, {"model": model, "engine": "adder"})
    assert str(refused.value) == f"models[*].engine: expected {expected}, got 'adder' (flag --engine)"
    with pytest.raises(EngineLoadError, match=r"unknown engine 'adder'; expected one of .*, adding, broken"):
        load_engine("adder", model, 4)


def test_engines_of_ours_take_no_options_of_other_packages() -> None:
    with pytest.raises(EngineLoadError, match="'onnxruntime' takes no engine_options"):
        load_engine("auto", "model.onnx", 4, EngineOptions(own={"times": 2}))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("engine_options.factor = 2", "engine_options: unknown key 'factor'; expected times"),
        ("engine = 'broken'", "engine 'broken' of broken_engine 2.3 cannot be used here"),
        (
            "engine = 'onnxruntime'\nproviders = ['RockExecutionProvider']",
            "this ONNX Runtime has no RockExecutionProvider, only",
        ),
        ("engine = 'onnxruntime'\nengine_options.times = 2", "engine 'onnxruntime' takes no engine_options"),
    ],
)
def test_check_says_why_an_engine_cannot_be_used(packages: Path, model: Path, text: str, why: str) -> None:
    config = model.with_name("cobatch.toml")
    config.write_text(f"[[models]]\npath = 'five.number'\n{text}\n")
    refused = CliRunner().invoke(app, ["serve", "--config", str(config), "--check"])
    assert refused.exit_code == 2
    assert f"cobatch: models[0].engine: {why}" in refused.stderr
    config.write_text("[[models]]\npath = 'five.number'\nengine_options.times = 2\n")
    assert CliRunner().invoke(app, ["serve", "--config", str(config), "--check"]).exit_code == 0


def test_check_finds_the_engine_of_a_suffix(packages: Path, model: Path) -> None:
    (packages / "adding_engine.py").write_text("import no_such_library")
    refused = CliRunner().invoke(app, ["serve", str(model), "--check"])
    assert "engine '.number' of adding_engine 1.0 cannot be used here: ModuleNotFoundError" in refused.stderr
    refused = CliRunner().invoke(app, ["serve", __file__, "--check"])
    assert f"cobatch: models[0].engine: no engine for {__file__}: expected an .onnx" in refused.stderr


def test_inspect_opens_it(packages: Path, model: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(model)])
    assert shown.stdout.startswith(f"five  adding  {model}\n")
