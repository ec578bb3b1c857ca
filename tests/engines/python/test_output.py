"""The output of a model's process: lines to the log, in time that a test sets."""

from __future__ import annotations

import pytest

from cobatch.engines.python.messages import MARK
from cobatch.engines.python.process import Output


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def output(clock: Clock, caplog: pytest.LogCaptureFixture) -> Output:
    caplog.set_level("INFO", "cobatch.python")
    return Output("m", clock)


def logged(log: pytest.LogCaptureFixture) -> list[str]:
    lines = [one.getMessage().removeprefix("model m: ") for one in log.records]
    log.clear()
    return lines


def test_lines_in_pieces(output: Output, caplog: pytest.LogCaptureFixture) -> None:
    for piece in (b"one\ntw", b"o\n\n", b"\xff three"):
        output.feed(piece)
    assert logged(caplog) == ["one", "two"]
    output.feed(b"")
    assert logged(caplog) == ["\ufffd three"]
    assert output.text() == "\n  its last output:\n  one\n  two\n  \ufffd three"


def test_marks(output: Output, caplog: pytest.LogCaptureFixture) -> None:
    """Each ends the output of a batch, also where that of the next one is here already."""
    output.feed(b"without an end\n" + MARK)
    assert output.failed.empty()
    output.feed(b"12\nmore\n" + MARK + b"13\nnext\n")
    assert [output.failed.get_nowait() for _ in range(2)] == [
        (b"12", "\n  its last output:\n  without an end"),
        (b"13", "\n  its last output:\n  more"),
    ]
    assert output.text() == "\n  its last output:\n  next"
    assert logged(caplog) == ["without an end", "more", "next"]


def test_a_line_without_an_end_is_cut(output: Output, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        output.feed(b"x" * 3000)
    output.feed(b"\n")
    assert [len(line) for line in logged(caplog)] == [4096, 3000]


def test_a_flood(output: Output, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """The log has a part of each second; the last lines are kept all the same."""
    output.feed(b"".join(b"%d\n" % number for number in range(1000)))
    assert len(logged(caplog)) == 200
    assert output.flooded
    clock.now_s += 1.0
    output.feed(b"later\n")
    assert not output.flooded
    assert logged(caplog) == ["800 more lines in a second", "later"]
    assert list(output.kept)[-2:] == ["999", "later"]
    assert len(output.kept) == 40
