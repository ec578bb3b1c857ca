"""The example of an engine in a package of its own, with OpenVINO itself."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from cobatch.engines.base import AUTO, Batching, Engine
from cobatch.engines.errors import EngineLoadError, EngineRunError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.server.settings.schema import ModelSettings
from tests.support.http.in_process import in_process
from tests.support.models import models
from tests.support.paths import ROOT
from tests.support.plugin import install

pytest.importorskip("openvino", reason="needs OpenVINO: pip install openvino")
PACKAGE = ROOT / "examples" / "openvino_engine"


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the package, with the entry points in its pyproject.toml."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["cobatch.engines"]
    entries = "\n".join(f"{name} = {value}" for name, value in points.items())
    folder = tmp_path / "site-packages"
    folder.mkdir()
    install(folder, "cobatch_openvino", (PACKAGE / "cobatch_openvino.py").read_text(), entries)
    monkeypatch.syspath_prepend(str(folder))


def opened(path: str, most_rows: int = 4, batching: Batching = AUTO, **own: object) -> Engine:
    options = EngineOptions(threads=1, own=own, batching=batching)
    engine = load_engine("openvino", path, most_rows, options)
    engine.open()
    return engine


def run(engine: Engine, *inputs: Any, slot: int = 0) -> list[Any]:
    shapes = tuple(rows.shape[1:] for rows in inputs)
    for buffer, rows in zip(engine.inputs(slot, len(inputs[0]), shapes), inputs, strict=True):
        buffer[: len(rows)] = rows
    engine.enqueue(slot, len(inputs[0]), shapes)
    return [output.copy() for output in engine.wait(slot)]


async def test_it_serves_onnx_files_and_its_own(tmp_path: Path) -> None:
    import openvino  # noqa: PLC0415 - only where it is installed

    path = models.write(tmp_path, models.negate())
    openvino.save_model(openvino.Core().read_model(path), tmp_path / "own.xml")
    tensor = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6]}
    served = (
        ModelSettings(path=path, engine="openvino", engine_options={"properties": {"NUM_STREAMS": 1}}),
        ModelSettings(path=str(tmp_path / "own.xml")),
    )
    async with in_process(*served) as running:
        for name in ("model", "own"):
            answer = await running.http.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]})
            assert answer.json()["outputs"][0]["data"] == [-1, -2, -3, -4, -5, -6]
            about = (await running.http.get(f"/v2/models/{name}")).json()
            assert (about["platform"], about["inputs"][0]["shape"]) == ("openvino", [-1, 3])


def test_slots_run_at_the_same_time_with_rows_of_any_width(tmp_path: Path) -> None:
    engine = opened(models.write(tmp_path, models.negate(width="width")))
    assert engine.signature.batching.verdict == "proven"
    given = [np.full((rows, width), rows, np.float32) for rows, width in ((2, 5), (4, 1))]
    for slot, rows in enumerate(given):
        engine.inputs(slot, len(rows), (rows.shape[1:],))[0][: len(rows)] = rows
        engine.enqueue(slot, len(rows), (rows.shape[1:],))
    for slot, rows in enumerate(given):
        (output,) = engine.wait(slot)
        assert (output == -rows).all()
    engine.close()


def test_a_fixed_batch_is_padded(tmp_path: Path) -> None:
    engine = opened(models.write(tmp_path, models.negate(batch=3)), 64)
    assert (engine.max_batch_size, engine.signature.fixed_batch) == (3, 3)
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    (output,) = run(engine, rows)
    assert (output == -rows).all()
    assert output.shape == (2, 3)


def test_a_model_whose_rows_depend_on_each_other_runs_alone(tmp_path: Path) -> None:
    softmax = helper.make_node("Softmax", ["x"], ["y"], axis=0)
    x: models.Value = ("x", TensorProto.FLOAT, ["n", 2])
    y: models.Value = ("y", TensorProto.FLOAT, ["n", 2])
    engine = opened(models.write(tmp_path, models.model([softmax], [x], [y])))
    assert (engine.signature.batching.verdict, engine.max_batch_size) == ("disproved", 1)
    (output,) = run(engine, np.zeros((1, 4, 2), np.float32))
    assert (output == np.full((1, 4, 2), 0.25, np.float32)).all()


def test_what_it_refuses(tmp_path: Path) -> None:
    path = models.write(tmp_path, models.negate())
    refused: list[tuple[dict[str, Any], str]] = [
        ({"devise": "CPU"}, "unknown key 'devise'; expected device or properties"),
        ({"device": "TOASTER"}, "there is no device 'TOASTER' here, only CPU"),
        ({"properties": {"NOTHING": 1}}, "Unsupported property NOTHING"),
    ]
    for options, why in refused:
        with pytest.raises(EngineLoadError, match=why):
            opened(path, **options)
    with pytest.raises(EngineLoadError, match="is not supported"):
        opened(models.write(tmp_path, models.identity(TensorProto.STRING)))
    (tmp_path / "bad.xml").write_text("no model")
    with pytest.raises(EngineLoadError, match="OpenVINO cannot load"):
        opened(str(tmp_path / "bad.xml"))


def test_a_failed_run_is_an_error_of_that_run(tmp_path: Path) -> None:
    engine = opened(models.write(tmp_path, models.negate()), batching=Batching("on"))
    with pytest.raises(EngineRunError):
        run(engine, np.zeros((1, 4), np.float32))
    assert (run(engine, np.ones((1, 3), np.float32))[0] == -1).all()
