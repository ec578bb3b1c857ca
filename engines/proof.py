"""The proof, at load, that a model's first axis is a batch axis: no row's answer depends on the other rows.

Three runs of random rows a, b, c, d: (a, b, c, d), (d), and (c, b, a). Each row must get the same answer each
time. A function of all rows, such as a mean, shows in the second or, if it is an extreme like the maximum, in
the third; one of a row's position shows in the third. Outputs must have as many rows as the inputs.

If a model refuses the rows, for example indices outside its table, or they decide nothing, integers of 0 and
1 are tried, and then long variable axes; if it refuses all, equal rows. Those cannot prove, since they hide
which row an answer came from, but may still disprove.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, prod

import numpy as np

from cobatch.engines.base import EXPORT_DOCS, Array, Batching, Signature, TensorSpec, batched_signature
from cobatch.engines.errors import EngineDeadError, EngineLoadError, NoBatchAxisError

PROOF_ROWS = 4
# Of a variable axis: 1 would be broadcast, and a network for images may need more.
_SMALL_SIZE, _LARGE_SIZE, _MOST_ELEMENTS = 2, 64, 1 << 20
_INTEGERS = 32  # at first; few values make some models ill-conditioned, so that rounding shows
_LARGEST_FLOAT = 2.0  # so that rounding to integers tells rows apart
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
_LONGEST_REFUSAL = 240
# The largest difference of equal answers, as a part of the output's largest value: kernels for other batch
# sizes add in another order. GPUs may multiply FP32 with 10 bits of mantissa (TF32).
_TOLERANCE = {"FP64": 1e-4, "FP32": 1e-4, "FP16": 1e-2, "BF16": 3e-2}
_GPU_TOLERANCE = _TOLERANCE | {"FP64": 1e-3, "FP32": 1e-3}
# A smaller one may still come from rounding, for example where a model chooses its scale of quantisation by
# all the values of a batch.
_CERTAIN = 0.05
_STEPS = ("INT8", "UINT8")  # quantised values may be rounded to their neighbours

# Runs whole inputs, [rows, ...] each; its outputs are valid until the next call. Raises if the model refuses.
Run = Callable[[Sequence[Array]], Sequence[Array]]


class _DisproofError(Exception):
    """The first axis is no batch axis; the text says why."""


class _UndecidedError(Exception):
    """The answers to these rows decide nothing; the text says why."""


class _RandomError(Exception):
    """No answers decide anything: equal inputs get different ones."""


def settle(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    batching: Batching,
    prove_: Callable[[Signature], Batching],
) -> Signature:
    """Return the signature of whole tensors, or of rows if they can be batched. Raises EngineLoadError.

    The specs have whole shapes. `prove_` is asked if the batching is "auto".
    """
    if not inputs or not outputs:
        raise EngineLoadError("the model has no inputs or no outputs")
    whole = Signature(tuple(inputs), tuple(outputs), None, batching)
    if not batching.on:
        return whole
    try:
        rows = batched_signature(inputs, outputs)
    except EngineLoadError as error:
        if batching.verdict != "auto":
            remedy = f'set batching = "off", or change the export: {EXPORT_DOCS}'
            raise EngineLoadError(f"{error}: it cannot be batched; {remedy}") from None
        return Signature(whole.inputs, whole.outputs, None, Batching("disproved", str(error)))
    if batching.verdict == "auto":
        batching = prove_(rows)
    chosen = rows if batching.on else whole
    return Signature(chosen.inputs, chosen.outputs, chosen.fixed_batch, batching)


def prove(signature: Signature, run: Run, most_rows: int = PROOF_ROWS, *, gpu: bool = False) -> Batching:
    """Run the proof and return "proven", "disproved" or "unproven". `most_rows`: the largest batch to run.

    `gpu`: with a wider tolerance, and small integers first, since an index outside a table may end the
    engine. Raises EngineDeadError.
    """
    trial = _Trial(signature, run, _GPU_TOLERANCE if gpu else _TOLERANCE)
    rows = signature.fixed_batch or min(PROOF_ROWS, most_rows)
    reasons: list[str] = []
    refused = 0
    try:
        if rows == 1:
            for constant in (_ones, _zeros):
                trial.answers(_rows(signature, 1, constant, 1))
            return Batching("unproven", "each run takes one row")
        for make, size in _attempts(signature, gpu):
            try:
                refusal = trial.judge(_rows(signature, rows, make, size))
            except _UndecidedError as error:
                reasons.append(str(error))
                continue
            if not refusal:
                return Batching("proven")
            refused += 1
            reasons.append(f"it refuses random inputs: {refusal}")
        if refused == len(reasons) and trial.judge(_rows(signature, rows, _ones, 1), equal=True):
            trial.judge(_rows(signature, rows, _zeros, 1), equal=True)  # as the warm-up runs them
    except _DisproofError as error:
        return Batching("disproved", str(error))
    except _RandomError as error:
        return Batching("unproven", str(error))
    return Batching("unproven", reasons[0])


class _Trial:
    """Runs of one model. A refusal is the engine's text, in one line. `tolerance`: by datatype."""

    def __init__(self, signature: Signature, run: Run, tolerance: Mapping[str, float]) -> None:
        self._tolerance = tolerance
        self._signature = signature
        self._run = run

    def judge(self, rows: list[Array], *, equal: bool = False) -> str:
        """Return "" if the answers agree, or a refusal that decides nothing.

        Raises _DisproofError, _UndecidedError, _RandomError.
        """
        together = self.answers(rows)
        if isinstance(together, str) and not equal:
            return together  # one of the values may be the reason
        alone = self.answers([array[-1:] for array in rows])
        # In a fixed batch behind a row of zeros, so that of two rows the other one moves, too.
        lead = 0 if self._signature.fixed_batch is None else 1
        turned = self.answers([np.concatenate([_padded(array[:0], lead), array[-2::-1]]) for array in rows])
        if isinstance(together, str) or isinstance(alone, str) or isinstance(turned, str):
            return self._refused(together, alone, turned)
        part, where = max(
            self._difference("run alone", [one[-1:] for one in together], alone),
            self._difference(
                "in another order", [one[-2::-1] for one in together], [one[lead:] for one in turned]
            ),
        )
        if part:
            again = self.answers(rows)
            if isinstance(again, str) or self._difference("", together, again)[0]:
                raise _RandomError("its answers to the same inputs differ from run to run")
            if part <= _CERTAIN:
                raise _UndecidedError(where)
            raise _DisproofError(f'{where}; if rows are independent all the same, set batching = "on"')
        if not equal and all(_far(spec, one[:1], one) == 0 for spec, one in self._outputs(together)):
            raise _UndecidedError("all random rows get the same answer")
        if any(one.dtype.kind == "f" and one.size and np.isnan(one).all() for one in alone):
            raise _UndecidedError("its answer to a random row is no number")
        return ""

    def _refused(self, *answers: list[Array] | str) -> str:
        """Return the refusal, unless the model takes some of the runs: then it does not take rows."""
        refusal = next(one for one in answers if isinstance(one, str))
        if any(isinstance(one, list) for one in answers) and self._signature.fixed_batch is None:
            raise _DisproofError(f"it takes some numbers of rows and refuses others: {refusal}")
        return refusal

    def answers(self, rows: list[Array]) -> list[Array] | str:
        """Run rows, padded to the model's fixed batch, and return the outputs, or the refusal.

        Raises _DisproofError.
        """
        count = len(rows[0])
        size = self._signature.fixed_batch or count
        try:
            outputs = self._run([_padded(array, size) for array in rows])
        except EngineDeadError:
            raise
        except NoBatchAxisError as error:
            raise _DisproofError(str(error)) from None
        except Exception as error:  # noqa: BLE001 - engines' libraries have no common base
            return " ".join(str(error).split())[:_LONGEST_REFUSAL]
        for spec, output in self._outputs(outputs):
            if output.shape[:1] != (size,):
                raise _DisproofError(f"{size} rows give output {spec.name!r} of shape {list(output.shape)}")
        return [np.array(output[:count]) for output in outputs]

    def _outputs(self, outputs: Sequence[Array]) -> Iterator[tuple[TensorSpec, Array]]:
        return zip(self._signature.outputs, outputs, strict=True)

    def _difference(self, how: str, before: Sequence[Array], after: Sequence[Array]) -> tuple[float, str]:
        """Return the largest difference beyond the tolerance, or 0, and its description."""
        found = [(0.0, "")]
        for (spec, one), other in zip(self._outputs(before), after, strict=True):
            text = f"rows {how} get another answer in output {spec.name!r}"
            if one.shape != other.shape:
                found.append((inf, f"{text}: shape {list(other.shape[1:])}, not {list(one.shape[1:])}"))
                continue
            part = _far(spec, one, other)
            if part > self._tolerance.get(spec.datatype, 0.0):
                size = "" if part == inf else f", by {part:.2g} of its largest value"
                found.append((part, text + size))
        return max(found)


def _far(spec: TensorSpec, one: Array, other: Array) -> float:
    """Return the largest difference: of floats as a part of the largest value, otherwise 0 or infinity."""
    if spec.datatype in _STEPS:
        return 0.0 if (np.abs(one.astype(int) - other.astype(int)) <= 1).all() else inf
    if spec.datatype not in _TOLERANCE:
        return 0.0 if (one == other).all() else inf
    if spec.datatype == "BF16":
        one, other = ((bits.astype(np.uint32) << 16).view(np.float32) for bits in (one, other))
    # Row by row: together they would take many times the memory of the outputs.
    rows = [_apart(*pair) for pair in zip(*np.broadcast_arrays(one, other), strict=True)]
    largest, scale = np.max(rows, axis=0)
    return inf if np.isnan(largest) else float(largest / scale) if scale else float(largest)


def _apart(one: Array, other: Array) -> tuple[float, float]:
    """Return the largest difference of a row's floats, NaN if only one is a number, and the largest value."""
    one, other = (np.asarray(values, np.float64) for values in (one, other))
    with np.errstate(invalid="ignore"):
        apart = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, np.abs(one - other))
    finite = [np.abs(values[np.isfinite(values)]).max(initial=0.0) for values in (one, other)]
    return float(apart.max(initial=0.0)), float(max(finite))


# Makes an input of rows.
Maker = Callable[[TensorSpec, tuple[int, ...], np.random.Generator], Array]


def _attempts(signature: Signature, gpu: bool) -> list[tuple[Maker, int]]:
    """Return ways to make inputs, and the sizes of variable axes that go with them, in the order to try."""
    attempts: list[tuple[Maker, int]] = [(_random, _SMALL_SIZE), (_bits, 1)]
    if gpu:
        attempts.reverse()
    large = [prod(_row(spec, _LARGE_SIZE)) for spec in signature.inputs]
    if max(large) <= _MOST_ELEMENTS and any(_row(spec, 1) != _row(spec, 2) for spec in signature.inputs):
        attempts.append((_bits, _LARGE_SIZE))
    return attempts


def _row(spec: TensorSpec, size: int) -> tuple[int, ...]:
    """Return a row shape with this size of variable axes; if the engine limits them, the smallest."""
    return spec.least_row if spec.ranges else tuple(size if axis == -1 else axis for axis in spec.shape)


def _rows(signature: Signature, rows: int, make: Maker, size: int) -> list[Array]:
    random = np.random.default_rng(0)
    return [make(spec, (rows, *_row(spec, size)), random) for spec in signature.inputs]


def _random(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Return random rows: words, integers from 0, or floats around 0, where few functions saturate."""
    if spec.datatype == "BYTES":
        words = ["".join(random.choice(_LETTERS, 6)) for _ in range(prod(shape))]
        return np.array(words, object).reshape(shape)
    if spec.dtype.kind == "b":
        return _bits(spec, shape, random)
    if _is_float(spec):
        return _floats(spec, shape, random, -_LARGEST_FLOAT)
    numbers = random.integers(0, _INTEGERS, (shape[0], prod(shape[1:])))
    numbers[:, :1] = random.permutation(max(_INTEGERS, shape[0]))[: shape[0], np.newaxis] % _INTEGERS
    return numbers.reshape(shape).astype(spec.dtype)


def _is_float(spec: TensorSpec) -> bool:
    return spec.dtype.kind == "f" or spec.datatype == "BF16"


def _floats(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator, least: float) -> Array:
    floats = random.uniform(least, _LARGEST_FLOAT, (shape[0], prod(shape[1:])))
    # Spaced, so that rows of a single element differ clearly. The last row, which runs alone, is neither the
    # smallest nor the largest, as one of these could answer for all rows.
    places = (np.arange(shape[0]) + random.uniform(0.25, 0.75, shape[0])) / shape[0]
    steps = least + places * (_LARGEST_FLOAT - least)
    floats[:, 0:1] = np.roll(steps, -2)[:, np.newaxis]
    if spec.datatype == "BF16":
        return (floats.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(shape)
    return floats.reshape(shape).astype(spec.dtype)


def _bits(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Return random rows with integers of 0 and 1, which nearly every table has, and floats above 0."""
    if spec.datatype == "BYTES":
        return _random(spec, shape, random)
    if _is_float(spec):
        return _floats(spec, shape, random, 0.0)
    bits = random.integers(0, 2, (shape[0], prod(shape[1:])))
    # The last row, which runs alone, differs from the others; with three elements all of four rows differ.
    number = np.arange(shape[0])[::-1]
    for element, bit in enumerate([np.minimum(number, 1), number & 1, number >> 1 & 1][: bits.shape[1]]):
        bits[:, element] = bit
    return bits.reshape(shape).astype(spec.dtype)


def _ones(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> Array:  # noqa: ARG001
    one = "a" if spec.datatype == "BYTES" else 0x3F80 if spec.datatype == "BF16" else 1
    return np.full(shape, one, spec.dtype)


def _zeros(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> Array:  # noqa: ARG001
    return np.full(shape, "" if spec.datatype == "BYTES" else 0, spec.dtype)


def _padded(rows: Array, size: int) -> Array:
    padding = np.full((size - len(rows), *rows.shape[1:]), "" if rows.dtype == object else 0, rows.dtype)
    return np.concatenate([rows, padding])
