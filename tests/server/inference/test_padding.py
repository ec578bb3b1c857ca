"""Padding end to end: real ONNX models, all wire formats, both edges; answers are as without padding."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobatch.engines.errors import EngineLoadError
from cobatch.server.inference.model import Model
from cobatch.server.settings.schema import ModelSettings, PadSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http.in_process import in_process
from tests.support.http.serving import Answer, Served, get, post, serve
from tests.support.models import models

Array = np.ndarray[Any, Any]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
WIDTH = 3


def text_model() -> bytes:
    """From `ids` and `mask` INT64 [batch, length]: `mean` FP32 [batch, 3], the masked mean of each id's row
    of a table; `tokens` FP32 [batch, length, 3], those rows, each with the mean added; `classes` FP32
    [batch, 8], scores, as many as a bucket is long."""
    table = np.random.default_rng(5).normal(size=(50, WIDTH)).astype(np.float32)
    weights = np.random.default_rng(6).normal(size=(WIDTH, 8)).astype(np.float32)
    constants = [
        helper.make_tensor("table", FLOAT, table.shape, table.ravel()),
        helper.make_tensor("weights", FLOAT, weights.shape, weights.ravel()),
        helper.make_tensor("one", INT64, [1], [1]),
        helper.make_tensor("two", INT64, [1], [2]),
    ]
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("Cast", ["mask"], ["flags"], to=FLOAT),
        node("Unsqueeze", ["flags", "two"], ["wide"]),
        node("Mul", ["rows", "wide"], ["kept"]),
        node("ReduceSum", ["kept", "one"], ["sum"], keepdims=0),
        node("ReduceSum", ["flags", "one"], ["count"], keepdims=1),
        node("Div", ["sum", "count"], ["mean"]),
        node("Unsqueeze", ["mean", "one"], ["means"]),
        node("Add", ["rows", "means"], ["tokens"]),
        node("MatMul", ["mean", "weights"], ["classes"]),
    ]
    ids = ["batch", "length"]
    return models.model(
        nodes,
        [("ids", INT64, ids), ("mask", INT64, ids)],
        [
            ("mean", FLOAT, ["batch", WIDTH]),
            ("tokens", FLOAT, ["batch", "length", WIDTH]),
            ("classes", FLOAT, ["batch", 8]),
        ],
        constants,
    )


PADS = (PadSettings(input="ids", value=1, mask="mask", outputs={"tokens": 0}, max=32),)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return models.write(tmp_path_factory.mktemp("text"), text_model(), "text.onnx")


@pytest.fixture(scope="module")
def alone(path: str) -> ort.InferenceSession:
    """The model without a server."""
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def settings(path: str, **more: Any) -> ModelSettings:
    return ModelSettings(path=path, max_batch_size=8, **{"pad": PADS, **more})


@pytest.fixture(scope="module", params=WAYS)
def served(request: pytest.FixtureRequest, path: str) -> Iterator[Served]:
    with serve(models=(settings(path),), **way(request.param)) as running:
        yield running


def run_alone(session: ort.InferenceSession, ids: Array) -> list[Array]:
    outputs: list[Array] = session.run(None, {"ids": ids, "mask": np.ones_like(ids)})
    return outputs


def some_ids(length: int, rows: int = 1, seed: int = 0) -> Array:
    return np.random.default_rng([seed, length]).integers(0, 50, (rows, length))


def tensor(name: str, values: Array, **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(values.shape), "datatype": "INT64", **more}


def message(ids: Array, **more: Any) -> dict[str, Any]:
    return {"inputs": [tensor("ids", ids, data=ids.ravel().tolist())], **more}


INFER = "/v2/models/text/infer"
PREDICT = "/v1/models/text/predictions"


def check(answer: dict[str, Any], expected: list[Array]) -> None:
    """A V2 answer in JSON."""
    for output, array in zip(answer["outputs"], expected, strict=True):
        assert output["shape"] == list(array.shape), output["name"]
        got = np.array(output["data"], np.float32).reshape(array.shape)
        np.testing.assert_allclose(got, array, rtol=1e-6, atol=1e-7, err_msg=output["name"])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 17, 31, 32])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_json_in_json_out(served: Served, alone: ort.InferenceSession, length: int, rows: int) -> None:
    ids = some_ids(length, rows)
    answer = served.ask(post(INFER, message(ids)))
    assert answer.status == 200, answer
    check(answer.json, run_alone(alone, ids))


def test_binary_in_binary_out(served: Served, alone: ort.InferenceSession) -> None:
    ids = some_ids(5, rows=2)
    head = {
        "inputs": [tensor("ids", ids, parameters={"binary_data_size": ids.nbytes})],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    answer = served.ask(post(INFER, text + ids.tobytes(), headers))
    assert answer.status == 200, answer
    cut = int(answer.headers["inference-header-content-length"])
    tail = answer.body[cut:]
    for output, array in zip(json.loads(answer.body[:cut])["outputs"], run_alone(alone, ids), strict=True):
        size = output["parameters"]["binary_data_size"]
        assert output["shape"] == list(array.shape)
        got = np.frombuffer(tail[:size], np.float32).reshape(array.shape)
        np.testing.assert_allclose(got, array, rtol=1e-6, atol=1e-7)
        tail = tail[size:]
    assert not tail


def test_a_raw_body_needs_no_mask(served: Served, alone: ort.InferenceSession) -> None:
    ids = some_ids(7)
    headers = {"Inference-Header-Content-Length": "0"}
    answer = served.ask(post(INFER, ids.tobytes(), headers))
    assert answer.status == 200, answer
    cut = int(answer.headers["inference-header-content-length"])
    shapes = [output["shape"] for output in json.loads(answer.body[:cut])["outputs"]]
    assert shapes == [[1, 3], [1, 7, 3], [1, 8]]
    mean = np.frombuffer(answer.body[cut : cut + 12], np.float32)
    np.testing.assert_allclose(mean, run_alone(alone, ids)[0][0], rtol=1e-6)


def predict(served: Served, body: Any, **headers: str) -> Answer:
    return served.ask(post(PREDICT, body, {"Content-Type": "application/json"} | headers))


def test_predictions(served: Served, alone: ort.InferenceSession) -> None:
    ids = some_ids(6, rows=2)
    answer = predict(served, {"inputs": {"ids": ids.tolist()}})
    assert answer.status == 200, answer
    for output, array in zip(answer.json["outputs"].values(), run_alone(alone, ids), strict=True):
        assert output["shape"] == list(array.shape)
        np.testing.assert_allclose(np.array(output["data"]), array, rtol=1e-6, atol=1e-7)
    raw = served.ask(post(PREDICT, ids[:1].tobytes(), {"Content-Type": "application/octet-stream"}))
    assert raw.status == 200, raw
    assert raw.json["outputs"]["tokens"]["shape"] == [1, 6, 3]
    assert raw.json["outputs"]["tokens"]["data"][0] == answer.json["outputs"]["tokens"]["data"][0]


def test_batch_items(served: Served, alone: ort.InferenceSession) -> None:
    lengths = [1, 3, 4, 6, 31]
    items = [
        {"id": str(length), "url": INFER, "method": "POST", "body": message(some_ids(length))}
        for length in lengths
    ]
    answer = served.ask(post("/batch", {"requests": items}))
    assert answer.status == 200, answer
    for length, item in zip(lengths, answer.json["responses"], strict=True):
        assert item["status"] == 200, item
        check(item["body"], run_alone(alone, some_ids(length)))


def test_a_mask_from_the_client(served: Served, alone: ort.InferenceSession) -> None:
    ids = some_ids(5)
    mask = np.array([[1, 1, 0, 1, 0]])
    body = message(ids)
    body["inputs"].append(tensor("mask", mask, data=mask.ravel().tolist()))
    answer = served.ask(post(INFER, body))
    assert answer.status == 200, answer
    check(answer.json, alone.run(None, {"ids": ids, "mask": mask}))


def test_refusals_name_tensor_and_limit(served: Served) -> None:
    body = message(some_ids(33))
    for answer in (
        served.ask(post(INFER, body)),
        predict(served, {"inputs": {"ids": some_ids(33).tolist()}}),
    ):
        assert (answer.status, answer.slug) == (422, "wrong-shape")
        assert answer.json["detail"] == "input 'ids' has 33 elements along axis 1, at most 32 fit"
        assert (answer.json["tensor"], answer.json["limit"], answer.json["actual"]) == ("ids", 32, [1, 33])
    mask = np.ones((1, 4), np.int64)
    body = message(some_ids(5))
    body["inputs"].append(tensor("mask", mask, data=[1] * 4))
    answer = served.ask(post(INFER, body))
    assert (answer.status, answer.slug) == (422, "wrong-shape")
    assert answer.json["expected"] == [-1, 5]
    assert answer.json["actual"] == [1, 4]
    missing = served.ask(post(INFER, {"inputs": [tensor("mask", mask, data=[1] * 4)]}))
    assert (missing.slug, missing.json["tensor"]) == ("missing-tensor", "ids")


def test_the_metadata_has_no_mask(served: Served) -> None:
    schemas = served.ask(get("/openapi.json")).json["components"]["schemas"]
    (inputs,) = schemas["PredictionRequest"]["properties"]["inputs"]["anyOf"]
    assert inputs["required"] == ["ids"]
    assert set(inputs["properties"]) == {"ids", "mask"}


def test_statistics_and_configuration_say_it(served: Served) -> None:
    def padding() -> Any:
        return served.ask(get("/v2/models/text/stats")).json["model_stats"][0]["padding"]

    before = padding()
    assert served.ask(post(INFER, message(some_ids(3, rows=5)))).status == 200
    after = padding()
    # Of ids and mask together.
    assert after["rows"] - before["rows"] == 5
    assert after["elements"] - before["elements"] == 5 * 4 * 2
    assert after["padding"] - before["padding"] == 5 * 2
    assert after["waste"] == round(after["padding"] / after["elements"], 6)
    assert sum(one["padding"] for one in after["buckets"]) == after["padding"]
    assert [4] in [one["lengths"] for one in after["buckets"]]
    ids, mask = served.ask(get("/v2/models/text/config")).json["input"]
    assert "optional" not in ids
    assert mask["optional"] is True


async def test_many_lengths_at_once_share_batches(path: str, alone: ort.InferenceSession) -> None:
    async with in_process(settings(path)) as running:
        lengths = [5, 6, 7, 8] * 8
        answers = await asyncio.gather(
            *(running.http.post(INFER, json=message(some_ids(n, seed=k))) for k, n in enumerate(lengths))
        )
        for number, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            check(answer.json(), run_alone(alone, some_ids(length, seed=number)))
        assert running.batcher("text").counters.batches < len(lengths)


async def test_no_padding_is_logged_of_a_model_that_ran_nothing(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cobatch.model"):
        async with in_process(settings(path)):
            pass
    assert "model text: ran 0 rows in 0 batches" in caplog.messages
    assert "padding" not in caplog.text


async def test_padding_is_logged_at_the_end(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cobatch.model"):
        async with in_process(settings(path)) as running:
            await running.http.post(INFER, json=message(some_ids(3)))
    assert "model text: 25.0 % of 8 elements were padding" in caplog.messages
    assert "its padding is not removed" not in caplog.text


async def test_an_output_without_pad_settings_is_warned_of(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    pads = (PadSettings(input="ids", mask="mask"),)
    async with in_process(settings(path, pad=pads)) as running:
        answer = await running.http.post(INFER, json=message(some_ids(5)))
    assert [output["shape"] for output in answer.json()["outputs"]] == [[1, 3], [1, 8, 3], [1, 8]]
    assert "axis 0 of output 'tokens' varies, and no [[models.pad]] relates it to an input" in caplog.text


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=6), st.booleans())
def test_padded_and_unpadded_answers_are_equal(
    path: str, alone: ort.InferenceSession, sizes: list[tuple[int, int]], listed: bool
) -> None:
    pads = (
        (PadSettings(input="ids", mask="mask", outputs={"tokens": 0}, buckets=(7, 12)),) if listed else PADS
    )

    async def main() -> None:
        async with in_process(settings(path, pad=pads)) as running:
            bodies = [message(some_ids(length, rows)) for length, rows in sizes]
            answers = await asyncio.gather(*(running.http.post(INFER, json=body) for body in bodies))
            for (length, rows), answer in zip(sizes, answers, strict=True):
                check(answer.json(), run_alone(alone, some_ids(length, rows)))

    asyncio.run(main())


async def test_two_axes_and_an_identity_bit_for_bit(tmp_path: Path) -> None:
    shape = ["batch", "height", "width"]
    identity = models.model(
        [helper.make_node("Identity", ["x"], ["y"])], [("x", FLOAT, shape)], [("y", FLOAT, shape)]
    )
    pads = (
        PadSettings(input="x", axis=0, value=float("-inf"), outputs={"y": 0}, buckets=(5,)),
        PadSettings(input="x", axis=1, value=float("-inf"), outputs={"y": (1,)}),
    )
    file = models.write(tmp_path, identity, "same.onnx")
    async with in_process(ModelSettings(path=file, pad=pads)) as running:
        for rows, height, width in [(1, 5, 8), (2, 3, 8), (3, 5, 3), (2, 1, 7), (9, 4, 4)]:
            x = np.random.default_rng(height).normal(size=(rows, height, width)).astype(np.float32)
            body = {"inputs": {"x": x.tolist()}}
            answer = await running.http.post("/v1/models/same/predictions", json=body)
            assert answer.status_code == 200, answer.text
            assert np.array_equal(np.array(answer.json()["outputs"]["y"]["data"], np.float32), x)


async def test_strings(tmp_path: Path) -> None:
    path = models.write(tmp_path, models.identity(TensorProto.STRING, "width"), "words.onnx")
    pads = (PadSettings(input="x", outputs={"y": 0}, buckets=(4,)),)
    async with in_process(ModelSettings(path=path, pad=pads)) as running:
        words = [["a", "b", "c"], ["d", "", "f"]]
        answer = await running.http.post("/v1/models/words/predictions", json={"inputs": {"x": words}})
        assert answer.json()["outputs"]["y"]["data"] == words


@pytest.mark.parametrize(
    ("pads", "message"),
    [
        ([{"input": "id"}], "pad[0].input: the model has no input 'id'; its inputs are ids, mask"),
        ([{"input": "ids", "axis": 1}], "pad[0].axis: input 'ids' is [-1, -1]: its rows have 1 axes"),
        (
            [{"input": "ids", "mask": "m"}],
            "pad[0].mask: the model has no input 'm'; its inputs are ids, mask",
        ),
        ([{"input": "ids", "value": 0.5}], "pad[0].value: input 'ids' is INT64, it cannot hold 0.5"),
        ([{"input": "ids", "value": True}], "pad[0].value: input 'ids' is INT64, it cannot hold True"),
        ([{"input": "ids", "value": 2**63}], f"pad[0].value: input 'ids' is INT64, it cannot hold {2**63}"),
        (
            [{"input": "ids", "outputs": {"mean": 0}}],
            "pad[0].outputs.mean: output 'mean' is [-1, 3]: axis 0 of its rows is fixed at 3",
        ),
        (
            [{"input": "ids", "outputs": {"tokens": 0}}, {"input": "mask", "outputs": {"tokens": 0}}],
            "pad[1].outputs.tokens: axis 0 of output 'tokens' is named twice",
        ),
        (
            [{"input": "ids", "outputs": {"scores": 0}}],
            "pad[0].outputs.scores: the model has no output 'scores'; its outputs are mean, tokens, classes",
        ),
    ],
)
async def test_tables_that_do_not_fit_the_model(path: str, pads: list[dict[str, Any]], message: str) -> None:
    model = Model(settings(path, pad=tuple(PadSettings(**pad) for pad in pads)))
    with pytest.raises(EngineLoadError) as caught:
        await model.load()
    assert str(caught.value) == message
    assert model.load_error is caught.value
    await model.stop(1)
    assert not model.worker_alive
