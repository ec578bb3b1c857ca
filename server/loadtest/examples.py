"""Inputs for the requests, drawn as the metadata says or read from files; expected outputs from files."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cobatch.engines.base import DATATYPES
from cobatch.server.loadtest.errors import UsageError
from cobatch.server.loadtest.messages import Arrays
from cobatch.server.loadtest.target import Tensor
from cobatch.server.loadtest.wire import datatype_of

Span = tuple[float, float]
_LETTERS = np.array(list(string.ascii_lowercase))


class Drawn:
    """Random inputs: as the metadata has them, sizes and values as asked for. Raises UsageError."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        sizes: Mapping[str, Sequence[Span]],
        values: Mapping[str, Span],
        seed: int,
    ) -> None:
        if not inputs:
            raise UsageError("the model's metadata has no inputs: give --input FILE")
        _known("--shape", sizes, inputs)
        _known("--values", values, inputs)
        self._inputs, self._sizes, self._values, self._seed = inputs, sizes, values, seed
        self.datatypes = {one.name: one.datatype for one in inputs}
        for one in inputs:
            if one.datatype not in DATATYPES:
                raise UsageError(f"input {one.name!r}: datatype {one.datatype!r} is not of the protocol")

    def example(self, number: int, rows: int) -> Arrays:
        """The same again for the same number."""
        rng = np.random.default_rng([self._seed, number])
        return {one.name: self._tensor(one, rows, rng) for one in self._inputs}

    def _tensor(self, one: Tensor, rows: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        shape = list(one.shape)
        batched = shape[:1] == [-1]
        if not batched and rows != 1:
            raise UsageError(f"input {one.name!r} has no batch axis: requests have one row only")
        free = [axis for axis, size in enumerate(shape) if size == -1 and not (batched and axis == 0)]
        spans = self._sizes.get(one.name, ())
        if len(spans) != len(free):
            raise UsageError(
                f"input {one.name!r} has shape {shape}: give --shape {one.name}=SIZE"
                f"{',SIZE' * (len(free) - 1)} for what varies in it"
                if free
                else f"--shape: input {one.name!r} has no axis of variable size"
            )
        for axis, (low, high) in zip(free, spans, strict=True):
            shape[axis] = int(rng.integers(int(low), int(high) + 1))
        if batched:
            shape[0] = rows
        return _values(one.datatype, shape, self._values.get(one.name), rng)


def _values(
    datatype: str, shape: list[int], span: Span | None, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        words = ["".join(rng.choice(_LETTERS, 8)) for _ in range(int(np.prod(shape)))]
        return np.array(words, object).reshape(shape)
    if datatype == "BOOL":
        return rng.random(shape) < 0.5
    if datatype == "BF16" or dtype.kind == "f":
        drawn = rng.standard_normal(shape) if span is None else rng.uniform(*span, shape)
        if datatype == "BF16":
            return (drawn.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return drawn.astype(dtype)
    low, high = span or (0, 99)
    return rng.integers(int(low), int(high), shape, dtype, endpoint=True)


class Read:
    """Inputs, or with `part` "outputs" answers, from files: NAME=FILE.npy, or FILE.jsonl. Raises UsageError.

    A row of a .npy file is one along its first axis. A line of JSON is an object of names with one row's
    values each, or a whole request (answer) of the protocol, whose tensors are sent as they are.
    """

    def __init__(self, flag: str, texts: Sequence[str], tensors: Sequence[Tensor], part: str) -> None:
        self._flag, self._part = flag, part
        self._known = {one.name: one for one in tensors}
        self.datatypes = {one.name: one.datatype for one in tensors}
        self._columns: dict[str, Sequence[np.ndarray[Any, Any]]] = {}
        self._whole: list[dict[str, np.ndarray[Any, Any]]] = []
        for text in texts:
            self._read(text)
        lengths = {len(column) for column in self._columns.values()}
        if self._whole:
            lengths.add(len(self._whole))
        if len(lengths) != 1 or (self._whole and self._columns) or 0 in lengths:
            raise UsageError(f"{flag}: the files do not have equally many rows, one or more")
        self.count = lengths.pop()

    def example(self, number: int, rows: int) -> Arrays:
        """The number-th request's rows, from the start again where there are no more."""
        if self._whole:
            if rows != 1:
                raise UsageError(
                    f"{self._flag}: whole messages have the rows that they have: leave out --rows"
                )
            return self._whole[number % self.count]
        at = [(number * rows + row) % self.count for row in range(rows)]
        return {name: self._stacked(name, [column[i] for i in at]) for name, column in self._columns.items()}

    def _stacked(self, name: str, rows: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        known = self._known.get(name)
        if known is not None and known.shape[:1] != (-1,) and len(known.shape) == rows[0].ndim:
            if len(rows) != 1:
                raise UsageError(f"input {name!r} has no batch axis: requests have one row only")
            return rows[0]
        try:
            return np.stack(rows)
        except ValueError:
            raise UsageError(
                f"{self._flag}: rows of {name!r} that differ in shape share no request"
            ) from None

    def _read(self, text: str) -> None:
        name, equals, file = text.partition("=")
        path = Path(file if equals else text)
        try:
            if path.suffix == ".npy":
                if not equals:
                    raise UsageError(f"{self._flag}: which tensor is {text}? Give NAME={text}")
                array = np.load(path, allow_pickle=False)
                self._columns[name] = list(self._typed(name, array, str(path)))
            else:
                self._lines(path)
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise UsageError(f"{self._flag}: {path}: {error}") from None

    def _lines(self, path: Path) -> None:
        columns: dict[str, list[np.ndarray[Any, Any]]] = {}
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            found = json.loads(line)
            if not isinstance(found, dict):
                raise UsageError(f"{self._flag}: {where}: expected an object")
            if isinstance(found.get(self._part), list):
                self._whole.append(self._message(found[self._part], where))
                continue
            for name, values in found.items():
                columns.setdefault(name, []).append(self._typed(name, values, where))
        self._columns.update(columns)

    def _message(self, tensors: list[Any], where: str) -> dict[str, np.ndarray[Any, Any]]:
        try:
            for one in tensors:
                self.datatypes[str(one["name"])] = str(one["datatype"])
            return {
                one["name"]: self._typed(one["name"], one["data"], where).reshape(one["shape"])
                for one in tensors
            }
        except (KeyError, TypeError):
            raise UsageError(f"{self._flag}: {where}: not a message of the protocol") from None

    def _typed(self, name: str, values: Any, where: str) -> np.ndarray[Any, Any]:
        """As the metadata has this tensor; as it comes where the metadata does not know it."""
        datatype = self.datatypes.get(name)
        try:
            array = np.asarray(values)
            if datatype is None:
                self.datatypes[name] = datatype_of(array)
                return array
            dtype = DATATYPES[datatype]
            if datatype == "BF16" and array.dtype.kind == "f":
                return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            if dtype.kind == "O" or not array.size:
                return array.astype(dtype)
            return array.astype(dtype, casting="same_kind" if array.dtype.kind == "f" else "unsafe")
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{self._flag}: {where}: {name!r} ({datatype}): {error}") from None


Source = Drawn | Read


def _known(flag: str, given: Mapping[str, object], inputs: Sequence[Tensor]) -> None:
    names = [one.name for one in inputs]
    for name in given:
        if name not in names:
            raise UsageError(f"{flag}: there is no input {name!r}; there is {', '.join(names)}")
