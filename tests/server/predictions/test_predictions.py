"""The native resource: the prediction object and its fields."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cobatch.server.predictions import routes
from cobatch.server.predictions.store import Prediction
from tests.support.http.predicting import App, b64, outputs, slug, small_models
from tests.support.http.released import Released

X = np.array([[1.5, -2, 3], [4, 5, 6]], np.float32)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async with small_models(tmp_path) as made:
        yield made


async def test_a_refused_prediction_is_gone(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    released = Released()
    monkeypatch.setattr(routes, "Prediction", lambda *given: released.watch(Prediction(*given)))
    answer = await app.predict("negate", {"inputs": {"x": X.tolist()}, "deadline_ms": 1e-4})
    assert slug(answer) in ("deadline-unreachable", "deadline-too-short")
    released.check()


# The object


async def test_the_whole_object(app: App) -> None:
    answer = await app.predict("negate", {"inputs": {"x": X.tolist()}})
    object_ = answer.json()
    assert list(object_) == ["id", "status", "model", "outputs", "usage"]
    assert object_["model"] == "negate"
    assert outputs(answer) == {"y": {"dtype": "float32", "shape": [2, 3], "data": (-X).tolist()}}
    usage = object_["usage"]
    assert (usage["rows"], usage["batch_rows"]) == (2, 2)
    assert all(isinstance(usage[name], int) and usage[name] > 0 for name in ("queue_us", "compute_us"))
    assert answer.headers["server-timing"].endswith("batch;desc=2, reason;desc=idle")


async def test_only_the_wanted_outputs(app: App) -> None:
    inputs = {"x": [[1, 2]], "k": [[10]]}
    assert list(outputs(await app.predict("add", {"inputs": inputs}))) == ["total", "count"]
    answer = await app.predict("add", {"inputs": inputs, "outputs": ["count"]})
    assert outputs(answer) == {"count": {"dtype": "int64", "shape": [1, 1], "data": [[20]]}}
    assert outputs(await app.predict("add", {"inputs": inputs, "outputs": []})) == {}


async def test_a_request_larger_than_a_batch_comes_back_whole(app: App) -> None:
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    answer = await app.predict("negate", {"inputs": {"x": x.tolist()}})
    assert outputs(answer)["y"]["data"] == (-x).tolist()
    assert answer.json()["usage"]["rows"] == 10
    assert answer.json()["usage"]["batch_rows"] <= 4


async def test_rows_that_failed_are_named_and_null(app: App) -> None:
    # Parts of four rows; the third has an index out of range.
    good = [0, 1, 2, 0]
    rows = [[value] for value in [*good, *good, 0, 99, 0, 0, *good, 1]]
    answer = await app.predict("pick", {"inputs": {"x": rows}})
    assert answer.status_code == 200
    object_ = answer.json()
    assert object_["status"] == "incomplete"
    details = object_["incomplete_details"]
    assert (details["reason"], details["rows"]) == ("input-rejected", [[8, 11]])
    data = object_["outputs"]["y"]["data"]
    picked = [[10], [20], [30], [10]]
    assert data == [*picked, *picked, None, None, None, None, *picked, [20]]
    answer = await app.predict("pick", {"inputs": {"x": [*[[99]] * 8, [1]]}, "top_k": 1})
    assert answer.json()["incomplete_details"]["rows"] == [[0, 7]]
    assert answer.json()["outputs"]["y"]["top_k"] == [*[None] * 8, [{"index": 0, "score": 20}]]


async def test_a_failed_prediction_is_a_problem_that_contains_the_object(app: App) -> None:
    answer = await app.predict("pick", {"inputs": {"x": [[99]]}})
    assert (answer.status_code, slug(answer)) == (422, "input-rejected")
    problem = answer.json()
    assert problem["reference"] in problem["detail"]
    assert problem["prediction"].keys() == {"id", "status", "model"}
    assert problem["prediction"]["status"] == "failed"


# top_k


async def test_top_k_is_descending_and_stable(app: App) -> None:
    answer = await app.predict("negate", {"inputs": {"x": [[3, 1, 2], [1, 1, 1]]}, "top_k": 2})
    y = outputs(answer)["y"]
    assert y["shape"] == [2, 3]
    assert "data" not in y
    first, second = y["top_k"]
    assert first == [{"index": 1, "score": -1}, {"index": 2, "score": -2}]
    assert [best["index"] for best in second] == [0, 1]


async def test_top_k_of_many_axes_beyond_the_size_and_of_nan(app: App) -> None:
    x = np.array([[[1, np.nan], [np.inf, -np.inf]]], np.float32)
    answer = await app.predict("any-size", {"inputs": {"x": b64(x)}, "top_k": {"y": 9}})
    assert outputs(answer)["y"]["top_k"] == [
        [
            [{"index": 0, "score": -1}, {"index": 1, "score": None}],
            [{"index": 1, "score": None}, {"index": 0, "score": None}],
        ]
    ]


async def test_top_k_per_output_leaves_the_others_whole(app: App) -> None:
    message = {"inputs": {"x": [[1, 2]], "k": [[10]]}, "top_k": {"total": 1}}
    both = outputs(await app.predict("add", message))
    assert both["total"]["top_k"] == [[{"index": 1, "score": 12}]]
    assert both["count"]["data"] == [[20]]


@pytest.mark.parametrize(
    ("model", "inputs", "more"),
    [
        ("negate", [[1, 2, 3]], {"top_k": {"z": 1}}),
        ("text", [["a"]], {"top_k": 1}),
        ("text", [["a"]], {"top_k": {"y": 1}}),
        ("negate", [[1, 2, 3]], {"top_k": 1, "outputs": []}),
    ],
)
async def test_top_k_of_an_output_without_scores_is_refused(
    app: App, model: str, inputs: Any, more: Any
) -> None:
    assert slug(await app.predict(model, {"inputs": {"x": inputs}, **more})) == "bad-parameter"
