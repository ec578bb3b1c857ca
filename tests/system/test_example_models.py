"""The examples of models in Python, served and asked as their docs say.

PyTorch's wheel is too large for CI: that example runs where torch is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cobatch.engines.base import AUTO
from cobatch.engines.python.model import load
from tests.support.http.process import Cobatch
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples" / "python_models"


def ask(folder: Path, model: str, datatype: str, rows: list[list[Any]], name: str) -> dict[str, Any]:
    """Serve an example; return its outputs for these rows by name."""
    shape = [len(rows), len(rows[0])]
    tensor = {"name": name, "shape": shape, "datatype": datatype, "data": rows}
    with Cobatch(folder, model, "--port", "0", cwd=EXAMPLES) as server:
        connection = server.ready().connect()
        answer = connection.post(f"/v2/models/{model.partition(':')[2]}/infer", {"inputs": [tensor]})
        assert answer.status == 200, answer.body
        assert server.stop() == 0
    return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in answer.json["outputs"]}


def test_scikit_learn(tmp_path: Path) -> None:
    rows = [[5.1, 3.5, 1.4, 0.2], [6.3, 3.3, 6.0, 2.5]]
    outputs = ask(tmp_path, "scikit_learn.py:Irises", "FP32", rows, "lengths")
    assert outputs["name"].tolist() == ["setosa", "virginica"]
    assert outputs["probabilities"].sum(1).tolist() == pytest.approx([1, 1])


def test_a_function(tmp_path: Path) -> None:
    outputs = ask(tmp_path, "function.py:count_letters", "BYTES", [["Abba"], ["zoo"]], "text")
    assert outputs["output"][:, [0, 1, 14, 25]].tolist() == [[2, 2, 0, 0], [0, 0, 2, 1]]


def test_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    model = load("pytorch.py:Network", str(EXAMPLES), 0, AUTO)
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    (expected,) = model.run([x])
    outputs = ask(tmp_path, "pytorch.py:Network", "FP32", x.tolist(), "x")
    assert outputs["y"] == pytest.approx(expected, rel=1e-5)
