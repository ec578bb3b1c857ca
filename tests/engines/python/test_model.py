"""Models in Python: how they are found, their declarations, and their outputs."""

from __future__ import annotations

import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cobatch.engines.base import AUTO, Batching
from cobatch.engines.errors import BadRequest, EngineLoadError, EngineRunError, OutputError
from cobatch.engines.python.model import PythonModel, load
from tests.support.python_models import faulty

FOLDER = str(Path(faulty.__file__).parent)
HEAD = """
from typing import Annotated, Any, TypedDict
import numpy as np
X = Annotated[np.ndarray, "FP32", [-1, 3]]
"""


def loaded(folder: Path, text: str, name: str = "model", batching: Batching = AUTO) -> PythonModel:
    number = len(list(folder.iterdir()))
    (folder / f"app{number}.py").write_text(HEAD + text)
    return load(f"app{number}.py:{name}", str(folder), 0, batching)


def refusal(folder: Path, text: str, name: str = "model", batching: Batching = AUTO) -> str:
    with pytest.raises(EngineLoadError) as caught:
        loaded(folder, text, name, batching)
    return str(caught.value)


def test_a_class_with_attributes() -> None:
    model = load("faulty.py:Faulty", FOLDER, 0, AUTO)
    (x,), (y,) = model.signature.inputs, model.signature.outputs
    assert (x.name, x.datatype, x.full_shape) == ("x", "INT64", (-1, 1))
    assert (y.name, y.datatype, y.full_shape) == ("y", "INT64", (-1, 1))
    assert model.signature.batching == Batching("on")
    assert model.run([np.array([[1], [2]])])[0].tolist() == [[2], [4]]


def test_attributes_that_load_sets(tmp_path: Path) -> None:
    text = """
class Model:
    def load(self, device):
        self.inputs = {"x": ("FP32", (-1, 3 + device))}
        self.outputs = {"y": ("FP32", [-1])}
    def predict(self, batch):
        return {"y": batch["x"].sum(1)}
model = Model()
"""
    (tmp_path / "app.py").write_text(text)
    model = load("app.py:model", str(tmp_path), 2, AUTO)
    assert model.signature.inputs[0].shape == (5,)


@pytest.mark.parametrize(
    "text",
    [
        "def model(x: X) -> Annotated[np.ndarray, 'FP32', [-1]]:\n    return x.sum(1)",
        """
class In(TypedDict):
    x: X
class Out(TypedDict):
    output: Annotated[np.ndarray, 'FP32', [-1]]
def model(batch: In) -> Out:
    return {'output': batch['x'].sum(1)}""",
        """
class model:
    outputs = {'output': ('FP32', [-1])}
    def predict(self, x: X):
        return x.sum(1)""",
        """
class model:
    inputs = {'x': ('FP32', [-1, 3])}
    def predict(self, batch) -> Annotated[np.ndarray, 'FP32', [-1]]:
        return batch['x'].sum(1)""",
    ],
    ids=["tensors", "dicts", "only inputs", "only outputs"],
)
def test_annotations(tmp_path: Path, text: str) -> None:
    model = loaded(tmp_path, text)
    assert [(one.name, one.datatype, one.shape) for one in model.signature.inputs] == [("x", "FP32", (3,))]
    assert [(one.name, one.shape) for one in model.signature.outputs] == [("output", ())]
    assert model.run([np.ones((2, 3), np.float32)])[0].tolist() == [3, 3]


def test_a_module_in_the_folder_or_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ours_here"
    package.mkdir()
    (package / "parts.py").write_text("from . import more\nmodel = more.model")
    (package / "more.py").write_text(HEAD + "def model(x: X) -> X:\n    return x")
    monkeypatch.syspath_prepend(str(Path(FOLDER).parent))
    assert load("ours_here.parts:model", str(tmp_path), 0, AUTO).signature.inputs[0].name == "x"
    assert load("python_models.faulty:upper", str(tmp_path), 0, AUTO).signature.inputs[0].name == "text"


@pytest.mark.parametrize("alone", [False, True])
def test_its_modules_hide_no_others_of_the_server(tmp_path: Path, alone: bool) -> None:
    (tmp_path / "antigravity.py").write_text("")  # a name of Python's own that nothing imports
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "app.py").write_text(HEAD + "import beside\ndef model(x: X) -> X:\n    return x")
    load("app.py:model", str(tmp_path), 0, AUTO, alone=alone)
    spec = importlib.util.find_spec("antigravity")
    assert spec is not None
    assert (spec.origin == str(tmp_path / "antigravity.py")) == alone


def test_a_file_that_another_thread_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_end = threading.Event(), threading.Event()
    monkeypatch.setitem(sys.modules, "gate", SimpleNamespace(began=began, may_end=may_end))
    text = "import gate\ngate.began.set()\nassert gate.may_end.wait(60)\ndef model(x: X) -> X:\n    return x"
    (tmp_path / "shared.py").write_text(HEAD + text)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(load, "shared.py:model", str(tmp_path), 0, AUTO)
        assert began.wait(60)
        second = threads.submit(load, "shared.py:model", str(tmp_path), 0, AUTO)
        try:
            with pytest.raises(TimeoutError):
                second.result(timeout=0.05)
        finally:
            may_end.set()
        assert first.result().found is second.result().found


def test_whole_tensors() -> None:
    model = load("faulty.py:mean", FOLDER, 0, AUTO)
    assert not model.signature.batching.on
    assert model.signature.inputs[0].full_shape == (3, -1)
    assert model.run([np.ones((1, 3, 5), np.float32)])[0].tolist() == [1.0]
    with pytest.raises(EngineLoadError, match='it cannot be batched; set batching = "off"'):
        load("faulty.py:mean", FOLDER, 0, Batching("on"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no 'model'"),
        ("model = 3", "model has no method `predict`, and is no function"),
        ("import nothing_like_it", "No module named 'nothing_like_it'"),
        ("1 / 0", "ZeroDivisionError: division by zero (app0.py, line 5)"),
        ("class model:\n    def __init__(self):\n        1 / 0", "model() failed: ZeroDivisionError"),
        (
            "class model:\n    def load(self):\n        1 / 0\n    def predict(self, batch): ...",
            "model.load failed: ZeroDivisionError",
        ),
        ("def model(x): ...", "inputs are not declared"),
        ("def model(x: X): ...", "outputs are not declared"),
        ("def model(x: np.ndarray) -> X: ...", "inputs['x']: expected a datatype of V2 and a shape"),
        ("def model(x: 'Y') -> X: ...", "the annotations cannot be read: NameError: name 'Y' is not defined"),
        ("def model(x: Annotated[Any, 'FP31', [-1]]) -> X: ...", "got ('FP31', [-1])"),
        ("def model(x: Annotated[Any, 'FP32', [-2]]) -> X: ...", "got ('FP32', [-2])"),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    for source in ("nowhere.py:model", "not_there_at_all:model", "model"):
        with pytest.raises(EngineLoadError, match=source.partition(":")[0]):
            load(source, str(tmp_path), 0, AUTO)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (1, "output 'z': expected INT64 [2], got nothing"),
        (2, "output 'y': expected FP32 [2, 2], got FP64 [2, 2]"),
        (3, "output 'y': expected FP32 [2, 2], got FP32 [2, 1]"),
        (4, "output 'z': expected INT64 [2], got INT64 [3]"),
        (5, "output 'z': expected INT64 [2], got list, which is no NumPy array"),
        (6, "predict returned an output 'w', expected 'y', 'z'"),
        (7, "predict returned NoneType, expected a dict of arrays"),
        (8, "predict returned ndarray, expected a dict of arrays"),
    ],
)
def test_wrong_outputs(number: int, message: str) -> None:
    model = load("faulty.py:Wrong", FOLDER, 0, AUTO)
    with pytest.raises(OutputError) as caught:
        model.run([np.full((2, 1), number)])
    assert message in str(caught.value)


def test_an_error_has_the_models_part_of_the_traceback() -> None:
    model = load("faulty.py:Faulty", FOLDER, 0, AUTO)
    with pytest.raises(EngineRunError) as caught:
        model.run([np.full((1, 1), faulty.FAILS)])
    assert "ValueError: no such row" in str(caught.value)
    assert "cobatch/engines" not in str(caught.value)


def test_a_refusal_has_the_models_words_and_no_frames() -> None:
    """Frames would keep the batch's rows for as long as the error."""
    model = load("faulty.py:Faulty", FOLDER, 0, AUTO)
    with pytest.raises(BadRequest, match="1008 is no number") as caught:
        model.run([np.full((1, 1), faulty.REFUSED)])
    assert type(caught.value) is BadRequest
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert str(BadRequest()) == "the model refuses this request"
