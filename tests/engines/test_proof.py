"""The proof of batching at load: its findings, its cost, and the cases it leaves open.

`COBATCH_EXAMPLES=100 pytest tests/engines/test_proof.py` tries a hundred times as many models of the family.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cobatch.engines.base import Array, Batching, Signature, TensorSpec
from cobatch.engines.errors import EngineRunError
from cobatch.engines.onnxruntime.engine import OnnxRuntimeEngine
from cobatch.engines.proof import prove
from tests.support.examples import examples
from tests.support.http.wire import any_size
from tests.support.models import axis_models, models
from tests.support.models.plan_models import convolution, magika_path

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
DATASETS = Path(onnxruntime.__file__).parent / "datasets"


def signature_of(path: Path | str, max_batch_size: int = 64) -> Signature:
    engine = OnnxRuntimeEngine(str(path), max_batch_size, threads=1)
    engine.open()
    signature = engine.signature
    most = max_batch_size if signature.batching.on else 1
    assert engine.max_batch_size == (signature.fixed_batch or most)
    engine.close()
    return signature


def verdict(folder: Path, data: bytes, max_batch_size: int = 64) -> Batching:
    return signature_of(models.write(folder, data), max_batch_size).batching


def with_axis_0(operator: str, shape: Sequence[int | str], **attributes: Any) -> bytes:
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    return models.model([node], [("x", FLOAT, shape)], [("y", FLOAT, shape)])


def reshaped(width: int, shape: list[int], rank: int) -> bytes:
    """y = x [n, width] in another shape."""
    return models.model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [("x", FLOAT, ["n", width])],
        [("y", FLOAT, [f"a{axis}" for axis in range(rank)])],
        [axis_models.constant("shape", shape)],
    )


# Models that it must judge


PROVEN = {
    "negate": models.negate(),
    "a fixed batch": models.negate(8),
    "variable rows": models.sum_rows(),
    "inputs of two types": models.two_inputs(),
    "indices in a table of three": models.pick(),
    "a convolution": convolution(),
    "variable axes": any_size(),
    "booleans": models.identity(TensorProto.BOOL),
    "text": models.identity(TensorProto.STRING),
    "FP16": models.identity(TensorProto.FLOAT16),
    "a reshaped row": reshaped(6, [-1, 2, 3], 3),
}


@pytest.mark.parametrize("name", PROVEN)
def test_rows_that_are_independent_are_proven(tmp_path: Path, name: str) -> None:
    assert verdict(tmp_path, PROVEN[name]) == Batching("proven")


@pytest.mark.parametrize(
    "datatype", [TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32, TensorProto.UINT64]
)
def test_every_width_of_integers(tmp_path: Path, datatype: int) -> None:
    assert verdict(tmp_path, models.identity(datatype, 1)) == Batching("proven")


def test_real_models_are_proven() -> None:
    assert signature_of(magika_path()).batching == Batching("proven")
    assert signature_of(DATASETS / "sigmoid.onnx").batching == Batching("proven")


DISPROVED = {
    "cumulative sum": (axis_models.cumulative(), "get another answer in output 'y', by "),
    "cumulative sum of a fixed length": (axis_models.cumulative(6), "get another answer in output 'y', by "),
    "softmax": (with_axis_0("Softmax", ["n", 3], axis=0), "rows run alone get another answer"),
    "a sum that is left": (models.total_only(), "output 'y': its first axis is 1, it should vary"),
    "two rows each": (models.two_rows_each(), "4 rows give output 'y' of shape [8, 3]"),
    "two rows in one": (reshaped(3, [-1, 6], 2), "4 rows give output 'y' of shape [2, 6]"),
    "one row for all": (reshaped(3, [1, -1], 2), "output 'y': its first axis is 1, it should vary"),
    "unrelated first axes": (models.every_pair(), "another answer in output 'y': shape [1], not [4]"),
    "a shape that neighbours set": (models.value_sets_width(), "another answer in output 'y': shape ["),
    "a scalar": (models.scalar(), "input 's' is a scalar"),
    "first axes that differ": (axis_models.product(), "first axes differ: 'a' [2, 3], 'b' [3, -1]"),
    "indices of elements": (axis_models.nonzero(), "output 'y': its first axis is 2, it should vary"),
    "an empty first axis": (models.negate(batch=0), "first axis is fixed at 0"),
}


@pytest.mark.parametrize("name", DISPROVED)
@pytest.mark.parametrize("max_batch_size", [1, 64])
def test_rows_that_are_not_independent_are_served_whole(
    tmp_path: Path, name: str, max_batch_size: int
) -> None:
    data, reason = DISPROVED[name]
    found = verdict(tmp_path, data, max_batch_size)
    assert found.verdict == "disproved"
    assert reason in found.reason
    assert not found.on


def test_a_constant_with_a_row_for_each_place_is_disproved() -> None:
    """ONNX Runtime's own example multiplies each of three rows by another constant."""
    signature = signature_of(DATASETS / "mul_1.onnx")
    assert signature.batching.verdict == "disproved"
    assert [spec.full_shape for spec in signature.inputs] == [(3, 2)]


@pytest.mark.parametrize("step", axis_models.MIXING)
@pytest.mark.parametrize("width", [1, 4])
def test_each_way_of_mixing_rows_is_disproved(tmp_path: Path, step: str, width: int) -> None:
    assert verdict(tmp_path, axis_models.chain([step], width, 0)).verdict == "disproved"


@pytest.mark.parametrize("step", axis_models.MIXING)
@pytest.mark.parametrize("batch", [2, 3])
def test_each_way_of_mixing_a_fixed_batch_is_disproved(tmp_path: Path, step: str, batch: int) -> None:
    assert verdict(tmp_path, axis_models.chain([step], 4, 0, batch)).verdict == "disproved"


UNPROVEN = {
    "every value but one is refused": (models.never_zero(), "it refuses random inputs: [ONNXRuntimeError]"),
    "a fixed batch of 1": (models.negate(batch=1), "each run takes one row"),
    "all rows are answered alike": (
        models.model(
            [helper.make_node("Mul", ["x", "zero"], ["y"])],
            [("x", FLOAT, ["n", 2])],
            [("y", FLOAT, ["n", 2])],
            [axis_models.constant("zero", [0], np.float32)],
        ),
        "all random rows get the same answer",
    ),
    "a random model": (
        models.model(
            [helper.make_node("RandomUniformLike", ["x"], ["u"]), helper.make_node("Add", ["x", "u"], ["y"])],
            [("x", FLOAT, ["n", 2])],
            [("y", FLOAT, ["n", 2])],
        ),
        "its answers to the same inputs differ from run to run",
    ),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_cannot_be_judged_is_batched_and_said(tmp_path: Path, name: str) -> None:
    data, reason = UNPROVEN[name]
    signature = signature_of(models.write(tmp_path, data))
    assert signature.batching.verdict == "unproven"
    assert reason in signature.batching.reason
    assert signature.batching.on


def test_a_failed_run_of_the_proof_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verdict(tmp_path, models.never_zero())
    assert capfd.readouterr().err == ""


def test_the_operators_word_counts(tmp_path: Path) -> None:
    path = models.write(tmp_path, axis_models.chain(["mean"], 3, 0))
    for word, on in (("on", True), ("off", False)):
        engine = OnnxRuntimeEngine(path, 4, threads=1, batching=Batching(word))  # type: ignore[arg-type]
        engine.open()
        assert engine.signature.batching == Batching(word)  # type: ignore[arg-type]
        assert engine.signature.inputs[0].full_shape == (-1, 3)
        assert engine.signature.inputs[0].batched == on
        engine.close()


# A family of models


def depends_on_neighbours(data: bytes, width: int, batch: int | None) -> bool:
    """Return whether rows of many random inputs get clearly different answers alone and together."""
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(9)
    for _ in range(5):
        x = (random.random((batch or 16, width)) * 2).astype(np.float32)
        together = session.run(None, {"t0": x})[0]
        for row in range(len(x)):
            one = np.zeros_like(x) if batch else x[:1].copy()
            one[0] = x[row]
            apart = np.abs(session.run(None, {"t0": one})[0][0] - together[row]).max()
            if apart > 0.1 * np.abs(together).max():
                return True
    return False


@examples(50, derandomize=True)  # among many thousands, one may hide that its rows depend on each other
@given(
    steps=st.lists(st.sampled_from(sorted(axis_models.ROW_WISE)), min_size=1, max_size=4),
    mixing=st.none() | st.tuples(st.sampled_from(sorted(axis_models.MIXING)), st.integers(0, 4)),
    width=st.integers(1, 5),
    seed=st.integers(0, 1000),
    fixed=st.none() | st.integers(3, 5),  # two rows tell less
)
def test_a_family_of_models(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[str],
    mixing: tuple[str, int] | None,
    width: int,
    seed: int,
    fixed: int | None,
) -> None:
    """A model of rows is never disproved, and one whose rows depend on each other never proven."""
    if mixing is not None:
        steps = [*steps[: mixing[1]], mixing[0], *steps[mixing[1] :]]
    data = axis_models.chain(steps, width, seed, fixed or "n")
    found = verdict(tmp_path_factory.mktemp("family"), data).verdict
    if mixing is None:
        assert found in ("proven", "unproven")
    elif found == "proven":
        assert not depends_on_neighbours(data, width, fixed)


# Its cost and tolerances


SIGNATURE = Signature((TensorSpec("x", "FP32", (3,)),), (TensorSpec("y", "FP32", (3,)),))
INDICES = Signature((TensorSpec("x", "INT64", (3,)),), (TensorSpec("y", "INT64", (3,)),))


class Runs:
    """Counts runs, and answers them by a function of a batch."""

    def __init__(self, answer: object) -> None:
        self.rows: list[int] = []
        self._answer = answer

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        self.rows.append(len(arrays[0]))
        return [np.asarray(self._answer(arrays[0]))]  # type: ignore[operator]


def test_a_proof_takes_three_runs_of_at_most_four_rows() -> None:
    runs = Runs(lambda x: -x)
    assert prove(SIGNATURE, runs) == Batching("proven")
    assert runs.rows == [4, 1, 3]


def test_where_values_are_refused_at_most_six_runs_are_made() -> None:
    def narrow(x: Array, *, accepted: Sequence[int]) -> Array:
        if not np.isin(x, accepted).all():
            raise EngineRunError("out of range")
        return x

    runs = Runs(lambda x: narrow(x, accepted=(0, 1)))
    assert prove(INDICES, runs) == Batching("proven")
    assert runs.rows == [4, 4, 1, 3]
    runs = Runs(lambda x: narrow(x, accepted=(1,)))
    assert prove(INDICES, runs) == Batching("unproven", "it refuses random inputs: out of range")
    assert runs.rows == [4, 4, 4, 1, 3]


def test_a_model_that_takes_only_some_numbers_of_rows_is_disproved() -> None:
    def picky(x: Array, count: int) -> Array:
        if len(x) == count or x.max() > 1:
            raise EngineRunError(f"{count} rows")
        return x

    for count in (1, 3, 4):
        found = prove(INDICES, Runs(lambda x, count=count: picky(x, count)))
        reason = f"it takes some numbers of rows and refuses others: {count} rows"
        assert found == Batching("disproved", reason)


def test_images_of_variable_size_are_tried_large_too(tmp_path: Path) -> None:
    """A kernel of 9 by 9 without padding takes no image of 2 by 2."""
    kernel = np.random.default_rng(0).normal(size=(2, 3, 9, 9)).astype(np.float32)
    data = models.model(
        [helper.make_node("Conv", ["image", "kernel"], ["y"])],
        [("image", FLOAT, ["n", 3, "height", "width"])],
        [("y", FLOAT, ["n", 2, "h", "w"])],
        [axis_models.constant("kernel", kernel, np.float32)],
    )
    assert verdict(tmp_path, data) == Batching("proven")


def test_what_only_the_run_of_two_zeros_shows_is_served_whole(tmp_path: Path) -> None:
    """Repeats must have as many elements as the data has axes, so four rows and one are refused."""
    data = models.model(
        [helper.make_node("Tile", ["x", "repeats"], ["y"])],
        [("x", FLOAT, ["n", 2]), ("repeats", INT64, ["n"])],
        [("y", FLOAT, ["m", "k"])],
    )
    found = verdict(tmp_path, data)
    assert found == Batching("disproved", "output 'y' does not follow the batch axis: 2 rows gave [0, 0]")


def test_an_answer_that_is_no_number_tells_nothing() -> None:
    def root(x: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return np.asarray(np.sqrt(x) + x.max(axis=0))

    single = Signature((TensorSpec("x", "FP32", (1,)),), (TensorSpec("y", "FP32", (1,)),))
    assert prove(single, Runs(root)).verdict == "disproved"


def test_equal_rows_can_disprove() -> None:
    def picky(x: Array) -> Array:
        if not (x == 1).all():
            raise EngineRunError("ones only")
        return np.cumsum(x, axis=0)

    assert prove(INDICES, Runs(picky)).verdict == "disproved"


def test_rounding_is_tolerated_and_what_may_be_rounding_is_left_open() -> None:
    def noisy(x: Array, part: float) -> Array:
        return np.asarray(x * (1 + part * len(x) / 4), np.float32)

    assert prove(SIGNATURE, Runs(lambda x: noisy(x, 1e-4))) == Batching("proven")
    assert prove(SIGNATURE, Runs(lambda x: noisy(x, 1e-3))).verdict == "unproven"
    assert prove(SIGNATURE, Runs(lambda x: noisy(x, 1e-3)), gpu=True) == Batching("proven")
    found = prove(SIGNATURE, Runs(lambda x: noisy(x, 1e-2)))
    assert found.verdict == "unproven"
    assert "another answer in output 'y', by 0.00" in found.reason
    assert prove(SIGNATURE, Runs(lambda x: noisy(x, 0.3))).verdict == "disproved"


def test_numbers_that_are_not_finite_compare_as_equal() -> None:
    def odd(x: Array) -> Array:
        y = x.copy()
        y[:, 0], y[:, 1] = np.nan, np.inf
        return y

    assert prove(SIGNATURE, Runs(odd)) == Batching("proven")
    assert prove(SIGNATURE, Runs(lambda x: odd(x) if len(x) > 1 else x)).verdict == "disproved"


def test_bfloat16_is_compared_as_numbers() -> None:
    signature = Signature((TensorSpec("x", "BF16", (3,)),), (TensorSpec("y", "BF16", (3,)),))
    assert prove(signature, Runs(lambda x: x + (len(x) == 1))) == Batching("proven")  # one step
    assert prove(signature, Runs(lambda x: x + 0x100 * (len(x) == 1))).verdict == "disproved"


def test_an_engine_that_takes_few_rows() -> None:
    runs = Runs(lambda x: -x)
    assert prove(SIGNATURE, runs, most_rows=2) == Batching("proven")
    assert runs.rows == [2, 1, 1]
    assert prove(SIGNATURE, runs, most_rows=1) == Batching("unproven", "each run takes one row")
    found = prove(SIGNATURE, Runs(lambda x: np.repeat(x, 2, axis=0)), most_rows=1)
    assert found == Batching("disproved", "1 rows give output 'y' of shape [2, 3]")
