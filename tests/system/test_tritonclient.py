"""`tritonclient[http]`, unchanged, against `cobatch serve` on loopback: its users' calls work."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from onnx import TensorProto
from tritonclient.http import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from cobatch import __version__
from tests.support.http.process import Cobatch
from tests.support.models import axis_models, models

Array = np.ndarray[Any, Any]
MODELS = {
    "negate": models.negate(),
    "total": models.two_inputs(),
    "sum": models.sum_rows(),
    "text": models.identity(TensorProto.STRING),
    "half": models.identity(TensorProto.FLOAT16),
    "flag": models.identity(TensorProto.BOOL),
    "double": models.identity(TensorProto.DOUBLE),
    "bytes": models.identity(TensorProto.UINT8),
    "long": models.identity(TensorProto.INT64),
    "pick": models.pick(),
    "running": axis_models.cumulative(),
}
CALLERS = 96

# The asyncio client requests health without reading the response's body, and leaves the connection to the
# garbage collector if the body has not arrived yet.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning")]


@pytest.fixture(scope="module", params=["--fast-path", "--no-fast-path", "--processes=3"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a server with all of MODELS."""
    folder = tmp_path_factory.mktemp("triton")
    config = folder / "cobatch.toml"
    tables = [_table(folder, name, data) for name, data in MODELS.items()]
    config.write_text("\n".join(["[server]", "port = 0", *tables]))
    with Cobatch(folder, "--config", config, request.param) as server:
        yield f"127.0.0.1:{server.ready().port}"
        assert server.stop() == 0
        assert "Traceback" not in server.stderr


def _table(folder: Path, name: str, data: bytes) -> str:
    models.write(folder, data, f"{name}.onnx")
    return f'[[models]]\npath = "{name}.onnx"\n'


class Client(Protocol):
    """Either client; a call is made by its name."""

    def __call__(self, method: str, /, *arguments: Any, **options: Any) -> Any: ...


@pytest.fixture(params=["sync", "asyncio"])
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Client]:
    """The two clients, so that each test runs with both."""
    if request.param == "sync":
        with tritonclient.http.InferenceServerClient(url) as sync:
            yield lambda method, /, *arguments, **options: getattr(sync, method)(*arguments, **options)
        return
    with asyncio.Runner() as runner:

        async def connect() -> Any:
            return tritonclient.http.aio.InferenceServerClient(url)

        aio = runner.run(connect())
        yield lambda method, /, *arguments, **options: runner.run(getattr(aio, method)(*arguments, **options))
        runner.run(aio.close())
    gc.collect()  # here, where the warning is expected


def given(array: Array, *, name: str = "x", binary: bool = True) -> Any:
    """Make an input as the client's users do."""
    tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return tensor.set_data_from_numpy(array, binary_data=binary)


def refused(client: Client, *arguments: Any, **options: Any) -> tuple[str, str]:
    """Return the status and the message of a refused infer call."""
    with pytest.raises(InferenceServerException) as raised:
        client("infer", *arguments, **options)
    return raised.value.status(), raised.value.message()


def test_health(client: Client) -> None:
    assert client("is_server_live") is True
    assert client("is_server_ready") is True
    for name in MODELS:
        assert client("is_model_ready", name) is True
    assert client("is_model_ready", "unknown") is False


def test_server_metadata(client: Client) -> None:
    metadata = client("get_server_metadata")
    assert metadata["name"] == "cobatch"
    assert metadata["version"] == __version__
    assert "binary_tensor_data" in metadata["extensions"]


def test_model_metadata(client: Client) -> None:
    metadata = client("get_model_metadata", "total")
    assert metadata["name"] == "total"
    assert metadata["platform"] == "onnxruntime_onnx"
    assert metadata["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "k", "datatype": "INT64", "shape": [-1, 1]},
    ]
    assert metadata["outputs"] == [
        {"name": "total", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "count", "datatype": "INT64", "shape": [-1, 1]},
    ]
    assert client("get_model_metadata", "sum")["inputs"][0]["shape"] == [-1, -1]


def test_metadata_of_an_unknown_model_is_an_error_with_the_servers_message(client: Client) -> None:
    with pytest.raises(InferenceServerException, match="there is no model 'unknown'"):
        client("get_model_metadata", "unknown")


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
def test_infer_in_every_mix_of_binary_and_json(client: Client, binary_in: bool, binary_out: bool) -> None:
    x = np.array([[1.5, -2, 3e-7], [0, 1e30, 7]], np.float32)
    wanted = [InferRequestedOutput("y", binary_data=binary_out)]
    result = client("infer", "negate", [given(x, binary=binary_in)], outputs=wanted, request_id="r-1 ü")
    answer = result.as_numpy("y")
    assert answer.dtype == np.float32
    assert np.array_equal(answer, -x)
    response = result.get_response()
    assert response["model_name"] == "negate"
    assert response["id"] == "r-1 ü"
    (output,) = response["outputs"]
    assert ("data" in output) == (not binary_out)


def test_infer_as_in_the_first_example_of_the_clients_guide(client: Client) -> None:
    x = np.ones((1, 3), np.float32)
    assert np.array_equal(client("infer", "negate", [given(x)]).as_numpy("y"), -x)


def test_several_inputs_in_any_order_and_the_wanted_outputs(client: Client) -> None:
    x, k = np.array([[1, 2], [3, 4]], np.float32), np.array([[10], [20]], np.int64)
    both = client("infer", "total", [given(k, name="k"), given(x, binary=False)])
    assert np.array_equal(both.as_numpy("total"), x + k)
    assert np.array_equal(both.as_numpy("count"), 2 * k)
    wanted = [InferRequestedOutput("count", binary_data=False)]
    one = client("infer", "total", [given(x), given(k, name="k")], outputs=wanted)
    assert np.array_equal(one.as_numpy("count"), 2 * k)
    assert one.as_numpy("total") is None
    wanted = [InferRequestedOutput("count"), InferRequestedOutput("total", binary_data=False)]
    turned = client("infer", "total", [given(x), given(k, name="k")], outputs=wanted)
    assert [output["name"] for output in turned.get_response()["outputs"]] == ["count", "total"]
    assert np.array_equal(turned.as_numpy("count"), 2 * k)
    assert np.array_equal(turned.as_numpy("total"), x + k)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("model", "rows"),
    [
        ("half", np.array([[0.5, -2], [65504, 6e-8], [1 / 3, 0]], np.float16)),
        ("double", np.array([[1 / 3, -1e300]], np.float64)),
        ("long", np.array([[2**63 - 1, -(2**63)]], np.int64)),
        ("bytes", np.array([[0, 255], [7, 8]], np.uint8)),
        ("flag", np.array([[True, False], [False, True]])),
        ("text", np.array([[b"a", b""], ["größer".encode(), b"x" * 3000]], object)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_datatypes_come_back_unchanged(client: Client, model: str, rows: Array, binary: bool) -> None:
    wanted = [InferRequestedOutput("y", binary_data=binary)]
    answer = client("infer", model, [given(rows, binary=binary)], outputs=wanted).as_numpy("y")
    assert answer.shape == rows.shape
    if rows.dtype != object:
        assert answer.dtype == rows.dtype
        assert np.array_equal(answer, rows)
    else:
        assert [_bytes(one) for one in answer.flat] == list(rows.flat)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def test_numpys_strings(client: Client) -> None:
    rows = np.array([["one", "two"]], np.object_)
    answer = client("infer", "text", [given(rows)]).as_numpy("y")
    assert answer.tolist() == [[b"one", b"two"]]


@pytest.mark.parametrize("rows", [1, 64, 65, 200])
def test_more_rows_than_a_batch_takes(client: Client, rows: int) -> None:
    x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    assert np.array_equal(client("infer", "negate", [given(x)]).as_numpy("y"), -x)


@pytest.mark.parametrize("width", [1, 7, 5000])
def test_a_variable_axis(client: Client, width: int) -> None:
    x = np.ones((2, width), np.float32)
    assert client("infer", "sum", [given(x)]).as_numpy("y").tolist() == [[width], [width]]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_both_ways(client: Client, algorithm: str) -> None:
    x = np.zeros((500, 3), np.float32)
    result = client(
        "infer",
        "negate",
        [given(x)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert np.array_equal(result.as_numpy("y"), -x)


def test_errors_are_raised_with_the_servers_message(client: Client) -> None:
    x = given(np.zeros((1, 3), np.float32))
    assert refused(client, "unknown", [x]) == ("404", "there is no model 'unknown'")
    status, message = refused(client, "negate", [given(np.zeros((1, 4), np.float32))])
    assert (status, message) == ("422", "input 'x' must have shape [-1, 3] (-1: any), got [1, 4]")
    status, message = refused(client, "negate", [given(np.zeros((1, 3), np.float64))])
    assert (status, message) == ("422", "input 'x' must be FP32, got 'FP64'")
    status, message = refused(client, "negate", [given(np.zeros((1, 3), np.float32), name="z")])
    assert status == "400"
    assert message.startswith("the model has no input 'z'")
    status, message = refused(client, "negate", [x], outputs=[InferRequestedOutput("z")])
    assert status == "400"
    assert message.startswith("the model has no output 'z'")
    status, message = refused(client, "total", [given(np.zeros((1, 2), np.float32))])
    assert (status, message) == ("400", "input 'k' is missing")


def test_an_engines_error_is_raised_with_a_reference(client: Client) -> None:
    status, message = refused(client, "pick", [given(np.array([[99]], np.int64))])
    assert status == "422"
    assert message.startswith("model 'pick' refuses the values of this request (reference ")


def test_after_an_error_the_same_client_goes_on(client: Client) -> None:
    x = np.ones((1, 3), np.float32)
    refused(client, "negate", [given(np.ones((1, 2), np.float32))])
    assert np.array_equal(client("infer", "negate", [given(x)]).as_numpy("y"), -x)


def own_rows(number: int) -> Array:
    """Make rows that no other caller sends: 1 to 5 of them."""
    return np.arange(3 * (number % 5 + 1), dtype=np.float32).reshape(-1, 3) + 1000 * number


async def test_many_callers_each_get_their_own_rows_asyncio(url: str) -> None:
    async with tritonclient.http.aio.InferenceServerClient(url, conn_limit=CALLERS) as client:

        async def call(number: int) -> None:
            for turn in range(5):
                rows = own_rows(number + CALLERS * turn)
                wanted = [InferRequestedOutput("y", binary_data=number % 2 == 0)]
                inputs = [given(rows, binary=number % 3 == 0)]
                result = await client.infer("negate", inputs, outputs=wanted, request_id=f"{number}")
                assert result.get_response()["id"] == f"{number}"
                assert np.array_equal(result.as_numpy("y"), -rows)

        await asyncio.gather(*[call(number) for number in range(CALLERS)])


def test_many_callers_each_get_their_own_rows_greenlets(url: str) -> None:
    # Fewer than above: the client itself waits 10 ms after each `async_infer`.
    sent = [own_rows(number) for number in range(CALLERS // 2)]
    with tritonclient.http.InferenceServerClient(url, concurrency=len(sent)) as client:
        asked = [client.async_infer("negate", [given(rows)]) for rows in sent]
        for rows, answer in zip(sent, asked, strict=True):
            assert np.array_equal(answer.get_result().as_numpy("y"), -rows)


async def test_a_callers_invalid_input_does_not_affect_others(url: str) -> None:
    async with tritonclient.http.aio.InferenceServerClient(url, conn_limit=CALLERS) as client:

        async def call(number: int) -> None:
            index = 99 if number % 16 == 7 else number % 3
            call = client.infer("pick", [given(np.array([[index]], np.int64))])
            if index == 99:
                with pytest.raises(InferenceServerException, match="model 'pick' refuses the values"):
                    await call
            else:
                assert (await call).as_numpy("y").tolist() == [[10 * index + 10]]

        await asyncio.gather(*[call(number) for number in range(CALLERS)])


def test_statistics_add_up(client: Client) -> None:
    def success() -> tuple[int, int]:
        (stats,) = client("get_inference_statistics", "double")["model_stats"]
        return stats["inference_stats"]["success"]["count"], stats["inference_count"]

    requests, rows = success()
    client("infer", "double", [given(np.zeros((4, 2)))])
    assert success() == (requests + 1, rows + 4)
    listed = client("get_inference_statistics")["model_stats"]
    assert {stats["name"] for stats in listed} == set(MODELS)


def test_the_repository_index_and_a_models_configuration(client: Client) -> None:
    index = client("get_model_repository_index")
    assert {entry["name"]: entry["state"] for entry in index} == dict.fromkeys(MODELS, "READY")
    assert client("get_model_config", "negate")["max_batch_size"] == 64


def test_a_model_without_a_batch_axis(client: Client) -> None:
    assert client("get_model_config", "running")["max_batch_size"] == 0
    assert client("get_model_metadata", "running")["inputs"][0]["shape"] == [-1]
    x = InferInput("x", [6], "FP32")
    x.set_data_from_numpy(np.ones(6, np.float32))
    answer = client("infer", "running", [x])
    assert answer.as_numpy("y").tolist() == [1, 2, 3, 4, 5, 6]
