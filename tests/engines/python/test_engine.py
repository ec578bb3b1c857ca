"""The engines of models in Python, without a server: tensors, errors, and the end of the process."""

from __future__ import annotations

import os
import queue
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cobatch.engines.base import Array, Engine, RowShapes
from cobatch.engines.errors import EngineEndedError, EngineError, EngineLoadError, EngineRunError, OutputError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.engines.python.engine import ProcessEngine, _own
from cobatch.engines.worker import Job, Outcome, Worker
from tests.support.python_models import faulty
from tests.support.python_models.faulty import CRASHES, EXITS, FAILS, GATE, HANGS, WAITS
from tests.support.python_models.gates import passed

FOLDER = Path(faulty.__file__).parent


def made(name: str, how: str = "process", folder: Path = FOLDER) -> Engine:
    options = EngineOptions(name=name, folder=str(folder), in_thread=how == "thread", threads=1)
    return load_engine("python", f"faulty.py:{name}", 8, options)


def run(engine: Engine, *inputs: Array, slot: int = 0) -> tuple[Array, ...]:
    """Pack, run, and copy the outputs, as the batcher does."""
    send(engine, *inputs, slot=slot)
    return tuple(output.copy() for output in engine.wait(slot))


def send(engine: Engine, *inputs: Array, slot: int = 0) -> None:
    shapes: RowShapes = tuple(array.shape[1:] for array in inputs)
    rows = len(inputs[0])
    for buffer, array in zip(engine.inputs(slot, rows, shapes), inputs, strict=True):
        buffer[:rows] = array
    engine.enqueue(slot, rows, shapes)


def numbers(*values: int) -> Array:
    return np.array(values).reshape(-1, 1)


def texts(*rows: list[bytes]) -> Array:
    return np.array(rows, object)


@pytest.fixture(scope="module")
def opened() -> Iterator[Callable[[str, str], Engine]]:
    """Engines that tests share, which none of them harms."""
    engines: dict[tuple[str, str], Engine] = {}

    def get(name: str, how: str) -> Engine:
        if (name, how) not in engines:
            engine = engines[name, how] = made(name, how)
            engine.open()
        return engines[name, how]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture
def process() -> Iterator[ProcessEngine]:
    engine = made("Faulty")
    assert isinstance(engine, ProcessEngine)
    engine.open()
    yield engine
    engine.close()


@pytest.fixture(params=["process", "thread"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Opened = Callable[[str, str], Engine]


@pytest.mark.parametrize("name", ["Faulty", "Reuses"])
def test_numbers_in_both_slots(opened: Opened, how: str, name: str) -> None:
    engine = opened(name, how)
    send(engine, numbers(1, 2, 3), slot=0)
    send(engine, numbers(4), slot=1)
    first = engine.wait(0)[0]
    assert engine.wait(1)[0].tolist() == [[8]]
    assert first.tolist() == [[2], [4], [6]], "the other slot's answer is in its place"


@pytest.mark.parametrize("rows", [1, 2])
def test_answers_that_the_model_uses_again(opened: Opened, how: str, rows: int) -> None:
    engine, answers = opened("Reuses", how), []
    for slot in range(2):
        send(engine, numbers(*[slot + 1] * rows), slot=slot)
        answers.append(engine.wait(slot)[0])
    assert [answer[0].tolist() for answer in answers] == [[2], [4]]


def test_an_array_that_nothing_else_refers_to_is_not_copied() -> None:
    fresh = [np.ones(2)]
    assert _own(fresh, 0) is fresh[0]
    kept = fresh[0]
    assert not np.shares_memory(_own(fresh, 0), kept)
    views = [np.ones(2)[:1]]
    assert not np.shares_memory(_own(views, 0), views[0])


def test_strings_and_numbers_of_any_length(opened: Opened, how: str) -> None:
    engine = opened("upper", how)
    for length in (1, 3, 0, 2):
        words = texts([b"a"] * length, [b"b\0c"] * length)
        (output,) = run(engine, words, numbers(1, 2))
        assert output.tolist() == [[b"A"] * length, [b"B\0CB\0C"] * length]


def test_strings_of_requests_are_let_go(opened: Opened, how: str) -> None:
    """The buffers of all widths share one memory, too."""
    engine = opened("upper", how)
    buffers = []
    for width in (4, 1, 2):
        shapes = (width,), (1,)
        buffers.append(engine.inputs(0, 2, shapes)[0])
        run(engine, texts([b"a"] * width, [b"b"] * width), numbers(1, 1))
        assert {*buffers[-1][:2].flat} == {b""}
    assert all(np.shares_memory(buffers[0], buffer) for buffer in buffers)


def test_answers_larger_than_all_before(opened: Opened, how: str) -> None:
    engine = opened("widen", how)
    for width in (1, 700, 30):
        row = np.arange(width, dtype=np.float32)[np.newaxis].repeat(3, 0)
        (output,) = run(engine, row)
        assert output.shape == (3, width * 1000)
        assert (output == np.tile(row, (1, 1000))).all()


def test_whole_tensors(opened: Opened, how: str) -> None:
    engine = opened("mean", how)
    assert engine.max_batch_size == 1
    assert run(engine, np.full((1, 3, 5), 2, np.float32))[0].tolist() == [2.0]


def test_errors(opened: Opened, how: str) -> None:
    engine = opened("Faulty", how)
    with pytest.raises(EngineRunError) as caught:
        run(engine, numbers(1, FAILS))
    assert "ValueError: no such row" in str(caught.value)
    assert (f"\n  row {FAILS}" in str(caught.value)) == (how == "process"), "what it printed"
    assert run(engine, numbers(1))[0].tolist() == [[2]]
    with pytest.raises(OutputError, match="output 'z': expected INT64"):
        run(opened("Wrong", how), numbers(1))


def test_a_batch_behind_one_that_fails_has_its_own_answer(how: str) -> None:
    """Zeros run between the two, to explain the error, and are answered last."""
    engine, told = made("Faulty", how), queue.SimpleQueue[Outcome]()
    worker = Worker(engine, "Faulty", lambda _, outcome: told.put(outcome))

    def on_open(_: EngineError | None) -> None:
        for slot, rows in enumerate(([FAILS], [1, FAILS])):  # both are there when the first one begins
            (buffer,) = engine.inputs(slot, len(rows), ((1,),))
            buffer[: len(rows)] = numbers(*rows)
            worker.submit(Job(slot, len(rows), ((1,),), None, explain=True))
        worker.stop()

    worker.start(on_open)
    for _ in range(2):
        outcome = told.get(timeout=60)
        assert "ValueError: no such row" in str(outcome.error)
        assert str(outcome.error).count(f"\n  row {FAILS}") == (how == "process"), "what it printed itself"
        assert outcome.zeros_run
    assert worker.join(60)


def test_wrong_outputs_of_the_warm_up_refuse_the_model(how: str) -> None:
    told: queue.SimpleQueue[EngineError | None] = queue.SimpleQueue()
    worker = Worker(made("half", how), "half")
    worker.start(told.put)
    error = told.get(timeout=60)
    assert isinstance(error, EngineLoadError)
    assert str(error) == "output 'output': expected FP32 [1], got FP64 [1]"
    assert worker.join(60)


def test_a_string_that_is_none(opened: Opened) -> None:
    with pytest.raises(TypeError, match="an element is int"):
        run(opened("upper", "process"), np.array([[1]], object), numbers(1))


@pytest.mark.parametrize(
    ("name", "text"),
    [("nothing", "faulty.py has no 'nothing'"), ("Refuses", "Refuses.load failed: ValueError: not this")],
)
def test_load_errors(how: str, name: str, text: str) -> None:
    engine = made(name, how)
    with pytest.raises(EngineLoadError, match=f"^{text}"):
        engine.open()
    engine.close()


def test_a_process_that_ends_while_it_loads() -> None:
    engine = made("Exits")
    with pytest.raises(EngineLoadError, match=r"process exited with status 4\n.*\n  not today"):
        engine.open()
    engine.close()


@pytest.mark.parametrize(("row", "end"), [(EXITS, "exited with status 3"), (CRASHES, "ended by SIGSEGV")])
def test_a_process_that_ends(process: ProcessEngine, row: int, end: str) -> None:
    ended: queue.SimpleQueue[EngineEndedError] = queue.SimpleQueue()
    process.on_end = ended.put
    send(process, numbers(row), slot=0)
    with pytest.raises(EngineEndedError, match=end) as caught:
        process.wait(0)
    assert f"\n  row {row}" in str(caught.value)
    assert caught.value.begun
    with pytest.raises(EngineEndedError, match=end) as caught:
        send(process, numbers(1))
    assert not caught.value.begun
    assert end in str(ended.get(timeout=60))


def test_a_batch_behind_it_has_not_begun(tmp_path: Path) -> None:
    shutil.copy(faulty.__file__, tmp_path)
    gate = tmp_path / GATE.name
    os.mkfifo(gate)
    engine = made("Faulty", folder=tmp_path)
    engine.open()
    send(engine, numbers(WAITS, EXITS), slot=0)
    with passed(gate):  # once the first one has begun
        send(engine, numbers(1), slot=1)
    for slot, begun in ((0, True), (1, False)):
        with pytest.raises(EngineEndedError, match="exited with status 3") as caught:
            engine.wait(slot)
        assert caught.value.begun == begun
    engine.close()


def test_it_can_be_killed_at_any_time(process: ProcessEngine) -> None:
    send(process, numbers(HANGS))
    process.kill()
    with pytest.raises(EngineEndedError, match="was ended by the server"):
        process.wait(0)
    process.kill()
    early = made("Faulty")
    assert isinstance(early, ProcessEngine)
    early.kill()
    with pytest.raises(EngineLoadError, match="about to stop"):
        early.open()
    early.close()


def test_an_idle_process_that_ends(process: ProcessEngine) -> None:
    ended: queue.SimpleQueue[EngineEndedError] = queue.SimpleQueue()
    process.on_end = ended.put
    os.kill(process.pid, signal.SIGKILL)
    assert "ended by SIGKILL" in str(ended.get(timeout=60))
