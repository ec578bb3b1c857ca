"""The log's stream with readers that are slow or gone, and the capture of a file descriptor."""

import contextlib
import io
import json
import os
import queue
import threading
from typing import Any

import pytest

from cobatch.server.observability import output
from cobatch.server.observability.output import Capture, LogStream, Times


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class _Stuck(io.StringIO):
    """A reader that blocks until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.taking = threading.Event()
        self.gate = threading.Event()

    def write(self, text: str) -> int:
        self.taking.set()
        assert self.gate.wait(20)
        return super().write(text)


def test_a_slow_reader_blocks_nothing_and_dropped_lines_are_counted() -> None:
    reader = _Stuck()
    stream = LogStream(reader.write, as_json=True)
    assert stream.start()
    assert not stream.start()
    stream.put('{"n": 0}\n')
    assert reader.taking.wait(20)
    # The thread is blocked with the first line: the queue fills, and the rest is dropped.
    big = '{"n": 1}' + " " * (output._QUEUE_CHARACTERS // 4 - 100) + "\n"
    for _ in range(4):
        stream.put(big)
    stream.put(big, lines=3)
    stream.put(big, lines=2)
    assert stream.dropped == 5
    reader.gate.set()
    assert stream.stop(20)
    lines = lines_of(reader.getvalue())
    assert [line.get("n", line.get("dropped_lines")) for line in lines] == [0, 1, 1, 1, 1, 5]
    assert lines[-1]["level"] == "warning"


def test_a_line_is_written_however_long_it_is() -> None:
    reader = io.StringIO()
    stream = LogStream(reader.write)
    stream.put("x" * (2 * output._QUEUE_CHARACTERS) + "\n")
    stream.start()
    assert stream.stop()
    assert len(reader.getvalue()) > 2 * output._QUEUE_CHARACTERS
    assert stream.dropped == 0


def test_a_reader_that_never_reads_delays_the_end_for_a_limited_time() -> None:
    reader = _Stuck()
    stream = LogStream(reader.write)
    stream.start()
    stream.put("line\n")
    assert reader.taking.wait(20)
    assert not stream.stop(0.01)
    reader.gate.set()
    assert stream.stop(20)


def test_lines_that_a_full_disk_refuses_are_counted() -> None:
    written: list[str] = []

    def write(text: str) -> None:
        if len(written) < 2:
            written.append("")
            raise OSError("no space left")
        written.append(text)

    stream = LogStream(write, as_json=True)
    stream.put("{}\n{}\n", lines=2)
    stream.on_tick = lambda: stream.put("{}\n") if len(written) == 1 else None
    stream.start()
    while stream.dropped < 3:
        pass
    stream.put("{}\n")
    assert stream.stop(20)
    assert [line["dropped_lines"] for line in lines_of("".join(written)) if line] == [3]


def test_a_reader_that_is_gone_ends_nothing_but_the_writing() -> None:
    reader = io.StringIO()
    reader.close()
    stream = LogStream(reader.write)
    stream.start()
    stream.put("line\n")
    assert stream.stop(20)
    stream.put("line\n")
    assert stream.dropped == 1


def test_times() -> None:
    times = Times()
    moments = (0.25, 0.9999, 1.0, 1_700_000_000.5)
    assert [times.text(moment) for moment in moments] == [
        "1970-01-01T00:00:00.250Z", "1970-01-01T00:00:00.999Z", "1970-01-01T00:00:01.000Z",
        "2023-11-14T22:13:20.500Z",
    ]  # fmt: skip


# The file descriptor


@pytest.fixture
def stand_in() -> Any:
    """Return a file descriptor in place of stderr, and the reader of its pipe."""
    reader, fd = os.pipe()
    yield fd, reader
    os.close(fd)
    os.close(reader)


def test_lines_of_any_writer_are_captured(stand_in: tuple[int, int]) -> None:
    fd, reader = stand_in
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    capture = Capture(fd)
    capture.start(lines.put)
    os.write(fd, b"one\ntw")
    assert lines.get(timeout=60) == "one"
    os.write(fd, b"o \xff\n" + b"x" * (output._LONGEST_LINE + 1) + b"\nrest")
    assert lines.get(timeout=60) == "two \\xff"
    assert [len(lines.get(timeout=60)) for _ in range(2)] == [output._LONGEST_LINE, 1]
    capture.end()
    assert lines.get_nowait() == "rest"
    capture.write("direct\n")
    assert os.read(reader, 100) == b"direct\n"
    capture.restore()
    os.write(fd, b"again\n")
    assert os.read(reader, 100) == b"again\n"


def test_a_descriptor_that_another_process_made_non_blocking_loses_no_lines(
    stand_in: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, reader = stand_in
    capture, write = Capture(fd), os.write
    full = [True, False, True, False]

    def write_three_or_fail(to: int, data: bytes) -> int:
        if full.pop(0):
            raise BlockingIOError
        return write(to, data[:3])

    monkeypatch.setattr(os, "write", write_three_or_fail)
    capture.write("line\n")
    assert os.read(reader, 100) == b"line\n"


def test_the_line_after_one_that_a_full_disk_cut_off_is_a_line_of_its_own(
    stand_in: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, reader = stand_in
    capture, write = Capture(fd), os.write
    room = [4, 2, 0]

    def write_into_room(to: int, data: bytes) -> int:
        if not room:
            return write(to, data)
        if not room[0]:
            room.pop(0)
            raise OSError("no space left")
        return write(to, data[: room.pop(0)])

    monkeypatch.setattr(os, "write", write_into_room)
    for text in ("one\ntwo\n", "three\n", "four\n"):
        with contextlib.suppress(OSError):
            capture.write(text)
    assert os.read(reader, 100) == b"one\ntw\nthree\nfour\n"


def test_a_pipe_of_another_user_is_written_to_as_it_is(
    stand_in: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, reader = stand_in
    capture = Capture(fd)

    def refuse(*_: object) -> int:
        raise PermissionError("not your pipe")

    monkeypatch.setattr(os, "open", refuse)
    os.write(capture.unblocking(), b"crash")
    assert os.read(reader, 100) == b"crash"


def fill(fd: int) -> None:
    while True:
        os.write(fd, b"x" * 4096 + b"\n")


def test_a_writer_with_the_interpreters_lock_is_never_blocked(stand_in: tuple[int, int]) -> None:
    fd, _ = stand_in
    held = threading.Event()
    capture = Capture(fd)
    capture.start(lambda _: held.wait(20))
    try:
        with pytest.raises(BlockingIOError):
            fill(fd)
    finally:
        held.set()
        capture.end()
