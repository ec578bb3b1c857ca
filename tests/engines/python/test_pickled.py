"""The model that runs a function in a process of its own, called here."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cobatch.engines.python.pickled import Calls, Reference, refer_to
from tests.support.library import functions


def answer(calls: Calls, item: Any) -> bytes:
    """Return the answer to a batch of one item."""
    data: bytes = calls.predict({"calls": np.array([pickle.dumps(item)], object)})[0]
    return data


def test_the_module_is_imported_before_the_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy_one.py").write_text("def same(items):\n    return items")
    monkeypatch.syspath_prepend(str(tmp_path))
    calls = Calls(*Reference("heavy_one", "", "same", "same", stack=False))
    calls.load()
    assert "heavy_one" in sys.modules
    assert pickle.loads(answer(calls, 3)) == 3
    monkeypatch.delitem(sys.modules, "heavy_one")


def test_each_batch_says_that_the_module_cannot_be_imported() -> None:
    calls = Calls(*Reference("not_there_at_all", "", "same", "same", stack=False))
    calls.load()
    for _ in range(2):
        raised = answer(calls, 3)
        assert raised.startswith(b"!")
        assert isinstance(pickle.loads(raised[1:]), ModuleNotFoundError)


@pytest.mark.parametrize("function", [functions.twice, functions.outer, functions.inner])
def test_other_decorators_of_the_function_are_kept(function: Any) -> None:
    calls = Calls(*refer_to(function, "twice", stack=False))
    assert pickle.loads(answer(calls, 3)) == 6
