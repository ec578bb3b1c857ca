"""Checks [[models.pad]] against the loaded model's names, axes and datatypes."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from cobatch.batcher.rows.padding import Length, Mask, Padder, Where
from cobatch.engines.base import Signature, TensorSpec
from cobatch.engines.errors import EngineLoadError
from cobatch.server.settings.schema import PadSettings

_BF16_LIMIT = 3.38e38

log = logging.getLogger("cobatch.model")


def make_padder(model: str, pads: Sequence[PadSettings], signature: Signature) -> Padder | None:
    """Return the padder of the model's rows, None without [[models.pad]]. Raises EngineLoadError.

    Where batching turned out to be off, no rows share a batch and nothing is padded.
    """
    if not pads:
        return None
    if not signature.batching.on:
        log.warning("model %s: [[models.pad]] is ignored, since batching is off", model)
        return None
    padder = _Reader(pads, signature).read()
    follow = {where for length in padder.lengths for where in length.outputs}
    text = (
        "model %s: axis %d of output %r varies, and no [[models.pad]] relates it to an input: "
        "its padding is not removed"
    )
    for index, spec in enumerate(signature.outputs):
        for axis, size in enumerate(spec.shape):
            if size == -1 and Where(index, axis) not in follow:
                log.warning(text, model, axis, spec.name)
    return padder


class _Reader:
    def __init__(self, pads: Sequence[PadSettings], signature: Signature) -> None:
        self._pads = pads
        self._signature = signature
        self._values: list[Any] = [None] * len(signature.inputs)
        self._claimed: set[Where] = set()

    def read(self) -> Padder:
        leading = [(number, pad) for number, pad in enumerate(self._pads) if pad.same_length_as is None]
        lengths = [self._length(number, pad) for number, pad in leading]
        return Padder(self._signature, lengths, self._values)

    def _length(self, number: int, pad: PadSettings) -> Length:
        """Return the length in a table, with the other tables that share it."""
        inputs = [self._input(number, pad)]
        outputs = self._outputs(number, pad)
        for other, shares in enumerate(self._pads):
            if shares.same_length_as == pad.input:
                inputs.append(self._input(other, shares))
                outputs += self._outputs(other, shares)
        mask = None
        if pad.mask is not None:
            mask = self._mask(f"pad[{number}].mask", pad.mask)
            inputs.append(Where(mask.tensor, mask.row_shape.index(-1)))
        return Length(tuple(inputs), tuple(outputs), pad.buckets or _powers(pad.max), mask)

    def _input(self, number: int, pad: PadSettings) -> Where:
        key = f"pad[{number}]"
        index = _find(f"{key}.input", "input", pad.input, self._signature.inputs)
        spec = self._signature.inputs[index]
        _check_axis(f"{key}.axis", "input", spec, pad.axis)
        value = _value(f"{key}.value", spec, pad.value)
        if self._values[index] not in (None, value):
            raise EngineLoadError(f"{key}.value: input {pad.input!r} is padded with two values")
        self._values[index] = value
        return Where(index, pad.axis)

    def _outputs(self, number: int, pad: PadSettings) -> list[Where]:
        found = []
        for name, axes in pad.outputs.items():
            key = f"pad[{number}].outputs.{name}"
            index = _find(key, "output", name, self._signature.outputs)
            for axis in axes if isinstance(axes, tuple) else (axes,):
                _check_axis(key, "output", self._signature.outputs[index], axis)
                where = Where(index, axis)
                if where in self._claimed:
                    raise EngineLoadError(f"{key}: axis {axis} of output {name!r} is named twice")
                self._claimed.add(where)
                found.append(where)
        return found

    def _mask(self, key: str, name: str) -> Mask:
        index = _find(key, "input", name, self._signature.inputs)
        spec = self._signature.inputs[index]
        if spec.datatype == "BYTES" or spec.shape.count(-1) != 1:
            what = f"input {name!r} is {spec.datatype} {[-1, *spec.shape]}"
            raise EngineLoadError(f"{key}: {what}; a mask needs numbers or BOOL, and one variable axis")
        self._values[index] = _value(key, spec, None)
        return Mask(index, spec.shape, np.array(_value(key, spec, 1), spec.dtype).tobytes())


def _powers(most: int | None) -> tuple[int, ...]:
    """Return the powers of two below `most`, and `most`; nothing if there is no limit."""
    if most is None:
        return ()
    return (*(1 << n for n in range((most - 1).bit_length())), most)


def _find(key: str, what: str, name: str, specs: Sequence[TensorSpec]) -> int:
    names = [spec.name for spec in specs]
    if name not in names:
        raise EngineLoadError(f"{key}: the model has no {what} {name!r}; its {what}s are {', '.join(names)}")
    return names.index(name)


def _check_axis(key: str, what: str, spec: TensorSpec, axis: int) -> None:
    if axis >= len(spec.shape):
        of = f"its rows have {len(spec.shape)} axes"
    elif spec.shape[axis] != -1:
        of = f"axis {axis} of its rows is fixed at {spec.shape[axis]}"
    else:
        return
    raise EngineLoadError(f"{key}: {what} {spec.name!r} is {[-1, *spec.shape]}: {of}")


def _value(key: str, spec: TensorSpec, value: bool | float | str | None) -> Any:
    """Return a value as an element of the input: bytes, or a NumPy scalar."""
    kind = spec.dtype.kind
    fits = False
    if value is None:
        value, fits = "" if kind == "O" else False if kind == "b" else 0, True
    elif kind == "O":
        fits = isinstance(value, str)
    elif kind == "b":
        fits = value in (0, 1) and not isinstance(value, str)
    elif spec.datatype == "BF16" or kind == "f":
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and (abs(float(value)) < _BF16_LIMIT or spec.datatype != "BF16")
    elif isinstance(value, int) and not isinstance(value, bool):
        fits = np.iinfo(spec.dtype).min <= value <= np.iinfo(spec.dtype).max
    if fits and isinstance(value, str):
        return value.encode()
    if fits and spec.datatype == "BF16":
        return _bf16(value)
    with np.errstate(over="ignore"):
        made = spec.dtype.type(value) if fits else None
    if made is None or (kind == "f" and np.isinf(made) and abs(float(value)) != np.inf):
        raise EngineLoadError(f"{key}: input {spec.name!r} is {spec.datatype}, it cannot hold {value!r}")
    return made


def _bf16(value: bool | float | str) -> np.uint16:
    """Return the bits of the nearest BF16 number, of two equally near ones the even one."""
    bits = int(np.float32(value).view(np.uint32))
    return np.uint16(min(0xFFFFFFFF, bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
