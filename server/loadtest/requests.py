"""The requests of a load test: inputs drawn at random or read from files, encoded, and tried once."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cobatch.engines.base import DATATYPES
from cobatch.server.loadtest.codec import Array, Checker, datatype_of, decode, encode, request_bytes, to_bf16
from cobatch.server.loadtest.messages import Arrays, Expected, Plan, PreparedRequest
from cobatch.server.loadtest.options import BenchError, Caller, Options, Span, UsageError, parse_spans
from cobatch.server.loadtest.target import Model, Tensor, describe, fetch, parse_url

_DRAWN_BYTES_LIMIT = 64 << 20  # per request size; more inputs would not change the load
_TRIED_LIMIT = 64
_LETTERS = np.array(list(string.ascii_lowercase))
_DEFAULT_INTEGERS = (0, 99)


def prepare(options: Options) -> tuple[Plan, Model]:
    """Fetch the model's metadata, prepare the requests and try them. Raises BenchError."""
    address, model_in_path, version_in_path = parse_url(options.url, options.ca_file, options.insecure)
    callers = options.callers
    name, version = options.model or model_in_path, options.model_version or version_in_path
    model = describe(address, name, version, callers[0].headers)
    examples = _Examples(options, model)
    path = f"{model.path}/infer"

    def prepared(caller: int, example: int) -> PreparedRequest:
        body, headers = examples.encode(example, callers[caller])
        return PreparedRequest(request_bytes(address, path, headers, body), caller, example)

    requests = {
        (number, rows): [prepared(number, example) for example in examples.numbers(rows)]
        for number, caller in enumerate(callers)
        for rows in _request_sizes(options, caller)
    }
    expected = _expected(options, model, examples)
    plan = Plan(address, requests, callers, expected, options.timeout_s, options.seed)
    _try_requests(plan, path, examples)
    return plan, model


def _request_sizes(options: Options, caller: Caller) -> list[int]:
    """Return the numbers of rows of this caller's requests."""
    names = [one.name for one in options.callers]
    sizes = {caller.rows}
    for recorded in options.trace.requests if options.trace is not None else ():
        tenant = recorded.tenant or names[0]
        if tenant not in names:
            raise UsageError(f"the trace has a tenant {tenant!r} that no --tenant describes")
        if tenant == caller.name:
            sizes.add(recorded.rows)
    return sorted(sizes)


def _try_requests(plan: Plan, path: str, examples: _Examples) -> None:
    """Send a request of each caller, and all inputs if answers are checked. Raises BenchError."""
    checker = None if plan.expected is None else Checker(plan.expected)
    for number, caller in enumerate(plan.callers):
        every = number == 0 and checker is not None
        numbers = range(len(examples.arrays)) if every else examples.numbers(caller.rows)[:1]
        prefix = f"{caller.name}: " if len(plan.callers) > 1 else ""
        for example in numbers[:_TRIED_LIMIT]:
            body, headers = examples.encode(example, caller)
            reply = fetch(plan.address, "POST", path, headers, body)
            if reply.status != 200:
                raise BenchError(f"{prefix}the first request was answered with {reply.error}")
            why = checker.check(example, reply.head, reply.body) if checker is not None else None
            if why is not None:
                raise BenchError(f"{prefix}the answer to input {example} is wrong: {why}")


def _expected(options: Options, model: Model, examples: _Examples) -> Expected | None:
    if not options.expect:
        return None
    urls = [text for text in options.expect if text.startswith(("http://", "https://"))]
    if urls and len(options.expect) > 1:
        raise UsageError("--expect: either files or one URL")
    if urls:
        answers = _reference_answers(urls[0], options, model, examples)
    elif isinstance(examples.inputs, FileInputs):
        outputs = FileInputs("--expect", options.expect, (), "outputs")
        if outputs.count != examples.inputs.count:
            raise UsageError(f"--expect: {outputs.count} answers for {examples.inputs.count} inputs")
        answers = [outputs.example(number, rows) for number, rows in examples.keys]
    else:
        raise UsageError("--expect FILE needs --input FILE: random inputs have no answers in a file")
    return Expected(answers, options.rtol, options.atol)


def _reference_answers(url: str, options: Options, model: Model, examples: _Examples) -> list[Arrays]:
    """Fetch the answers of another server, without credentials: they are meant for the server under load."""
    address, name, version = parse_url(url, options.ca_file, options.insecure)
    reference = describe(address, name or model.name, version, {})
    answers: list[Arrays] = []
    for arrays in examples.arrays:
        body, headers = encode(arrays, examples.inputs.datatypes, False, {})
        reply = fetch(address, "POST", f"{reference.path}/infer", headers, body)
        if reply.status != 200:
            raise BenchError(f"--expect {url}: {reply.error}")
        try:
            answers.append(decode(b"", reply.body))
        except ValueError as error:
            raise BenchError(f"--expect {url}: {error}") from None
    return answers


class _Examples:
    """The inputs of all requests, numbered consecutively over all request sizes."""

    def __init__(self, options: Options, model: Model) -> None:
        tensors = model.inputs or ()
        self.inputs: RandomInputs | FileInputs
        if options.inputs:
            self.inputs = FileInputs("--input", options.inputs, tensors, "inputs")
        else:
            sizes = parse_spans("--shape", options.shapes)
            if any(low < 1 or low % 1 for spans in sizes.values() for low, _ in spans):
                raise UsageError("--shape: sizes are whole numbers from 1")
            ranges = parse_spans("--values", options.values)
            if any(len(spans) > 1 for spans in ranges.values()):
                raise UsageError("--values: expected one LOW:HIGH for each input")
            values = {name: spans[0] for name, spans in ranges.items()}
            self.inputs = RandomInputs(tensors, sizes, values, options.seed)
        self.arrays: list[Arrays] = []
        self.keys: list[tuple[int, int]] = []  # (number among examples of this size, rows)
        self._options = options
        self._numbers: dict[int, range] = {}

    def numbers(self, rows: int) -> range:
        """Return the numbers of the examples with this many rows, made on first use."""
        if rows not in self._numbers:
            if isinstance(self.inputs, FileInputs):
                count = -(-self.inputs.count // rows)
            else:
                size = sum(array.nbytes for array in self.inputs.example(0, rows).values())
                count = max(1, min(self._options.examples, _DRAWN_BYTES_LIMIT // max(1, size)))
            first = len(self.arrays)
            self.keys += [(number, rows) for number in range(count)]
            self.arrays += [self.inputs.example(number, rows) for number in range(count)]
            self._numbers[rows] = range(first, len(self.arrays))
        return self._numbers[rows]

    def encode(self, number: int, caller: Caller) -> tuple[bytes, dict[str, str]]:
        """Return an example's body and all headers of this caller's request."""
        binary, datatypes = self._options.binary, self.inputs.datatypes
        body, headers = encode(self.arrays[number], datatypes, binary, caller.parameters)
        return body, {**caller.headers, **headers}


class RandomInputs:
    """Random inputs by the model's metadata; sizes and value ranges may be set. Raises UsageError."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        sizes: Mapping[str, Sequence[Span]],
        spans: Mapping[str, Span],
        seed: int,
    ) -> None:
        if not tensors:
            raise UsageError("the model's metadata has no inputs: give --input FILE")
        self.datatypes = {tensor.name: tensor.datatype for tensor in tensors}
        for flag, names in (("--shape", sizes), ("--values", spans)):
            for name in names:
                if name not in self.datatypes:
                    raise UsageError(f"{flag}: no input {name!r}; the model has {', '.join(self.datatypes)}")
        for name, datatype in self.datatypes.items():
            if datatype not in DATATYPES:
                raise UsageError(f"input {name!r}: unknown datatype {datatype!r}")
        self._tensors, self._sizes, self._spans, self._seed = tensors, sizes, spans, seed

    def example(self, number: int, rows: int) -> Arrays:
        """Return the inputs of a request; equal for equal numbers."""
        rng = np.random.default_rng([self._seed, number])
        drawn: dict[tuple[Span, int], int] = {}
        return {
            tensor.name: _random_array(
                tensor.datatype, self._shape(tensor, rows, rng, drawn), self._spans.get(tensor.name), rng
            )
            for tensor in self._tensors
        }

    def _shape(
        self, tensor: Tensor, rows: int, rng: np.random.Generator, drawn: dict[tuple[Span, int], int]
    ) -> list[int]:
        """Return a shape. The metadata does not name its axes: inputs with equal ranges get equal sizes."""
        name, shape = tensor.name, list(tensor.shape)
        batched = tensor.batched and shape[:1] == [-1]
        if not batched and rows != 1:
            raise UsageError(f"input {name!r} has no batch axis: requests can have one row only")
        free = [axis for axis, size in enumerate(shape) if size == -1 and not (batched and axis == 0)]
        spans = self._sizes.get(name, ())
        if len(spans) != len(free):
            raise UsageError(
                f"input {name!r} has shape {shape}: give --shape {name}=SIZE{',SIZE' * (len(free) - 1)} for "
                "its variable axes"
                if free
                else f"--shape: input {name!r} has no axis of variable size"
            )
        for number, (axis, span) in enumerate(zip(free, spans, strict=True)):
            key = span, spans[:number].count(span)
            if key not in drawn:
                drawn[key] = int(rng.integers(int(span[0]), int(span[1]) + 1))
            shape[axis] = drawn[key]
        return [rows, *shape[1:]] if batched else shape


def _random_array(datatype: str, shape: list[int], span: Span | None, rng: np.random.Generator) -> Array:
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        words = ["".join(rng.choice(_LETTERS, 8)) for _ in range(int(np.prod(shape)))]
        return np.array(words, object).reshape(shape)
    if datatype == "BOOL":
        return rng.random(shape) < 0.5
    if datatype == "BF16" or dtype.kind == "f":
        floats = rng.standard_normal(shape) if span is None else rng.uniform(*span, shape)
        return to_bf16(floats) if datatype == "BF16" else floats.astype(dtype)
    low, high = span or _DEFAULT_INTEGERS
    return rng.integers(int(low), int(high), shape, dtype, endpoint=True)


class FileInputs:
    """Inputs, or with `part` "outputs" answers, from files: NAME=FILE.npy or FILE.jsonl. Raises UsageError.

    The first axis of an .npy file counts rows. A line of JSON is an object with one row's values by name, or
    a whole V2 request (answer), whose tensors are sent unchanged.
    """

    def __init__(self, flag: str, texts: Sequence[str], tensors: Sequence[Tensor], part: str) -> None:
        self._flag, self._part = flag, part
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.datatypes = {tensor.name: tensor.datatype for tensor in tensors}
        self._columns: dict[str, list[Array]] = {}
        self._messages: list[dict[str, Array]] = []
        for text in texts:
            self._read(text)
        lengths = {len(column) for column in self._columns.values()}
        if self._messages:
            lengths.add(len(self._messages))
        if len(lengths) != 1 or (self._messages and self._columns) or 0 in lengths:
            raise UsageError(f"{flag}: the files must have equally many rows, one or more")
        self.count = lengths.pop()

    def example(self, number: int, rows: int) -> Arrays:
        """Return the rows of the number-th request, from the start again after the last."""
        if self._messages:
            if rows != 1:
                raise UsageError(f"{self._flag}: whole messages set their own rows: leave out --rows")
            return self._messages[number % self.count]
        at = [(number * rows + row) % self.count for row in range(rows)]
        return {name: self._stacked(name, [column[i] for i in at]) for name, column in self._columns.items()}

    def _stacked(self, name: str, rows: list[Array]) -> Array:
        tensor = self._tensors.get(name)
        batched = tensor is None or (tensor.batched and tensor.shape[:1] == (-1,))
        if tensor is not None and not batched and len(tensor.shape) == rows[0].ndim:
            if len(rows) != 1:
                raise UsageError(f"input {name!r} has no batch axis: requests can have one row only")
            return rows[0]
        try:
            return np.stack(rows)
        except ValueError:
            raise UsageError(f"{self._flag}: rows of {name!r} in one request must have one shape") from None

    def _read(self, text: str) -> None:
        name, equals, file = text.partition("=")
        path = Path(file if equals else text)
        if path.suffix == ".npy" and not equals:
            raise UsageError(f"{self._flag}: which tensor is {text}? Give NAME={text}")
        where = str(path)
        try:
            if path.suffix != ".npy":
                for number, line in enumerate(path.read_text().splitlines(), 1):
                    where = f"{path}, line {number}"
                    if line.strip():
                        self._read_row(json.loads(line))
            else:
                self._columns[name] = list(self._typed(name, np.load(path, allow_pickle=False)))
        except (OSError, ValueError) as error:
            raise UsageError(f"{self._flag}: {where}: {error}") from None

    def _read_row(self, row: Any) -> None:
        if not isinstance(row, dict):
            raise ValueError("expected an object")  # noqa: TRY004 - as all errors of the file
        tensors = row.get(self._part)
        if not isinstance(tensors, list):
            for name, values in row.items():
                self._columns.setdefault(name, []).append(self._typed(name, values))
            return
        try:
            self.datatypes |= {str(one["name"]): str(one["datatype"]) for one in tensors}
            arrays = {
                one["name"]: self._typed(one["name"], one["data"]).reshape(one["shape"]) for one in tensors
            }
        except (KeyError, TypeError):
            raise ValueError("not a message of the protocol") from None
        self._messages.append(arrays)

    def _typed(self, name: str, values: Any) -> Array:
        """Convert to the datatype of the metadata; a tensor without metadata keeps its own."""
        datatype = self.datatypes.get(name)
        try:
            array = np.asarray(values)
            if datatype is None:
                self.datatypes[name] = datatype_of(array)
                return array
            dtype = DATATYPES[datatype]
            if datatype == "BF16" and array.dtype.kind == "f":
                return to_bf16(array)
            if dtype.kind == "O" or not array.size:
                return array.astype(dtype)
            return array.astype(dtype, casting="same_kind" if array.dtype.kind == "f" else "unsafe")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name!r} ({datatype}): {error}") from None
