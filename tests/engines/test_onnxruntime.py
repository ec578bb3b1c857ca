"""ONNX Runtime on real files: bindings, padding, refused models, and failing runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from cobatch.engines.base import (
    AUTO,
    DATATYPES,
    EXPORT_DOCS,
    Array,
    Batching,
    RowShapes,
    Signature,
    TensorSpec,
)
from cobatch.engines.errors import BadRequest, EngineError, EngineLoadError, EngineRunError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.engines.onnxruntime import runs
from cobatch.engines.onnxruntime.engine import OnnxRuntimeEngine
from cobatch.engines.worker import Worker
from tests.support.models import models
from tests.support.paths import ROOT

ELEMENT_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
}


ON = Batching("on")
CUDA = "CUDAExecutionProvider"


def opened(
    folder: Path, data: bytes, max_batch_size: int = 4, batching: Batching = AUTO
) -> OnnxRuntimeEngine:
    engine = OnnxRuntimeEngine(models.write(folder, data), max_batch_size, threads=1, batching=batching)
    engine.open()
    return engine


def refused(folder: Path, data: bytes, max_batch_size: int = 4) -> str:
    """Return the error of loading a model that is to be batched, whatever the proof would say."""
    engine = OnnxRuntimeEngine(models.write(folder, data), max_batch_size, threads=1, batching=ON)
    with pytest.raises(EngineLoadError) as caught:
        engine.open()
    engine.close()
    return str(caught.value)


def run(engine: OnnxRuntimeEngine, *inputs: Array, slot: int = 0) -> tuple[Array, ...]:
    """Pack, run, and copy the outputs, as the batcher does."""
    shapes: RowShapes = tuple(array.shape[1:] for array in inputs)
    rows = len(inputs[0])
    for buffer, array in zip(engine.inputs(slot, len(inputs[0]), shapes), inputs, strict=True):
        assert len(buffer) >= rows
        assert buffer.shape[1:] == array.shape[1:]
        assert buffer.flags.c_contiguous
        buffer[:rows] = array
    engine.enqueue(slot, rows, shapes)
    return tuple(output.copy() for output in engine.wait(slot))


def floats(*rows: list[float]) -> Array:
    return np.array(rows, np.float32)


def test_signature_leaves_the_batch_axis_out(tmp_path: Path) -> None:
    assert opened(tmp_path, models.two_inputs()).signature == Signature(
        inputs=(
            TensorSpec("x", "FP32", (2,), axis_names=("",)),
            TensorSpec("k", "INT64", (1,), axis_names=("",)),
        ),
        outputs=(
            TensorSpec("total", "FP32", (2,), axis_names=("",)),
            TensorSpec("count", "INT64", (1,), axis_names=("",)),
        ),
        fixed_batch=None,
        batching=Batching("proven"),
    )
    x = opened(tmp_path, models.sum_rows()).signature.inputs[0]
    assert (x.shape, x.row_elements, x.dtype) == ((-1,), -1, np.dtype(np.float32))
    assert TensorSpec("t", "INT8", (2, 3)).row_elements == 6
    assert TensorSpec("t", "INT8", ()).row_elements == 1


def test_the_signature_is_known_once_the_engine_is_open(tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine(models.write(tmp_path, models.negate()), 4)
    with pytest.raises(RuntimeError, match="not open"):
        _ = engine.signature


def test_each_run_reads_the_buffers_and_writes_the_same_outputs(tmp_path: Path) -> None:
    engine = opened(tmp_path, models.negate())
    (buffer,) = engine.inputs(0, 1, ((3,),))
    buffer[:2] = 1
    engine.enqueue(0, 2, ((3,),))
    (first,) = engine.wait(0)
    assert (first == -1).all()
    buffer[:2] = 5
    engine.enqueue(0, 2, ((3,),))
    (second,) = engine.wait(0)
    assert (second == -5).all()
    assert second.shape == (2, 3)
    assert np.shares_memory(first, second)
    assert engine.inputs(0, 1, ((3,),))[0] is buffer


def test_slots_do_not_share_memory(tmp_path: Path) -> None:
    engine = opened(tmp_path, models.negate())
    for slot in range(engine.slots):
        engine.inputs(slot, 1, ((3,),))[0][:1] = slot + 1
        engine.enqueue(slot, 1, ((3,),))
    outputs = [engine.wait(slot)[0] for slot in range(engine.slots)]
    assert [output[0, 0] for output in outputs] == [-1, -2]
    assert not np.shares_memory(outputs[0], outputs[1])


def test_every_number_of_rows(tmp_path: Path) -> None:
    engine = opened(tmp_path, models.negate(), max_batch_size=5)
    for rows in (5, 1, 4, 2, 3, 5):
        x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
        assert np.array_equal(run(engine, x)[0], -x)


def test_inputs_of_two_types(tmp_path: Path) -> None:
    engine = opened(tmp_path, models.two_inputs())
    total, count = run(engine, floats([1, 2], [3, 4]), np.array([[10], [20]], np.int64))
    assert total.tolist() == [[11, 12], [23, 24]]
    assert count.tolist() == [[20], [40]]


@pytest.mark.parametrize("datatype", ELEMENT_TYPES)
def test_every_datatype(tmp_path: Path, datatype: str) -> None:
    engine = opened(tmp_path, models.identity(ELEMENT_TYPES[datatype]))
    assert engine.signature.inputs[0].datatype == datatype
    x = np.array([[0, 1], [1, 0], [1, 1]], DATATYPES[datatype])
    (y,) = run(engine, x)
    assert y.dtype == DATATYPES[datatype]
    assert np.array_equal(x, y)


def test_strings(tmp_path: Path) -> None:
    engine = opened(tmp_path, models.identity(TensorProto.STRING))
    x = np.array([["a", "é"], ["", "longer than a word"]], object)
    assert run(engine, x)[0].tolist() == x.tolist()
    as_bytes = np.array([[b"a", "é".encode()]], object)
    assert run(engine, as_bytes)[0].tolist() == [["a", "é"]]
    with pytest.raises(EngineRunError, match="cannot return strings that are not UTF-8"):
        run(engine, np.array([[b"\xff", b""]], object))
    assert run(engine, x)[0].tolist() == x.tolist()


@pytest.mark.parametrize("batching", [AUTO, Batching("off")], ids=["batched", "whole"])
@pytest.mark.parametrize("value", [b"short", b"\xff"], ids=["answered", "failing"])
def test_strings_of_requests_are_let_go_after_the_run(
    tmp_path: Path, batching: Batching, value: bytes
) -> None:
    engine = opened(tmp_path, models.identity(TensorProto.STRING), batching=batching)
    (buffer,) = engine.inputs(0, 1, ((2,),) if batching is AUTO else ((1, 2),))
    flat = buffer.reshape(-1)
    flat[:2] = value
    engine.enqueue(0, 1, (buffer.shape[1:],))
    if value == b"short":
        engine.wait(0)
    else:
        with pytest.raises(EngineRunError):
            engine.wait(0)
    assert flat[:2].tolist() == [b"", b""]


def one_string_a_row() -> bytes:
    """y = x: [batch]."""
    x, y = ("x", TensorProto.STRING, ["batch"]), ("y", TensorProto.STRING, ["batch"])
    return models.model([helper.make_node("Identity", ["x"], ["y"])], [x], [y])


def test_many_strings_run_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their conversion holds the interpreter lock."""
    engine = opened(tmp_path, models.identity(TensorProto.STRING, "n"), max_batch_size=8)
    monkeypatch.setattr(runs, "_MOST_STRINGS", 6)
    sizes = []
    run_once = runs.run

    def counted(*arguments: Any) -> list[Array]:
        sizes.append(arguments[2][0].size)
        return run_once(*arguments)

    monkeypatch.setattr(runs, "run", counted)
    for rows, width, parts in ((3, 2, [6]), (4, 2, [6, 2]), (5, 4, [4] * 5), (2, 7, [7, 7]), (1, 9, [9])):
        x = np.array([[f"{row} {n}" for n in range(width)] for row in range(rows)], object)
        sizes.clear()
        assert run(engine, x)[0].tolist() == x.tolist()
        assert sizes == parts
    flat = opened(tmp_path, one_string_a_row(), max_batch_size=8)
    x = np.array([str(row) for row in range(8)], object)
    sizes.clear()
    assert run(flat, x)[0].tolist() == x.tolist()
    assert sizes == [6, 2]


def test_long_strings_run_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MOST_TEXT_BYTES", 10)
    engine = opened(tmp_path, models.identity(TensorProto.STRING), max_batch_size=8)
    assert [spec.max_text_bytes for spec in engine.signature.inputs] == [10]
    flat = opened(tmp_path, one_string_a_row(), max_batch_size=8)
    ran = watch_rows(monkeypatch)
    for lengths, parts in (
        ([4, 6], [2]),
        ([4, 7], [1, 1]),
        ([1, 1, 1, 9, 1, 1], [3, 2, 1]),
        ([10, 10, 1], [1, 1, 1]),
        ([11, 1], [1, 1]),
        ([11], [1]),
    ):
        x = np.array([["a" * (length - 1), "b"] for length in lengths], object)
        ran.clear()
        assert run(engine, x)[0].tolist() == x.tolist()
        assert ran == parts
        single = np.array(["a" * length for length in lengths], object)
        ran.clear()
        assert run(flat, single)[0].tolist() == single.tolist()
        assert ran == parts


@pytest.mark.parametrize(("width", "parts"), [("n", [2, 2, 1]), ("m", [5])])
def test_many_strings_from_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: str, parts: list[int]
) -> None:
    """As far as the names of axes say how many strings there will be; others are refused."""
    monkeypatch.setattr(runs, "_MOST_STRINGS", 6)
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING)]
    x, y = ("x", TensorProto.INT64, ["batch", "n"]), ("y", TensorProto.STRING, ["batch", width])
    engine = opened(tmp_path, models.model(nodes, [x], [y]), max_batch_size=8)
    ran = watch_rows(monkeypatch)
    for rows in (1, 2, 5):
        ran.clear()
        if rows == 5 and width == "m":
            with pytest.raises(BadRequest, match="the outputs have 15 strings; 6 may be converted"):
                run(engine, np.full((5, 3), 7))
        else:
            assert run(engine, np.full((rows, 3), 7))[0].tolist() == [["7"] * 3] * rows
    assert ran == parts


def watch_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the rows of each run, which are added to the list."""
    ran: list[int] = []
    run_once = runs.run

    def counted(*arguments: Any) -> list[Array]:
        ran.append(len(arguments[2][0]))
        return run_once(*arguments)

    monkeypatch.setattr(runs, "run", counted)
    return ran


def test_strings_that_are_not_text(tmp_path: Path) -> None:
    """They arrive whole; only in outputs must they be UTF-8."""
    engine = opened(tmp_path, models.equal_strings())
    for values in (
        [b"\xff\0\xd8", b"\xff\0\xd8"],
        [b"\xff\0", b"\xff\1"],
        [b"\xff", "é".encode()],
        [b"\xffab", b"\xff"],
    ):
        (same,) = run(engine, np.array([values], object))
        assert same.tolist() == [[values[0] == values[1]]]
    with pytest.raises(EngineRunError, match="cannot take strings"):
        run(engine, np.array([[b"\xff\0", b"a"]], object))


@pytest.mark.parametrize(("width", "last"), [(3, False), ("n", True)])
def test_outputs_of_variable_shape_last(tmp_path: Path, width: int | str, last: bool) -> None:
    engine = opened(tmp_path, models.negate(width=width))
    assert engine.outputs_last == last
    outputs: list[Array] = []
    for value in (1, 2):
        engine.inputs(0, 2, ((3,),))[0][:2] = value
        engine.enqueue(0, 2, ((3,),))
        outputs += engine.wait(0)
    assert outputs[1].tolist() == [[-2] * 3] * 2
    assert (outputs[0].tolist() == [[-1] * 3] * 2) == last
    assert (outputs[0].base is None) == last, "it is not ONNX Runtime's memory either"


def test_rows_of_changing_width(tmp_path: Path) -> None:
    """A wider row replaces the memory; bindings to the old memory must not be used again."""
    engine = opened(tmp_path, models.sum_rows())
    for width in (2, 7, 2, 1, 100, 7, 2):
        x = np.full((3, width), 2, np.float32)
        assert run(engine, x)[0].tolist() == [[2 * width]] * 3


def test_all_widths_share_the_memory_of_the_widest(tmp_path: Path) -> None:
    engine = opened(tmp_path, models.sum_rows())
    before = engine.inputs(0, 1, ((2,),))[0]
    wide = engine.inputs(0, 1, ((9,),))[0]
    assert not np.shares_memory(before, wide)
    assert np.shares_memory(engine.inputs(0, 1, ((2,),))[0], wide), "the narrow memory was kept beside it"


def test_the_least_recently_used_binding_is_dropped_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cobatch.engines.onnxruntime.engine._BINDING_LIMIT", 2)
    engine = opened(tmp_path, models.negate())
    for rows in (1, 2, 1, 3):
        run(engine, np.ones((rows, 3), np.float32))
    assert [rows for rows, _ in engine._slots[0].bindings] == [1, 3]


def test_rows_of_no_elements(tmp_path: Path) -> None:
    assert run(opened(tmp_path, models.sum_rows()), np.zeros((2, 0), np.float32))[0].tolist() == [[0], [0]]


def test_more_shapes_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cobatch.engines.onnxruntime.engine._BINDING_LIMIT", 3)
    engine = opened(tmp_path, models.sum_rows())
    for width in [*range(1, 9), 1, 8]:
        for rows in (1, 2, 3, 4):
            assert run(engine, np.ones((rows, width), np.float32))[0].tolist() == [[width]] * rows
        assert len(engine._slots[0].bindings) <= 3
        assert len(engine._slots[0].inputs) <= 3


def test_outputs_whose_shape_depends_on_the_values(tmp_path: Path) -> None:
    """With a cached binding the second output shape would not fit the memory of the first."""
    engine = opened(tmp_path, models.value_sets_width(), batching=ON)
    for width in (2, 5, 1, 3):
        assert run(engine, floats([1], [width]))[0].shape == (2, width)


@pytest.mark.parametrize("fixed", [1, 3])
def test_a_fixed_first_axis_is_padded_with_zeros(tmp_path: Path, fixed: int) -> None:
    engine = opened(tmp_path, models.negate(batch=fixed), max_batch_size=64)
    assert engine.signature.fixed_batch == fixed
    assert engine.max_batch_size == fixed
    x = np.arange(fixed * 3, dtype=np.float32).reshape(fixed, 3)
    for rows in range(fixed, 0, -1):
        assert np.array_equal(run(engine, x[:rows])[0], -x[:rows])
    (buffer,) = engine.inputs(0, 1, ((3,),))
    assert (buffer[1:] == 0).all(), "rows of an earlier batch would be computed again"


def test_a_failing_run_names_the_reason_and_the_next_one_works(tmp_path: Path) -> None:
    engine = opened(tmp_path, models.pick())
    with pytest.raises(EngineRunError, match="out of data bounds"):
        run(engine, np.array([[0], [7]], np.int64))
    assert run(engine, np.array([[0], [2]], np.int64))[0].tolist() == [[10], [30]]


def test_a_model_that_refuses_zeros_is_served(tmp_path: Path) -> None:
    engine = opened(tmp_path, models.never_zero())
    assert run(engine, np.array([[1], [2]], np.int64))[0].tolist() == [[10], [10]]


def test_models_that_cannot_be_batched_are_refused_by_name(tmp_path: Path) -> None:
    assert "input 's' is a scalar" in refused(tmp_path, models.scalar())
    assert "first axes differ" in refused(tmp_path, models.two_inputs(2, 1))
    assert "'x' [2, 2], 'k' [-1, 1]" in refused(tmp_path, models.two_inputs(2, "batch"))
    assert "first axis is fixed at 0" in refused(tmp_path, models.negate(batch=0))
    assert "output 'y': its first axis is 1" in refused(tmp_path, models.total_only())
    assert "output 'y' does not follow the batch axis: 2 rows gave [4, 3]" in refused(
        tmp_path, models.two_rows_each()
    )
    message = refused(tmp_path, models.identity(TensorProto.BFLOAT16))
    assert "input 'x' has type tensor(bfloat16), which is not supported" in message


def test_a_batch_of_one_reveals_an_output_without_batch_axis(tmp_path: Path) -> None:
    assert "1 rows gave [2, 3]" in refused(tmp_path, models.two_rows_each(), max_batch_size=1)


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    assert "cannot load" in refused(tmp_path, b"not a model")
    engine = OnnxRuntimeEngine(str(tmp_path / "missing.onnx"), 4)
    with pytest.raises(EngineLoadError, match=r"missing\.onnx"):
        engine.open()


@pytest.mark.parametrize("name", [b"batch", b"y"])
def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path, name: bytes) -> None:
    damaged = models.negate().replace(name, b"\xcb" * len(name))
    assert "codec can't decode" in refused(tmp_path, damaged)


def test_threads_leave_a_core_to_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (2, 1), (8, 7)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        assert OnnxRuntimeEngine("x.onnx", 4)._threads == threads
    assert OnnxRuntimeEngine("x.onnx", 4, threads=3)._threads == 3


def test_the_loader_chooses_by_name_or_suffix(tmp_path: Path) -> None:
    path = models.write(tmp_path, models.negate())
    for kind in ("auto", "onnxruntime"):
        engine = load_engine(kind, path, 7)
        assert (engine.platform, engine.max_batch_size) == ("onnxruntime_onnx", 7)
    assert load_engine("auto", Path(path), 7).platform == "onnxruntime_onnx"


def test_the_loader_refuses_unknown_engines_and_files() -> None:
    with pytest.raises(EngineLoadError, match="unknown engine 'openvino'; expected one of onnxrun"):
        load_engine("openvino", "model.onnx", 4)
    for kind in ("auto", "tensorrt"):
        with pytest.raises(EngineLoadError, match=r"model\.pt: expected an \.onnx, \.plan or \.engine file"):
            load_engine(kind, "model.pt", 4)


def test_an_engine_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str, max_batch_size: int, options: EngineOptions) -> OnnxRuntimeEngine:
        raise ImportError("no library")

    monkeypatch.setitem(load_engine.__globals__["ENGINES"], "onnxruntime", missing)
    with pytest.raises(EngineLoadError, match="cannot be used here: no library"):
        load_engine("onnxruntime", "model.onnx", 4)


def test_a_provider_that_this_onnx_runtime_lacks(tmp_path: Path) -> None:
    path = models.write(tmp_path, models.negate())
    with pytest.raises(EngineLoadError, match=r"this ONNX Runtime has no RockExecutionProvider, only .*CPU"):
        load_engine("auto", path, 4, EngineOptions(providers={"RockExecutionProvider": {}}))


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")
def test_a_provider_that_onnx_runtime_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = [CUDA, "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: present)
    engine = OnnxRuntimeEngine(models.write(tmp_path, models.negate()), 4, providers={CUDA: {}})
    _, error = load(engine)
    assert str(error).startswith(f"ONNX Runtime cannot use {CUDA} here: ")


def test_providers_and_their_options_reach_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    session = ort.InferenceSession

    def recorded(*given: object, providers: object, **rest: object) -> object:
        asked.append(providers)
        return session(*given, providers=providers, **rest)

    monkeypatch.setattr(ort, "InferenceSession", recorded)
    path = models.write(tmp_path, models.negate())
    azure, cpu = "AzureExecutionProvider", "CPUExecutionProvider"
    for providers in ({}, {azure: {}, cpu: {"use_arena": False}}):
        _, error = load(OnnxRuntimeEngine(path, 4, threads=1, providers=providers))
        assert error is None
    assert asked == [[(cpu, {})], [(azure, {}), (cpu, {"use_arena": False})]]


def test_a_classifier_exported_with_zipmap(tmp_path: Path) -> None:
    zipmap = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, value))
    graph = helper.make_graph([zipmap], "graph", [x], [helper.make_value_info("y", maps)])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    data = helper.make_model(graph, ir_version=8, opset_imports=imports).SerializeToString()
    message = refused(tmp_path, data)
    assert "output 'y' has type seq(map(int64,tensor(float))), which is not supported" in message
    assert message.endswith(f"; export it with zipmap=False: {EXPORT_DOCS}")


def test_messages_link_a_section_that_exists() -> None:
    page, _, anchor = EXPORT_DOCS.partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in [heading.lower().replace(" ", "-") for heading in headings]


def load(engine: OnnxRuntimeEngine) -> tuple[Worker, EngineError | None]:
    """Open and warm up on a worker thread, then end it."""
    answers: list[EngineError | None] = []
    worker = Worker(engine, "test")
    worker.start(answers.append)
    worker.stop()
    assert worker.join(30)
    (error,) = answers
    return worker, error


def test_warm_up_of_a_real_session(tmp_path: Path) -> None:
    worker, error = load(OnnxRuntimeEngine(models.write(tmp_path, models.negate()), 6, threads=1))
    assert error is None
    assert list(worker.warmup_us) == [1, 2, 4, 6]
    assert min(worker.warmup_us.values()) > 0


def test_warm_up_of_a_fixed_first_axis_runs_that_size_alone(tmp_path: Path) -> None:
    worker, error = load(OnnxRuntimeEngine(models.write(tmp_path, models.negate(batch=3)), 64, threads=1))
    assert error is None
    assert list(worker.warmup_us) == [3]


def test_inputs_whose_rows_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine(models.write(tmp_path, models.every_pair()), 4, threads=1, batching=ON)
    _, error = load(engine)
    assert isinstance(error, EngineLoadError)
    assert "the row shape depends on the number of rows: [1] and, with 2 rows, [2]" in str(error)
