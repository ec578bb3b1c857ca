"""Plans whose first axis is no batch axis, on the fake GPU: the proof, whole tensors, the kept verdict."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from cobatch.engines.base import AUTO, Array, Batching, TensorSpec
from cobatch.engines.errors import EngineRunError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.engines.tensorrt.engine import TensorRTEngine
from cobatch.engines.tensorrt.layout import Late
from cobatch.engines.tensorrt.plans.cache import Verdicts
from cobatch.engines.tensorrt.slot import Slot
from tests.support.gpu.engine import cuda, engine_of, opened, plan_of, run
from tests.support.gpu.fakecuda.control import FakeCuda
from tests.support.models import axis_models, models

__all__ = ["cuda"]  # the fixture

FLOAT = TensorProto.FLOAT


def auto(model: bytes, *profiles: str, **options: Any) -> TensorRTEngine:
    return engine_of(model, *profiles, batching=AUTO, **options)


def whole(engine: TensorRTEngine, *inputs: Array, slot: int = 0) -> tuple[Array, ...]:
    """Run whole tensors and return copies of the outputs, without the first axis, of size 1."""
    shapes = tuple(array.shape for array in inputs)
    for buffer, array in zip(engine.inputs(slot, 1, shapes), inputs, strict=True):
        buffer[0] = array
    del buffer
    engine.enqueue(slot, 1, shapes)
    return tuple(np.array(output[0]) for output in engine.wait(slot))


def floats(*values: Any) -> Array:
    return np.array(values, np.float32)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(
    "model",
    [models.negate(), models.negate(batch=8), models.sum_rows(), models.two_inputs(), models.pick()],
    ids=["negate", "fixed", "variable", "two", "indices"],
)
def test_rows_that_are_independent_are_proven(cuda: FakeCuda, model: bytes, graphs: bool) -> None:
    profiles = ["x:1x1/4x4/8x8"] if model == models.sum_rows() else []
    with opened(auto(model, *profiles, graphs=graphs)) as engine:
        assert engine.signature.batching == Batching("proven")
        assert engine.max_batch_size == 8


def test_a_plan_for_one_row_says_so(cuda: FakeCuda) -> None:
    with opened(auto(models.negate(), max_batch_size=1)) as engine:
        assert engine.signature.batching == Batching("unproven", "each run takes one row")


@pytest.mark.parametrize("graphs", [True, False])
def test_a_sequence_runs_whole(cuda: FakeCuda, graphs: bool) -> None:
    with opened(auto(axis_models.cumulative(), graphs=graphs)) as engine:
        assert engine.signature.batching.verdict == "disproved"
        (x,) = engine.signature.inputs
        assert (x.full_shape, x.ranges, engine.max_batch_size) == ((-1,), (((1,), (8,)),), 1)
        for slot in range(engine.slots):
            for length in (3, 8, 1, 3):
                sequence = np.arange(length, dtype=np.float32) + slot
                assert whole(engine, sequence, slot=slot)[0].tolist() == np.cumsum(sequence).tolist()


@pytest.mark.parametrize("graphs", [True, False])
def test_a_fixed_sequence_runs_whole(cuda: FakeCuda, graphs: bool) -> None:
    """Fixed shapes keep their context and, if wanted, their graph."""
    with opened(auto(axis_models.cumulative(6), graphs=graphs)) as engine:
        assert engine.signature.inputs[0].full_shape == (6,)
        assert engine.signature.outputs[0].full_shape == (6,)
        for _ in range(2):
            assert whole(engine, np.ones(6, np.float32))[0].tolist() == [1, 2, 3, 4, 5, 6]


def test_scalars_and_first_axes_that_differ(cuda: FakeCuda) -> None:
    with opened(auto(axis_models.scalars())) as engine:
        assert "input 's' is a scalar" in engine.signature.batching.reason
        total, both = whole(engine, floats(2)[0], floats(3)[0])
        assert total.shape == ()
        assert (float(total), both.tolist()) == (5, [2, 2])
    with opened(auto(axis_models.product(), "b:3x1/3x2/3x4")) as engine:
        a, b = floats([1, 2, 3], [4, 5, 6]), floats([1, 0], [0, 1], [1, 1])
        assert whole(engine, a, b)[0].tolist() == (a @ b).tolist()


def test_profiles_whose_first_axes_differ_can_be_built(cuda: FakeCuda) -> None:
    joined = models.model(
        [helper.make_node("Concat", ["a", "b"], ["y"], axis=0)],
        [("a", FLOAT, ["n"]), ("b", FLOAT, ["m"])],
        [("y", FLOAT, ["k"])],
    )
    with opened(auto(joined, "a:1/2/4,b:1/3/8")) as engine:
        assert not engine.signature.batching.on
        assert whole(engine, floats(1, 2), floats(3, 4, 5))[0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("model", [models.total_only(), models.two_rows_each(), models.every_pair()])
def test_outputs_that_do_not_follow_the_batch_axis(cuda: FakeCuda, model: bytes) -> None:
    with opened(auto(model)) as engine:
        assert engine.signature.batching.verdict == "disproved"
        assert engine.max_batch_size == 1


@pytest.mark.parametrize("step", ["softmax", "mean", "maximum", "reverse", "place"])
def test_rows_that_depend_on_each_other(cuda: FakeCuda, step: str) -> None:
    data = axis_models.chain([step], 3, 0)
    x = np.random.default_rng(1).random((5, 3)).astype(np.float32)
    with opened(auto(data)) as engine:
        assert engine.signature.batching.verdict == "disproved"
        assert np.allclose(whole(engine, x)[0], axis_models.alone(data, t0=x)[0])


@pytest.mark.parametrize("mode", ["lazy", "threaded"])
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), ("n", "m")], ids=["fixed", "variable"])
def test_outputs_whose_shape_depends_on_the_data(
    cuda: FakeCuda, mode: str, graphs: bool, shape: tuple[Any, Any]
) -> None:
    cuda.mode(mode)
    model = models.model(
        [helper.make_node("NonZero", ["x"], ["found"]), helper.make_node("Neg", ["x"], ["y"])],
        [("x", FLOAT, shape)],
        [("found", TensorProto.INT64, [2, "count"]), ("y", FLOAT, shape)],
    )
    plan = importlib.import_module("tensorrt.plan").make_plan(
        model, max_batch_size=8, tensors={"found": {"largest": 2 * 64 * 8}}
    )
    engine = TensorRTEngine("found.plan", 8, plan_source=lambda: plan, graphs=graphs)
    random = np.random.default_rng(2)
    with opened(engine):
        assert engine.signature.outputs[0].full_shape == (2, -1)
        for slot in (0, 1, 0):
            x = (random.random((3, 4)) < 0.4).astype(np.float32)
            found, y = whole(engine, x, slot=slot)
            assert found.tolist() == np.array(np.nonzero(x)).tolist()
            assert y.tolist() == (-x).tolist()
        assert whole(engine, np.zeros((3, 4), np.float32))[0].shape == (2, 0)


def test_an_output_never_gets_more_than_its_memory() -> None:
    trt = SimpleNamespace(IOutputAllocator=type("IOutputAllocator", (), {"__init__": lambda self: None}))
    late = Late(trt, TensorSpec("y", "FP32", (-1,), batched=False), np.zeros(16, np.uint8), 256)
    assert late.allocator.reallocate_output("y", None, 16, 256) == 256
    assert late.allocator.reallocate_output_async("y", None, 17, 256, 0) is None
    late.allocator.notify_shape("y", (4,))
    assert late.output().shape == (1, 4)
    late.allocator.notify_shape("y", (5,))
    with pytest.raises(EngineRunError, match=r"output 'y' of shape \[5\] is too large"):
        late.output()


def one_entry() -> bytes:
    """y = table[x], of a table of one entry."""
    return models.model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [("x", TensorProto.INT64, ["batch", 1])],
        [("y", TensorProto.INT64, ["batch", 1])],
        [axis_models.constant("table", [7])],
    )


def test_an_engine_that_the_proof_ends_is_opened_again_without(cuda: FakeCuda) -> None:
    """On a GPU an index outside its table can make the context unusable, as on this fake one."""
    with opened(auto(one_entry())) as engine:
        assert engine.signature.batching.verdict == "unproven"
        assert "its inputs ended the engine: " in engine.signature.batching.reason
        assert run(engine, np.zeros((3, 1), np.int64))[0].tolist() == [[7]] * 3


# The kept verdict


class Proofs:
    """Counts the proofs' slots."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = TensorRTEngine._prove

        def prove(engine: TensorRTEngine, rows: Any) -> Batching:
            self.count += 1
            return original(engine, rows)

        monkeypatch.setattr(TensorRTEngine, "_prove", prove)


@pytest.mark.parametrize("given", [False, True], ids=["built", "given"])
@pytest.mark.parametrize("data", [models.negate(), axis_models.cumulative()], ids=["rows", "sequence"])
def test_a_verdict_is_remembered_for_the_plan(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, given: bool
) -> None:
    proofs = Proofs(monkeypatch)
    path = models.write(tmp_path, data)
    if given:
        path = str(tmp_path / "given.plan")
        Path(path).write_bytes(plan_of(data))
    options = EngineOptions(plan_cache=tmp_path / "plans")
    found = []
    for _ in range(2):
        engine = load_engine("tensorrt", path, 8, options)
        assert isinstance(engine, TensorRTEngine)
        with opened(engine):
            found.append(engine.signature.batching)
    assert found[0] == found[1]
    assert found[0].verdict in ("proven", "disproved")
    assert proofs.count == 1


def test_a_verdict_that_cannot_be_kept_or_read_is_found_again(tmp_path: Path) -> None:
    verdicts, plan = Verdicts(tmp_path), b"plan"
    assert verdicts.recall(plan) is None
    verdicts.remember(plan, Batching("disproved", "why"))
    assert verdicts.recall(plan) == Batching("disproved", "why")
    assert verdicts.recall(b"another") is None
    (kept,) = tmp_path.glob("*.json")
    for damaged in (b'{"verdict":"maybe"}', b'{"verdict":"proven","reason":"\xff"}', b""):
        kept.write_bytes(damaged)
        assert verdicts.recall(plan) is None
    tmp_path.chmod(0o777)  # others could write there
    verdicts.remember(plan, Batching("proven"))
    tmp_path.chmod(0o700)
    assert verdicts.recall(plan) is None


def test_the_slot_of_the_proof_is_small(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[Sequence[int]] = []
    original = Slot.allocate

    def allocate(slot: Slot, sizes: Sequence[int], late: Collection[int]) -> None:
        allocated.append(sizes)
        original(slot, sizes, late)

    monkeypatch.setattr(Slot, "allocate", allocate)
    with opened(auto(models.negate(), max_batch_size=64)):
        assert allocated == [(4 * 12, 4 * 12), (64 * 12, 64 * 12), (64 * 12, 64 * 12)]
