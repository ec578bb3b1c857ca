"""Models whose first axis is no batch axis, through the whole server: answers are as of the model alone."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobatch.engines.base import EXPORT_DOCS
from cobatch.server.dashboard.feed import hello
from cobatch.server.settings.schema import ModelSettings, PadSettings
from tests.support.examples import examples
from tests.support.fronts.linked import WAYS, way
from tests.support.http.in_process import InProcess, in_process
from tests.support.http.serving import Answer, Served, get, post, serve
from tests.support.models import axis_models, models
from tests.support.virtual.loop import Array

FLOAT = TensorProto.FLOAT
MUL_1 = Path(onnxruntime.__file__).parent / "datasets" / "mul_1.onnx"
FILES = {
    "cumulative": axis_models.cumulative(),
    "nonzero": axis_models.nonzero(),
    "scalars": axis_models.scalars(),
    "product": axis_models.product(),
    "text": axis_models.joined_text(),
    "softmax": axis_models.chain(["softmax"], 3, 0),
    "mean": axis_models.chain(["mean"], 3, 0),
    "pairs": models.two_rows_each(),
}


def files(folder: Path) -> tuple[ModelSettings, ...]:
    made = [
        ModelSettings(path=models.write(folder, data, f"{name}.onnx"), max_batch_size=4, threads=1)
        for name, data in FILES.items()
    ]
    several = ModelSettings(path=made[0].path, name="several", instances=2, threads=1)
    return (*made, several, ModelSettings(path=str(MUL_1), name="mul", threads=1))


@pytest.fixture(scope="module", params=WAYS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(models=files(tmp_path_factory.mktemp("axis")), **way(request.param)) as running:
        yield running


def tensor(name: str, array: Array, datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.tolist()}


def infer(served: Served, model: str, *inputs: dict[str, Any], **more: Any) -> dict[str, Array]:
    for one in inputs:
        if not isinstance(one["data"], list):
            one["data"] = [one["data"]]  # V2 wants a list for a scalar, too
    answer = served.ask(post(f"/v2/models/{model}/infer", {"inputs": list(inputs), **more}))
    assert answer.status == 200, answer.body
    return {
        one["name"]: np.array(one["data"], object if one["datatype"] == "BYTES" else None).reshape(
            one["shape"]
        )
        for one in answer.json["outputs"]
    }


def floats(*values: Any) -> Array:
    return np.array(values, np.float32)


# No answer has another caller's data


@pytest.mark.parametrize("model", ["cumulative", "several"])
def test_sixteen_callers_get_the_answers_of_the_model_alone(served: Served, model: str) -> None:
    wrong: list[Any] = []

    def call(caller: int) -> None:
        with served.connect() as client:
            for number in range(10):
                x = np.arange(1 + (caller + number) % 3, dtype=np.float32) + 100 * caller
                body = {"inputs": [tensor("x", x)]}
                answer = client.ask(post(f"/v2/models/{model}/infer", body))
                if answer.status != 200 or answer.json["outputs"][0]["data"] != np.cumsum(x).tolist():
                    wrong.append((caller, x.tolist(), answer.body))

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_request_is_not_cut(served: Served) -> None:
    """Six elements, where at most four rows would have run together."""
    x = floats(1, 1, 1, 1, 1, 1)
    assert infer(served, "cumulative", tensor("x", x))["y"].tolist() == [1, 2, 3, 4, 5, 6]


def test_every_shape_is_served(served: Served) -> None:
    x = floats([1, 0, 2], [0, 0, 3], [9, 1, 0], [5, 5, 5], [1, 2, 3])
    found = infer(served, "nonzero", tensor("x", x))["y"]
    assert found.tolist() == [list(axis) for axis in np.nonzero(x)]
    for name in ("softmax", "mean"):
        expected = axis_models.alone(FILES[name], t0=x)[0]
        assert np.allclose(infer(served, name, tensor("t0", x))["t1"], expected)
    assert infer(served, "pairs", tensor("x", floats([1, 2, 3, 4, 5, 6])))["y"].shape == (2, 3)
    b = floats([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12])
    product = infer(served, "product", tensor("a", x[:2]), tensor("b", b))["y"]
    assert product.tolist() == (x[:2] @ b).tolist()
    assert infer(served, "mul", tensor("X", floats([1, 1], [1, 1], [1, 1])))["Y"].tolist() == [
        [1, 2],
        [3, 4],
        [5, 6],
    ]


def test_scalars(served: Served) -> None:
    inputs = [tensor("s", floats(2.5)[0]), tensor("k", floats(1)[0])]
    answers = infer(served, "scalars", *inputs)
    assert answers["total"].shape == ()
    assert answers["total"] == 3.5
    assert answers["both"].tolist() == [2.5, 2.5]
    only = infer(served, "scalars", *inputs, outputs=[{"name": "both"}])
    assert list(only) == ["both"]


def test_text(served: Served) -> None:
    words, word = np.array(["a", "é", ""], object), np.array("one", object)
    answers = infer(served, "text", tensor("t", words, "BYTES"), tensor("s", word, "BYTES"))
    assert answers["y"].tolist() == ["a", "é", ""] * 2
    assert answers["same"].shape == ()
    assert answers["same"] == "one"


def test_tensors_without_elements(served: Served) -> None:
    assert infer(served, "cumulative", tensor("x", floats()))["y"].tolist() == []
    nothing = infer(served, "nonzero", {**tensor("x", floats()), "shape": [3, 0]})["y"]
    assert nothing.shape == (2, 0)
    words = tensor("t", np.array([], object), "BYTES"), tensor("s", np.array("", object), "BYTES")
    assert infer(served, "text", *words)["y"].shape == (0,)


def binary(served: Served, model: str, head: dict[str, Any], tail: bytes) -> tuple[Any, bytes]:
    text = json.dumps(head).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    return cut(served.ask(post(f"/v2/models/{model}/infer", text + tail, headers)))


def cut(answer: Answer) -> tuple[Any, bytes]:
    assert answer.status == 200, answer.body
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.body[:length])["outputs"], answer.body[length:]


def test_binary_tensors(served: Served) -> None:
    def described(name: str, shape: list[int], size: int, datatype: str = "FP32") -> dict[str, Any]:
        parameters = {"binary_data_size": size}
        return {"name": name, "shape": shape, "datatype": datatype, "parameters": parameters}

    all_binary = {"parameters": {"binary_data_output": True}}
    x = floats(1, 2, 3)
    head = {"inputs": [described("x", [3], 12)]} | all_binary
    outputs, tail = binary(served, "cumulative", head, x.tobytes())
    assert (outputs[0]["shape"], tail) == ([3], floats(1, 3, 6).tobytes())
    head = {"inputs": [described("s", [], 4), described("k", [], 4)]} | all_binary
    outputs, tail = binary(served, "scalars", head, floats(2, 3).tobytes())
    assert [one["shape"] for one in outputs] == [[], [2]]
    assert tail == floats(5, 2, 2).tobytes()
    word = struct.pack("<I", 2) + b"ab"
    head = {"inputs": [described("t", [2], 12, "BYTES"), described("s", [], 6, "BYTES")]} | all_binary
    outputs, tail = binary(served, "text", head, word * 3)
    assert [one["shape"] for one in outputs] == [[4], []]
    assert tail == word * 5


def test_a_raw_body_is_the_whole_tensor(served: Served) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    ask = post("/v2/models/cumulative/infer", floats(1, 1, 1, 1, 1).tobytes(), headers)
    outputs, tail = cut(served.ask(ask))
    assert (outputs[0]["shape"], tail) == ([5], floats(1, 2, 3, 4, 5).tobytes())


@pytest.mark.parametrize(
    ("model", "name", "shape", "expected"),
    [
        ("cumulative", "x", [1, 3], [-1]),
        ("mul", "X", [1, 2], [3, 2]),
        ("softmax", "t0", [2, 4], [-1, 3]),
        ("cumulative", "x", [-1], [-1]),
    ],
)
def test_another_shape_is_refused_with_the_whole_one(
    served: Served, model: str, name: str, shape: list[int], expected: list[int]
) -> None:
    body = {"inputs": [{"name": name, "datatype": "FP32", "shape": shape, "data": [1.0] * 8}]}
    answer = served.ask(post(f"/v2/models/{model}/infer", body))
    assert (answer.status, answer.slug) == (422, "wrong-shape")
    assert (answer.json["expected"], answer.json["actual"]) == (expected, shape)


def test_clients_are_told_that_there_is_no_batch_axis(served: Served) -> None:
    metadata = served.ask(get("/v2/models/scalars")).json
    assert [one["shape"] for one in metadata["inputs"] + metadata["outputs"]] == [[], [], [], [2]]
    assert served.ask(get("/v2/models/mul")).json["inputs"][0]["shape"] == [3, 2]
    config = served.ask(get("/v2/models/cumulative/config")).json
    assert config["max_batch_size"] == 0
    assert (config["input"][0]["dims"], config["output"][0]["dims"]) == ([-1], [-1])
    assert "dynamic_batching" not in config
    assert config["parameters"]["batching"] == {"string_value": "disproved"}
    assert "get another answer in output 'y'" in config["parameters"]["batching_note"]["string_value"]
    document = served.ask(get("/openapi.json")).json
    assert {"title": "x of cumulative"}.items() <= _v2_input(document, "x of cumulative").items()
    assert _v2_input(document, "x of cumulative")["properties"]["shape"] == {"minItems": 1, "maxItems": 1}


def _v2_input(document: Any, title: str) -> Any:
    items = document["components"]["schemas"]["InferRequest"]["properties"]["inputs"]["items"]
    return next(one for one in items["allOf"][1]["anyOf"] if one["title"] == title)


# Predictions and POST /batch


def predicted(served: Served, model: str, message: Any, **headers: str) -> Any:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    fields.setdefault("Content-Type", "application/json")
    answer = served.ask(post(f"/v1/models/{model}/predictions", message, fields))
    assert answer.status == 200, answer.body
    return answer.json["outputs"]


def test_predictions(served: Served) -> None:
    found = predicted(served, "cumulative", {"inputs": {"x": [1, 1, 1, 1, 1, 1]}})["y"]
    assert found == {"dtype": "float32", "shape": [6], "data": [1, 2, 3, 4, 5, 6]}
    scalars = predicted(served, "scalars", {"inputs": {"s": 0.1, "k": 2}})
    assert scalars["total"] == {"dtype": "float32", "shape": [], "data": 2.1}
    encoded = {"b64": base64.b64encode(floats(7).tobytes()).decode(), "dtype": "float32", "shape": []}
    assert predicted(served, "scalars", {"inputs": {"s": encoded, "k": 2}})["total"]["data"] == 9
    text = predicted(served, "text", {"inputs": {"t": ["a", "b"], "s": "one"}})
    assert (text["y"]["data"], text["same"]["data"]) == (["a", "b", "a", "b"], "one")
    best = predicted(served, "cumulative", {"inputs": {"x": [1, 1, 1]}, "top_k": 2})["y"]
    assert best["top_k"] == [{"index": 2, "score": 3.0}, {"index": 1, "score": 2.0}]


def test_predictions_from_bytes(served: Served) -> None:
    file = io.BytesIO()
    np.save(file, floats(1, 1, 1))
    octets = "application/octet-stream"
    assert predicted(served, "cumulative", file.getvalue(), Content_Type=octets)["y"]["data"] == [1, 2, 3]
    raw = floats(2, 2).tobytes()
    assert predicted(served, "cumulative", raw, Content_Type=octets)["y"]["data"] == [2, 4]


@pytest.mark.parametrize("value", [[1.0], [[1.0]], "text", None, [1.0, 2.0]])
def test_a_scalar_in_json_has_no_brackets(served: Served, value: Any) -> None:
    message = {"inputs": {"s": value, "k": 1}}
    answer = served.ask(post("/v1/models/scalars/predictions", message, {"Content-Type": "application/json"}))
    assert answer.status == 422
    assert answer.slug in ("wrong-shape", "wrong-data")


def test_items_of_a_batch_call(served: Served) -> None:
    items = [
        {
            "id": str(number),
            "method": "POST",
            "url": "/v2/models/cumulative/infer",
            "body": {"inputs": [tensor("x", np.full(1 + number, 1 + number, np.float32))]},
        }
        for number in range(6)
    ]
    answer = served.ask(post("/batch", {"requests": items}))
    assert answer.status == 200, answer.body
    got = [one["body"]["outputs"][0]["data"] for one in answer.json["responses"]]
    assert got == [np.cumsum(np.full(1 + number, 1.0 + number)).tolist() for number in range(6)]


def test_counts_and_explanations_of_a_request_that_ran_whole(served: Served) -> None:
    before = served.call(lambda: served.batcher("mean").counters.rows)
    infer(served, "mean", tensor("t0", np.ones((7, 3), np.float32)))
    counters = served.call(lambda: served.batcher("mean").counters)  # which the loop counts after the answer
    assert counters.rows == before + 1
    assert list(counters.by_rows) == [1]


@examples(5, derandomize=True)
@given(
    steps=st.lists(st.sampled_from(sorted(axis_models.ROW_WISE)), min_size=1, max_size=2),
    mixing=st.none() | st.sampled_from(sorted(axis_models.MIXING)),
    width=st.integers(1, 3),
    fixed=st.none() | st.integers(1, 4),
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
)
def test_any_model_answers_as_it_does_alone(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[str],
    mixing: str | None,
    width: int,
    fixed: int | None,
    sizes: list[int],
    seed: int,
) -> None:
    """Concurrent requests of any sizes, in batches of at most four rows or one at a time."""
    steps = steps if mixing is None else [*steps, mixing]
    data = axis_models.chain(steps, width, seed, fixed or "n")
    path = models.write(tmp_path_factory.mktemp("any"), data)
    random = np.random.default_rng(seed)
    # A model with a fixed batch runs alone on its own number of rows only.
    xs = [random.normal(size=(fixed or size, width)).astype(np.float32) for size in sizes]

    async def answers() -> list[Any]:
        async with in_process(ModelSettings(path=path, name="m", max_batch_size=4, threads=1)) as running:
            bodies = [{"inputs": [tensor("t0", x)]} for x in xs]
            asked = [running.http.post("/v2/models/m/infer", json=body) for body in bodies]
            return [answer.json()["outputs"][0] for answer in await asyncio.gather(*asked)]

    for x, answer in zip(xs, asyncio.run(answers()), strict=True):
        expected = axis_models.alone(data, t0=x)[0]
        got = np.array(answer["data"], np.float32).reshape(answer["shape"])
        assert answer["name"] == f"t{len(steps)}"
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-5)


# The operator's view


EXPORT = f"; to change the export: {EXPORT_DOCS} (max_batch_size = 64 is ignored)"


async def started(
    folder: Path, data: bytes, caplog: pytest.LogCaptureFixture, **settings: Any
) -> tuple[InProcess, list[logging.LogRecord]]:
    caplog.set_level(logging.INFO, "cobatch.model")
    model = ModelSettings(path=models.write(folder, data), name="m", threads=1, **settings)
    async with in_process(model) as running:
        return running, [one for one in caplog.records if "atching" in one.message or "pad" in one.message]


@pytest.mark.parametrize(
    ("data", "settings", "level", "text"),
    [
        (axis_models.cumulative(), {}, "WARNING", "batching is off, requests run one at a time: rows "),
        (
            axis_models.cumulative(),
            {},
            "WARNING",
            f'set batching = "on"{EXPORT}',
        ),
        (
            axis_models.scalars(),
            {},
            "WARNING",
            f"is a scalar or of unknown rank{EXPORT}",
        ),
        (axis_models.cumulative(), {"batching": "off"}, "INFO", "a time (max_batch_size = 64 is ignored)"),
        (
            axis_models.cumulative(),
            {"max_batch_size": 0},
            "INFO",
            "batching is off, requests run one at a time",
        ),
        (axis_models.cumulative(), {"batching": "on"}, "INFO", "batching is on, not tested"),
        (models.negate(), {}, "INFO", "batching is on, proven at load"),
        (models.never_zero(), {}, "WARNING", "batching is on, but not proven: it refuses random inputs: "),
        (
            models.negate(batch=1),
            {},
            "WARNING",
            f"fixed at 1 by the file; export it with a dynamic batch axis: {EXPORT_DOCS}",
        ),
    ],
)
async def test_the_log_says_how_a_model_is_batched(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    data: bytes,
    settings: dict[str, Any],
    level: str,
    text: str,
) -> None:
    _, records = await started(tmp_path, data, caplog, **settings)
    record = next(one for one in records if "batching is " in one.message)
    assert record.levelname == level
    assert text in record.message
    assert record.message.startswith("model m: batching is ")


async def test_the_live_page_shows_it(tmp_path: Path) -> None:
    for data, sizes in ((axis_models.cumulative(), [1]), (models.negate(4), [1, 2, 3, 4])):
        model = ModelSettings(path=models.write(tmp_path, data), name="m", threads=1)
        async with in_process(model) as running:
            shown = hello(running.inference, 0.0)["models"]["m"]
            engine = running.inference.models["m"].engine_worker.engine
            assert shown["batching"] == engine.signature.batching_note
            assert shown["sizes"] == sizes


async def test_padding_is_ignored_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = models.model(
        [helper.make_node("Softmax", ["x"], ["y"], axis=0)],
        [("x", FLOAT, ["n", "m"])],
        [("y", FLOAT, ["n", "m"])],
    )
    _, records = await started(tmp_path, data, caplog, pad=(PadSettings(input="x", buckets=(4,)),))
    assert "[[models.pad]] is ignored, since batching is off" in "".join(one.message for one in records)


async def test_all_engines_of_a_model_follow_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs: list[int] = []
    original = onnxruntime.InferenceSession.run

    def counted(self: Any, *arguments: Any) -> Any:
        proofs.append(threading.get_ident())
        return original(self, *arguments)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", counted)
    model = ModelSettings(path=models.write(tmp_path, models.negate()), name="m", threads=1, instances=2)
    async with in_process(model):
        first, second = dict.fromkeys(proofs)
        assert (proofs.count(first), proofs.count(second)) == (4, 1)  # three runs, and one of zeros
