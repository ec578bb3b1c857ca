"""Settings of a TensorRT model: how they are given, checked, and what the engine is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.base import Engine
from engines.loader import ENGINES, EngineOptions, load_engine
from server.engine_options import engine_options
from server.setting_values import SettingsError
from server.settings import ModelSettings, load_settings
from tests import models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(models.write(tmp_path, models.negate()))


def given(model: Path, **flags: object) -> ModelSettings:
    (settings,) = load_settings(None, {}, {"model": model, **flags}).models
    return settings


def test_defaults(model: Path) -> None:
    assert engine_options(given(model)) == EngineOptions()


def test_flags(model: Path) -> None:
    flags = {
        "threads": "2",
        "device": "1",
        "batch_buckets": "1,4,64",
        "cuda_graphs": False,
        "plan_cache": "~/plans",
        "plan_host_code": True,
        "tensorrt_runtime": "tensorrt-rtx",
    }
    assert engine_options(given(model, **flags)) == EngineOptions(
        threads=2,
        device=1,
        batch_buckets=(1, 4, 64),
        tensorrt_runtime="tensorrt-rtx",
        cuda_graphs=False,
        plan_cache=Path.home() / "plans",
        plan_host_code=True,
    )


def test_a_files_plan_cache_is_relative_to_the_file(model: Path) -> None:
    config = model.with_name("cobatch.toml")
    for written, means in (("plans", model.parent / "plans"), ("/plans", Path("/plans"))):
        config.write_text(f'[[models]]\npath = "model.onnx"\nplan_cache = "{written}"\n')
        (settings,) = load_settings(config, {}, {}).models
        assert engine_options(settings).plan_cache == means


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("batch_buckets", "", "text that is not empty"),
        ("batch_buckets", "0", "sizes with commas between them (1,4,16)"),
        ("batch_buckets", "1,", "sizes with commas between them (1,4,16)"),
        ("batch_buckets", "1, 2", "sizes with commas between them (1,4,16)"),
        ("batch_buckets", "4x", "sizes with commas between them (1,4,16)"),
        ("device", "-1", "an integer from 0 to 1023"),
        ("tensorrt_runtime", "cuda", "one of tensorrt, tensorrt-rtx"),
    ],
)
def test_refusals(model: Path, setting: str, value: str, expected: str) -> None:
    with pytest.raises(SettingsError) as refused:
        given(model, **{setting: value})
    flag = f"--{setting.replace('_', '-')}"
    assert str(refused.value) == f"models[*].{setting}: expected {expected}, got {value!r} (flag {flag})"


@pytest.mark.parametrize(
    ("name", "kind"), [("m.onnx", "onnxruntime"), ("m.plan", "tensorrt"), ("m.engine", "tensorrt")]
)
def test_what_opens_a_file(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, EngineOptions]] = []
    made: Engine = object()  # type: ignore[assignment]  # nobody asks it anything

    def make(path: str, max_batch_size: int, options: EngineOptions) -> Engine:
        asked.append((path, max_batch_size, options))
        return made

    monkeypatch.setitem(ENGINES, kind, make)
    options = EngineOptions(device=1)
    assert load_engine("auto", Path(name), 4, options) is made
    assert load_engine(kind, name, 4, options) is made
    assert asked == [(name, 4, options)] * 2
