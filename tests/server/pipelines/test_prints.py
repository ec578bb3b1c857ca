"""The output of calls that run at the same time."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextvars import Context, copy_context

from cobatch.server.pipelines.prints import Marked, marked


class Call:
    """A call that prints, in a context of its own."""

    def __init__(self, request_id: str) -> None:
        self._context: Context = copy_context()
        self._marking = marked(request_id)
        self.run(self._marking.__enter__)

    def run(self, function: Callable[[], object]) -> None:
        self._context.run(function)

    def print(self, *texts: str, end: str = "\n", flush: bool = False) -> None:
        self.run(lambda: print(*texts, file=stream, end=end, flush=flush))

    def end(self) -> None:
        self.run(lambda: self._marking.__exit__(None, None, None))


written = io.BytesIO()
stream = Marked(written, line_buffering=True)


def lines() -> list[str]:
    """Return the lines that were written since the last call."""
    text = written.getvalue().decode()
    written.seek(0)
    written.truncate()
    assert text.endswith("\n") or not text
    return text.splitlines()


def test_parts_of_lines_of_two_calls() -> None:
    one, two = Call("one"), Call("two")
    one.print("a", "b", end="")
    two.print("x", end="")
    one.print("c")
    two.print("y\n\nz")
    assert lines() == ["one: a bc", "two: xy", "two: ", "two: z"]


def test_lines_without_an_end() -> None:
    one, two = Call("one"), Call("two")
    one.print("50 %", end="\r", flush=True)
    one.print("75 %", end="")
    two.print("x", flush=True)
    one.end()
    two.end()
    assert lines() == ["one: 50 %", "two: x", "one: 75 %"]
    one.print("x" * 10_000, end="")
    one.print("y" * 10)
    assert [len(line) for line in lines()] == [5 + 10_000, 5 + 10]


def test_what_is_printed_outside_of_calls() -> None:
    call = Call("one")
    call.print("a", end="")
    print("b", file=stream)
    assert lines() == ["b"]
    call.end()
    assert lines() == ["one: a"]


def test_a_call_without_an_id() -> None:
    Call("").print("a")
    assert lines() == ["a"]


def test_a_stream_that_its_handler_has_closed() -> None:
    closed, call = Marked(io.BytesIO()), Call("one")
    call.run(lambda: print("a", file=closed, end=""))
    closed.detach()
    call.end()
