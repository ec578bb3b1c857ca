"""Compressed requests and answers: sizes, limits, bombs, broken streams; on both paths."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput

from cobatch.server.http.body import Body, decompress, measure
from cobatch.server.http.compression import choose, compress
from cobatch.server.http.problem import Problem
from cobatch.server.http.reply import Reply
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http import serving
from tests.support.http.serving import Answer, Served, post
from tests.support.models import models

LIMIT = 100_000


@pytest.fixture(scope="module", params=WAYS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = models.write(tmp_path_factory.mktemp("models"), models.negate(width="width"), "negate.onnx")
    model = ModelSettings(path=file, max_batch_size=4, threads=1)
    limits: dict[str, Any] = {"max_body_bytes": LIMIT, "compress_min_bytes": 1000}
    with serving.serve(models=(model,), **limits, **way(request.param)) as server:
        yield server


def tails(answer: Answer) -> tuple[Any, bytes]:
    """A binary answer's JSON and its tail."""
    assert answer.status == 200, answer
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.body[:length]), answer.body[length:]


PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
UNPACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}
WIDE = 10_000


def unpacked(body: bytes, coding: bytes, limit: int) -> Body:
    return decompress(body, coding, measure(body, coding, limit))


def wide(coding: str | None, accept: str | None, binary: bool = True) -> bytes:
    data = np.arange(WIDE, dtype="<f4").tobytes()
    given: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [1, WIDE]}
    given["parameters"] = {"binary_data_size": len(data)}
    text = json.dumps({"inputs": [given], "parameters": {"binary_data_output": binary}}).encode()
    body = text + data
    headers = {"Inference-Header-Content-Length": str(len(text))}
    if coding is not None:
        body = PACK[coding](body)
        headers |= {"Content-Encoding": coding, "Content-Length": str(len(body))}
    if accept is not None:
        headers["Accept-Encoding"] = accept
    return post("/v2/models/negate/infer", body, headers)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("accept", [None, "gzip", "deflate", "br, deflate;q=0.5", "gzip;q=0, identity"])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_compressed_both_ways(served: Served, coding: str | None, accept: str | None, binary: bool) -> None:
    """Sizes in the messages are those of the decompressed bodies."""
    expected = {"gzip": "gzip", "deflate": "deflate", "br, deflate;q=0.5": "deflate"}.get(accept or "")
    with served.connect() as client:
        for _ in range(2):
            answer = client.ask(wide(coding, accept, binary))
            assert answer.headers.get("content-encoding") == expected
            if expected is not None:
                assert "accept-encoding" in answer.headers["vary"]
                answer.body = UNPACK[expected](answer.body)
            got, tail = tails(answer) if binary else (answer.json, b"")
            values = np.frombuffer(tail, "<f4").tolist() if binary else got["outputs"][0]["data"]
            assert values == [-value for value in range(WIDE)]


def test_only_large_answers_are_compressed(served: Served) -> None:
    small = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
    answer = served.ask(post("/v2/models/negate/infer", small, {"Accept-Encoding": "gzip"}))
    assert "content-encoding" not in answer.headers
    assert answer.json["outputs"][0]["data"] == [-1]


@pytest.mark.parametrize(
    "algorithms", [("gzip", "deflate"), ("deflate", "gzip"), (None, "gzip"), ("gzip", None)]
)
def test_tritonclients_two_algorithms(served: Served, algorithms: tuple[str | None, str | None]) -> None:
    x = np.arange(WIDE, dtype=np.float32).reshape(1, -1)
    given = InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x)
    with InferenceServerClient(f"127.0.0.1:{served.server.port}") as client:
        result = client.infer(
            "negate",
            [given],
            request_compression_algorithm=algorithms[0],
            response_compression_algorithm=algorithms[1],
        )
        assert np.array_equal(result.as_numpy("y"), -x)


# Invalid bodies


def packed(served: Served, coding: str, body: bytes) -> Answer:
    """Return the response to this body; requests before and after it on the connection are served."""
    with served.connect() as other:
        assert other.ask(wide(None, None)).status == 200
        answer = served.ask(post("/v2/models/negate/infer", body, {"Content-Encoding": coding}))
        assert other.ask(wide(None, None)).status == 200
    return answer


@pytest.mark.parametrize("coding", PACK)
def test_a_bomb(served: Served, coding: str) -> None:
    bomb = PACK[coding](bytes(1 << 20))
    assert len(bomb) < 2000
    answer = packed(served, coding, bomb)
    assert (answer.status, answer.slug, answer.json["limit_bytes"]) == (413, "body-too-large", LIMIT)


@pytest.mark.parametrize("coding", PACK)
def test_of_a_bomb_no_more_than_the_limit_is_unpacked(coding: str) -> None:
    bomb = PACK[coding](bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(Problem, match="the limit is 100000"):
            unpacked(bomb, coding.encode(), LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 4 * LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("coding", PACK)
def test_a_body_of_exactly_the_limit_is_unpacked(coding: str) -> None:
    for size in (0, 1, LIMIT):
        assert unpacked(PACK[coding](bytes(size)), coding.encode(), LIMIT) == bytes(size)
    with pytest.raises(Problem, match="100001 bytes or more"):
        unpacked(PACK[coding](bytes(LIMIT + 1)), coding.encode(), LIMIT)


@pytest.mark.parametrize("coding", PACK)
def test_beyond_1_mib_a_body_is_128_times_its_compressed_size_at_most(coding: str) -> None:
    limit = 1 << 26
    assert len(unpacked(PACK[coding](bytes(1 << 20)), coding.encode(), limit)) == 1 << 20
    half = np.random.default_rng(0).bytes(1 << 16) + bytes(6 << 20)
    assert unpacked(PACK[coding](half), coding.encode(), limit) == half
    with pytest.raises(Problem, match="the limit is"):
        unpacked(PACK[coding](bytes(10 << 20)), coding.encode(), limit)


def test_only_what_shrinks_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    compressors = mock.Mock(wraps=zlib.compressobj)
    monkeypatch.setattr(zlib, "compressobj", compressors)
    noise = np.random.default_rng(0).random(1 << 18, np.float32).tobytes()
    for body, smaller in ((noise, False), (bytes(1 << 20), True), (bytes((1 << 24) + 1), False)):
        compressors.reset_mock()
        reply = compress(Reply(200, b"x", (b"head", body)), b"gzip")
        assert compressors.called == smaller == (reply.length < len(body))
        assert bool(reply.headers) == smaller


@pytest.mark.parametrize("coding", PACK)
def test_streams_that_are_not_whole(served: Served, coding: str) -> None:
    whole = PACK[coding](b'{"inputs":[]}')
    bodies = [whole[:cut] for cut in range(len(whole))]
    bodies += [whole + b"!", whole + whole, bytes(50), whole[:-2] + b"?" + whole[-1:], b"{}"]
    for body in bodies:
        with pytest.raises(Problem) as caught:
            unpacked(body, coding.encode(), LIMIT)
        assert caught.value.kind.slug == "bad-encoding"
    for body in bodies[-6:]:
        answer = packed(served, coding, body)
        assert (answer.status, answer.slug) == (400, "bad-encoding")


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "gzip, deflate", "chunked", "\xff"])
def test_codings_that_are_not_known(served: Served, coding: str) -> None:
    answer = packed(served, coding, b"whatever")
    assert (answer.status, answer.slug) == (415, "unsupported-encoding")
    assert answer.json["supported"] == ["gzip", "deflate"]


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        (b"", None), (b"*", None), (b"identity", None), (b"br", None), (b"x-gzips", None),
        (b"gzip", b"gzip"), (b"GZIP", b"gzip"), (b"deflate", b"deflate"), (b"deflate, gzip", b"gzip"),
        (b"gzip;q=0, deflate", b"deflate"), (b"gzip; q=0.000,deflate ; q=0.1", b"deflate"),
        (b"gzip;q=0", None),
    ],
)  # fmt: skip
def test_accept_encoding(accept: bytes, coding: bytes | None) -> None:
    assert choose(accept) == coding
