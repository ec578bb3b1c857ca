"""Settings of a TensorRT model: their forms, their checks, and the options of the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from cobatch.engines.base import Engine
from cobatch.engines.loader import ENGINES, EngineOptions, load_engine
from cobatch.server.inference.engines import Place, engine_options, places
from cobatch.server.settings.load import load_settings
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.settings.values import SettingsError
from tests.support.models import models

ALONE = Place(0, 0, alone=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(models.write(tmp_path, models.negate()))


def given(model: Path, **flags: object) -> ModelSettings:
    (settings,) = load_settings(None, {}, {"model": model, **flags}).models
    return settings


def test_defaults(model: Path) -> None:
    settings = given(model)
    assert places(settings) == [ALONE]
    assert engine_options(settings, ALONE) == EngineOptions()


def test_flags(model: Path) -> None:
    flags = {
        "threads": "2",
        "engine": "tensorrt",
        "devices": "1",
        "slots": "3",
        "batch_buckets": "1,4,64",
        "cuda_graphs": False,
        "plan_cache": "~/plans",
        "plan_host_code": True,
        "tensorrt_runtime": "tensorrt-rtx",
    }
    settings = given(model, **flags)
    (place,) = places(settings)
    assert engine_options(settings, place) == EngineOptions(
        threads=2,
        device=1,
        slots=3,
        batch_buckets=(1, 4, 64),
        tensorrt_runtime="tensorrt-rtx",
        cuda_graphs=False,
        plan_cache=Path.home() / "plans",
        plan_host_code=True,
    )


def test_instances_on_each_device(model: Path) -> None:
    settings = given(model, devices="0,2", instances="2", engine="tensorrt")
    found = places(settings)
    assert [(place.device, place.instance) for place in found] == [(0, 0), (2, 0), (0, 1), (2, 1)]
    assert len({place.suffix for place in found}) == 4
    assert [engine_options(settings, place).device for place in found] == [0, 2, 0, 2]


def test_instances_share_the_cores_that_one_would_have(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    for instances, threads in (("1", None), ("2", 4), ("3", 2), ("20", 1)):
        assert engine_options(given(model, instances=instances), ALONE).threads == threads
    assert engine_options(given(model, instances="2", threads="7"), ALONE).threads == 7


def test_a_file_may_say_it_with_lists(model: Path) -> None:
    config = model.with_name("cobatch.toml")
    config.write_text(
        '[[models]]\npath = "model.onnx"\nengine = "tensorrt"\ndevices = [0, 1]\nbatch_buckets = [1, 8]\n'
    )
    (settings,) = load_settings(config, {}, {}).models
    assert [place.device for place in places(settings)] == [0, 1]
    assert engine_options(settings, ALONE).batch_buckets == (1, 8)
    config.write_text('[[models]]\npath = "model.onnx"\ndevices = [0, "one"]\n')
    with pytest.raises(SettingsError, match="devices"):
        load_settings(config, {}, {})


def test_a_files_plan_cache_is_relative_to_the_file(model: Path) -> None:
    config = model.with_name("cobatch.toml")
    for written, means in (("plans", model.parent / "plans"), ("/plans", Path("/plans"))):
        config.write_text(f'[[models]]\npath = "model.onnx"\nplan_cache = "{written}"\n')
        (settings,) = load_settings(config, {}, {}).models
        assert engine_options(settings, ALONE).plan_cache == means


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("batch_buckets", "", "a comma-separated list of integers from 1 to 999999"),
        ("batch_buckets", "0", "a comma-separated list of integers from 1 to 999999"),
        ("batch_buckets", "1,", "a comma-separated list of integers from 1 to 999999"),
        ("batch_buckets", "1, 2", "a comma-separated list of integers from 1 to 999999"),
        ("batch_buckets", "4x", "a comma-separated list of integers from 1 to 999999"),
        ("devices", "-1", "a comma-separated list of integers from 0 to 9999"),
        ("devices", "0,", "a comma-separated list of integers from 0 to 9999"),
        ("instances", "0", "an integer from 1 to 64"),
        ("tensorrt_runtime", "cuda", "one of tensorrt, tensorrt-lean, tensorrt-rtx"),
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
def test_the_engine_for_each_kind_of_file(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, EngineOptions]] = []
    made: Engine = object()  # type: ignore[assignment]  # it is never used

    def make(path: str, max_batch_size: int, options: EngineOptions) -> Engine:
        asked.append((path, max_batch_size, options))
        return made

    monkeypatch.setitem(ENGINES, kind, make)
    options = EngineOptions(device=1)
    assert load_engine("auto", Path(name), 4, options) is made
    assert load_engine(kind, name, 4, options) is made
    assert asked == [(name, 4, options)] * 2
