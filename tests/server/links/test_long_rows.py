"""Strings and long rows between fronts and home: the thread reads and writes them, not the event loops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cobatch.batcher.request import Request
from cobatch.engines.base import Signature, TensorSpec
from cobatch.engines.link.messages import Submit
from cobatch.engines.link.slab import SlabWriter
from cobatch.server.http.problem import Problem
from cobatch.server.links import rows, uplink
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.v2 import binary
from cobatch.server.v2.pieces import in_pieces
from tests.support.fronts.linked import WAYS, way
from tests.support.fronts.pair import Probe, pair
from tests.support.http.serving import DEADLINE_S, GATE, GatedEngine, post, serve
from tests.support.virtual.loop import Array

MANY = [b"%d" % number for number in range(20_000)]


class Echo(GatedEngine):
    """Answers strings with themselves, or `answers` in place of each."""

    def __init__(self, answers: str | None = None) -> None:
        super().__init__()
        self.answers = answers
        self.signature = Signature((TensorSpec("x", "BYTES", (-1,)),), (TensorSpec("y", "BYTES", (-1,)),))

    def inputs(self, slot: int, rows: int, row_shapes: Any) -> tuple[Array, ...]:
        self.buffers[slot] = np.full((self.max_batch_size, *row_shapes[0]), b"", object)
        return (self.buffers[slot],)

    def wait(self, slot: int) -> tuple[Array, ...]:
        assert self._gate.wait(DEADLINE_S)
        x = self.buffers[slot][: self._rows[slot]]
        return (x.copy() if self.answers is None else np.full(x.shape, self.answers, object),)


class Texts(Request):
    """A row of strings, as a front's decoder gives it; `answer` has the answer's strings."""

    def __init__(self, values: list[bytes]) -> None:
        super().__init__(1, ((len(values),),), [rows.written(values)])
        self.answer: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        self.answers = 0

    def done(self) -> None:
        self.answers += 1
        if self.error is not None:
            self.answer.set_exception(self.error)
        else:
            assert self.batch is not None
            self.answer.set_result(self.batch.outputs[0][self.first_row].tolist())


@contextlib.contextmanager
def held_thread() -> Iterator[None]:
    """Keep the thread busy."""
    go_on = threading.Event()
    in_pieces(go_on.wait, DEADLINE_S)
    try:
        yield
    finally:
        go_on.set()


def encoded(values: list[bytes]) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def binary_request(values: list[bytes]) -> bytes:
    data = encoded(values)
    x = {"name": "x", "shape": [1, len(values)], "datatype": "BYTES",
         "parameters": {"binary_data_size": len(data)}}  # fmt: skip
    head = json.dumps({"inputs": [x], "parameters": {"binary_data_output": True}}).encode()
    return post(GATE, head + data, {"Inference-Header-Content-Length": str(len(head))})


@pytest.mark.parametrize("form", ["binary", "JSON"])
@pytest.mark.parametrize("values", [MANY, [b"a" * (3 << 20), b"b"]], ids=["many", "long"])
def test_loops_are_not_held(values: list[bytes], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, str]] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(data: Any, *more: Any) -> Any:
            calls.append((name, len(data), threading.current_thread().name))
            return function(data, *more)

        return call

    for module, name in ((binary, "read_elements"), (rows, "read_elements"), (rows, "bytes_tensor")):
        monkeypatch.setattr(module, name, recorded(f"{module.__name__}.{name}", getattr(module, name)))
    x = {"name": "x", "shape": [1, len(values)], "datatype": "BYTES",
         "data": [value.decode() for value in values]}  # fmt: skip
    request = binary_request(values) if form == "binary" else post(GATE, {"inputs": [x]})
    model = ModelSettings(path="gate", max_batch_size=4)
    with serve(models=(model,), engines={"gate": Echo()}, **way("fronts")) as served:
        answer = served.ask(request)
    assert answer.status == 200
    if form == "binary":
        assert answer.body[int(answer.headers["inference-header-content-length"]) :] == encoded(values)
    else:
        assert answer.json["outputs"][0]["data"] == x["data"]
    # A front reads binary and writes the link's form, home reads and writes, the front reads.
    assert len(calls) == (5 if form == "binary" else 4), calls
    assert all(thread.startswith("cobatch-codec") for _, _, thread in calls), calls


async def test_a_caller_that_leaves_before_its_strings_are_read() -> None:
    async with pair(engine=Echo()) as both:
        front = both.fronts[0]
        leaves = Texts(MANY)
        with held_thread():
            front.batcher.submit(leaves)
            await both.until(lambda: both.link(0).open)
            front.batcher.cancel(leaves)
            await both.until(lambda: not both.link(0).open and not front.blocks)
        stays = Texts([b"x", b"y"])
        front.batcher.submit(stays)
        assert await stays.answer == [b"x", b"y"]
        after = Texts(MANY)
        front.batcher.submit(after)
        assert await after.answer == MANY
        assert (leaves.answers, both.batcher.counters.accepted) == (0, 2)


async def test_a_link_that_ends_before_strings_are_read() -> None:
    async with pair(engine=Echo()) as both:
        front, lost = both.fronts[0], Texts(MANY)
        with held_thread():
            front.batcher.submit(lost)
            await both.until(lambda: both.link(0).open)
            both.link(0).end("the test ends it")
            await both.until(lambda: lost.answers)
        await both.join(0)
        again = Texts(MANY)
        front.batcher.submit(again)
        assert await again.answer == MANY
        assert (lost.answers, both.batcher.counters.accepted) == (1, 1)


@pytest.mark.parametrize("end", ["caller", "link"])
async def test_an_answer_whose_strings_are_being_read(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()
    read = rows.read_outputs

    def held(*arguments: Any) -> Any:
        began.set()
        go_on.wait(DEADLINE_S)
        return read(*arguments)

    async with pair(engine=Echo()) as both:
        front, probe = both.fronts[0], Texts(MANY)
        with monkeypatch.context() as patch:
            patch.setattr(uplink, "read_outputs", held)
            front.batcher.submit(probe)
            await both.until(began.is_set)
            if end == "caller":
                front.batcher.cancel(probe)
            else:
                both.link(0).end("the test ends it")
                await both.until(lambda: front.uplinks.current is None)
            go_on.set()
            await both.until(lambda: front.batcher._open == 0)
        if end == "caller":
            await both.until(lambda: not front.blocks and not both.blocks_of_home())
            assert probe.answers == 0
        else:
            assert await probe.answer == MANY  # it had come before the end


class Row(Probe):
    """A row of 1.6 MB."""

    def __init__(self) -> None:
        super().__init__(range(200_000))


async def test_long_rows_are_copied_in_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    fill = SlabWriter.fill

    def recorded(*arguments: Any) -> None:
        threads.append(threading.current_thread().name)
        fill(*arguments)

    monkeypatch.setattr(SlabWriter, "fill", recorded)
    async with pair(slab_bytes=1 << 23) as both:
        row = Row()
        both.fronts[0].batcher.submit(row)
        assert await row.answer == [[2 * number for number in range(200_000)]]
        await both.until(lambda: not both.fronts[0].blocks and not both.blocks_of_home())
    assert len(threads) == 2
    assert all(name.startswith("cobatch-codec") for name in threads)


@pytest.mark.parametrize("end", ["caller", "link"])
async def test_a_long_row_that_is_being_copied(end: str) -> None:
    async with pair(slab_bytes=1 << 23) as both:
        front, row = both.fronts[0], Row()
        with held_thread():
            front.batcher.submit(row)
            await both.until(lambda: front.uplink._flights.open)
            if end == "caller":
                front.batcher.cancel(row)
            else:
                both.link(0).end("the test ends it")
                await both.until(lambda: row.answers)
                await both.join(0)
        await both.until(lambda: not front.blocks)
        again = Row()
        front.batcher.submit(again)
        assert await again.answer == [[2 * number for number in range(200_000)]]
        assert row.answers == (end == "link")
        assert both.batcher.counters.accepted == 1
        if end == "link":
            assert isinstance(row.answer.exception(), Problem)


async def test_strings_that_are_none_end_the_link() -> None:
    async with pair(2, engine=Echo()) as both:
        told: list[int] = []
        both.downlinks.on_broken = lambda front, why: told.append(front)
        size = 40_000
        message = Submit(32, 0, 1, (size,), b"\xff" * size, shapes=((size // 4,),))
        both.fronts[0].uplink.send(message)
        await both.until(lambda: told)
        assert told == [0]
        other = Texts(MANY)
        both.fronts[1].batcher.submit(other)
        assert await other.answer == MANY


async def test_a_failure_to_copy_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError("no memory")

    async with pair(engine=Echo()) as both:
        monkeypatch.setattr("cobatch.server.v2.encode._own", full)
        probe = Texts([b"x"] * 40_000)
        both.fronts[0].batcher.submit(probe)
        with pytest.raises(Problem) as failure:
            await probe.answer
        assert failure.value.kind.slug == "internal"
    assert "copying a long answer failed" in caplog.text


@pytest.mark.parametrize("path", WAYS)
@pytest.mark.parametrize("values", [[b"a"], MANY], ids=["one", "many"])
def test_answers_that_are_no_unicode(
    path: str, values: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "cobatch")  # records have tracebacks, which refer to the connection
    model = ModelSettings(path="gate", max_batch_size=4)
    with serve(models=(model,), engines={"gate": Echo("\ud800")}, **way(path)) as served:
        answer = served.ask(binary_request(values))
        assert (answer.status, answer.slug) == (500, "internal")


@pytest.mark.parametrize(
    ("datatypes", "size", "is_long"),
    [
        (("FP32",), 64 << 20, False),
        (("BOOL",), 1 << 20, False),
        (("BOOL", "FP32"), (1 << 20) + 1, True),
        (("BYTES",), 1 << 14, False),
        (("BOOL", "BYTES"), (1 << 14) + 1, True),
    ],
)
def test_which_requests_home_reads_in_the_thread(
    datatypes: tuple[str, ...], size: int, is_long: bool
) -> None:
    specs = tuple(TensorSpec(f"x{number}", each, (-1,)) for number, each in enumerate(datatypes))
    reader = rows.InputReader(Signature(specs, specs))
    assert reader.is_long(Submit(32, 0, 1, (size - 1, 1), 0)) is is_long
