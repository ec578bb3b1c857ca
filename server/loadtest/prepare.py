"""From what was asked for to what the processes send: requests as bytes, each tried once before the load."""

from __future__ import annotations

from cobatch.server.loadtest.answers import Answer, Checker
from cobatch.server.loadtest.callers import Caller
from cobatch.server.loadtest.errors import BenchError, UsageError
from cobatch.server.loadtest.examples import Drawn, Read, Source
from cobatch.server.loadtest.messages import Address, Arrays, Expected, Plan, Prepared
from cobatch.server.loadtest.options import Asked, sizes, spans
from cobatch.server.loadtest.target import Described, ask, describe, parse_url
from cobatch.server.loadtest.wire import decode, encode, request

_MOST_BYTES = 64 << 20  # of drawn inputs: more of them would say nothing new
_TRIED = 64


def prepare(asked: Asked) -> tuple[Plan, Described]:
    """Ask the server what it wants, and make it. Raises BenchError."""
    address, in_path, version = parse_url(asked.url, asked.ca_file, asked.insecure)
    first = asked.callers[0]
    model = describe(address, asked.model or in_path, asked.version or version, first.headers)
    source = _source(asked, model)
    examples = _Examples(asked, source)
    requests = {
        (number, rows): [
            Prepared(_request(asked, address, model, caller, source, examples, at), number, at)
            for at in examples.of(rows)
        ]
        for number, caller in enumerate(asked.callers)
        for rows in _rows(asked, caller)
    }
    plan = Plan(
        address=address,
        requests=requests,
        names=[caller.name for caller in asked.callers],
        shares=[caller.share for caller in asked.callers],
        rows=[caller.rows for caller in asked.callers],
        expected=_expected(asked, model, source, examples),
        timeout_s=asked.timeout_s,
        seed=asked.seed,
    )
    _try(asked, plan, model, source, examples)
    return plan, model


def _source(asked: Asked, model: Described) -> Source:
    if asked.inputs:
        return Read("--input", asked.inputs, model.inputs, "inputs")
    return Drawn(model.inputs, sizes(asked.shapes), spans(asked.values), asked.seed)


def _rows(asked: Asked, caller: Caller) -> list[int]:
    """The sizes of this caller's requests."""
    if asked.trace is None:
        return [caller.rows]
    names = [one.name for one in asked.callers]
    for one in asked.trace.requests:
        if one.tenant and one.tenant not in names:
            raise UsageError(f"the trace has a tenant {one.tenant!r} that no --tenant describes")
    first = caller is asked.callers[0]
    its = {
        one.rows for one in asked.trace.requests if one.tenant == caller.name or (first and not one.tenant)
    }
    return sorted(its | {caller.rows})


class _Examples:
    """Inputs, numbered through, whatever their rows."""

    def __init__(self, asked: Asked, source: Source) -> None:
        self._source = source
        self._most = asked.examples
        self._of: dict[int, range] = {}
        self.all: list[Arrays] = []
        self.keys: list[tuple[int, int]] = []  # which one of how many rows each is

    def of(self, rows: int) -> range:
        """The numbers of those with so many rows."""
        if rows not in self._of:
            first = len(self.all)
            count = self._count(rows)
            self.all += [self._source.example(number, rows) for number in range(count)]
            self.keys += [(number, rows) for number in range(count)]
            self._of[rows] = range(first, first + count)
        return self._of[rows]

    def _count(self, rows: int) -> int:
        if isinstance(self._source, Read):
            return -(-self._source.count // rows)
        size = sum(array.nbytes for array in self._source.example(0, rows).values())
        return max(1, min(self._most, _MOST_BYTES // max(1, size)))


def _request(
    asked: Asked,
    address: Address,
    model: Described,
    caller: Caller,
    source: Source,
    examples: _Examples,
    at: int,
) -> bytes:
    body, headers = encode(examples.all[at], source.datatypes, asked.binary, caller.parameters)
    return request(address, f"{model.path}/infer", {**caller.headers, **headers}, body)


def _expected(asked: Asked, model: Described, source: Source, examples: _Examples) -> Expected | None:
    if not asked.expect:
        return None
    urls = [text for text in asked.expect if text.startswith(("http://", "https://"))]
    if urls and len(asked.expect) > 1:
        raise UsageError("--expect: either files or one URL")
    if urls:
        return Expected(_asked_for(urls[0], asked, model, source, examples), asked.rtol, asked.atol)
    return Expected(_read(asked, source, examples), asked.rtol, asked.atol)


def _read(asked: Asked, source: Source, examples: _Examples) -> list[Arrays]:
    if not isinstance(source, Read):
        raise UsageError("--expect FILE needs --input FILE: what is drawn has no answers in a file")
    right = Read("--expect", asked.expect, (), "outputs")
    if right.count != source.count:
        raise UsageError(f"--expect: {right.count} answers for {source.count} inputs")
    return [right.example(number, rows) for number, rows in examples.keys]


def _asked_for(url: str, asked: Asked, model: Described, source: Source, examples: _Examples) -> list[Arrays]:
    """Another server's answers. It gets no credential: those are meant for the server under load."""
    address, in_path, version = parse_url(url, asked.ca_file, asked.insecure)
    reference = describe(address, in_path or model.name, version, {})
    answers: list[Arrays] = []
    for example in examples.all:
        body, headers = encode(example, source.datatypes, False, {})
        reply = ask(address, "POST", f"{reference.path}/infer", headers, body)
        if reply.status != 200:
            raise BenchError(f"--expect {url}: {reply.status}: {reply.said()}")
        try:
            answers.append(decode(b"", reply.body))
        except ValueError as error:
            raise BenchError(f"--expect {url}: {error}") from None
    return answers


def _try(asked: Asked, plan: Plan, model: Described, source: Source, examples: _Examples) -> None:
    """One request of each caller, and of the first each input, before the load: to say what is wrong."""
    for number, caller in enumerate(asked.callers):
        tried = range(len(examples.all)) if number == 0 and plan.expected else examples.of(caller.rows)[:1]
        for at in tried[:_TRIED]:
            body, headers = encode(examples.all[at], source.datatypes, asked.binary, caller.parameters)
            sent = {**caller.headers, **headers}
            reply = ask(plan.address, "POST", f"{model.path}/infer", sent, body)
            who = f"{caller.name}: " if len(asked.callers) > 1 else ""
            if reply.status != 200:
                raise BenchError(f"{who}a first request was answered with {reply.status}: {reply.said()}")
            if plan.expected is None:
                continue
            answer = Answer()
            answer.body = reply.body
            answer.head = b"".join(f"\r\n{name}: {value}".encode() for name, value in reply.headers.items())
            why = Checker(plan.expected).wrong(at, answer)
            if why is not None:
                raise BenchError(f"{who}a first answer is wrong (input {at}): {why}")
