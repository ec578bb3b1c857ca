"""Models in Python with requests of their own shape: preprocess, the model, postprocess."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest

from cobatch.engines.base import DATATYPES
from cobatch.engines.errors import BadRequest
from cobatch.server.pipelines.around import _array
from cobatch.server.settings.schema import ModelSettings
from tests.support.http.in_process import InProcess, in_process
from tests.support.paths import ROOT

SOURCE = "tests/support/pipelines/handlers.py"


@pytest.fixture(params=["process", "thread"])
async def running(request: pytest.FixtureRequest) -> AsyncIterator[InProcess]:
    models = [
        ModelSettings(python=f"{SOURCE}:{name}", python_path=str(ROOT), run_in=request.param)
        for name in ("Summed", "Plain")
    ]
    async with in_process(*models) as running:
        yield running


async def ask(running: InProcess, name: str, content: object) -> httpx.Response:
    return await running.http.post(f"/v1/models/{name}/infer", json=content)


async def test_a_model_between_its_own_requests_and_answers(running: InProcess) -> None:
    rows = [[float(number), 1.0, 2.0] for number in range(20)]
    answers = await asyncio.gather(*[ask(running, "Summed", {"values": row}) for row in rows])
    # The objects that answer have not loaded the model: theirs is the factor 0.
    assert [answer.text for answer in answers] == [f"{2 * sum(row):g} kg, 0" for row in rows]
    assert "Summed-run" in answers[0].headers["server-timing"]
    # V2 reaches the model as it reaches others.
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
    answer = await running.http.post("/v2/models/Summed/infer", json={"inputs": [tensor]})
    assert answer.json()["outputs"][0]["data"] == [12.0]


async def test_they_are_counted_as_the_model_s(running: InProcess) -> None:
    await ask(running, "Summed", {"values": [1, 2, 3]})
    await ask(running, "Summed", {"values": []})
    text = (await running.http.get("/metrics")).text
    assert 'cobatch_requests_total{code="200",model="Summed",reason=""} 1.0' in text
    assert 'cobatch_requests_total{code="422",model="Summed",reason="refused-by-model"} 1.0' in text
    names = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(set(names)) == len(names)


async def test_answers_alone(running: InProcess) -> None:
    assert (await ask(running, "Plain", {"x": [5, 6]})).json() == 5.0
    answer = await ask(running, "Plain", {"nope": [[1], [1, 2]]})
    assert (answer.status_code, answer.json()["detail"]) == (422, "expected the inputs x, got nope")
    answer = await ask(running, "Plain", {"x": ["5", 6]})
    detail = "input 'x' (FP32): expected finite numbers"
    assert (answer.status_code, answer.json()["detail"]) == (422, detail)


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("INT64", [1.7], "integers"),
        ("INT64", ["1"], "integers"),
        ("INT64", [True], "integers"),
        ("INT8", [300], "out of bounds"),
        ("UINT64", [-1], "out of bounds"),
        ("FP32", ["12"], "finite numbers"),
        ("FP32", [1e300], "finite numbers"),
        ("FP32", [None], "finite numbers"),
        ("FP32", [[1], [1, 2]], "inhomogeneous"),
        ("BOOL", [1], "true or false"),
        ("BYTES", ["a", 1], "strings"),
        ("BYTES", [["a"], ["a", "b"]], "strings"),
    ],
)
def test_values_that_a_datatype_has_not(datatype: str, value: object, expected: str) -> None:
    with pytest.raises(BadRequest, match=rf"^input 'x' \({datatype}\): .*{expected}"):
        _array("x", value, datatype)


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT8", [-128, 127]),
        ("UINT64", [2**64 - 1]),
        ("FP32", [1, 2.5]),
        ("FP16", np.float64(0.5)),
        ("BOOL", [True]),
        ("BYTES", [["a", b"b"]]),
        ("INT64", []),
    ],
)
def test_values_of_a_datatype(datatype: str, value: object) -> None:
    array = _array("x", value, datatype)
    assert array.dtype == DATATYPES[datatype]
    assert array.tolist() == value


@pytest.mark.parametrize(
    ("content", "status", "slug", "says"),
    [
        ({"values": []}, 422, "refused-by-model", "no numbers"),
        ({"values": ["a"]}, 422, "wrong-body", "$.values[0]"),
        ({"values": [1.0]}, 422, "wrong-shape", "must have shape [-1, 3]"),
        ({"values": [-1.0]}, 500, "run-failed", "model 'Summed' failed"),
    ],
)
async def test_what_is_refused(
    running: InProcess, content: object, status: int, slug: str, says: str
) -> None:
    answer = await ask(running, "Summed", content)
    assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{slug}")
    assert says in answer.json()["detail"]


async def test_the_description_has_the_model_s_own_request(running: InProcess) -> None:
    document = (await running.http.get("/openapi.json")).json()
    content = document["paths"]["/v1/models/Summed/infer"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"]["$ref"] == "#/components/schemas/Numbers"
    assert "Numbers" in document["components"]["schemas"]
