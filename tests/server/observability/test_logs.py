"""The log's stream, its limit for repeated warnings, and the capture of a file descriptor."""

import io
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from typing import Any

import pytest

from cobatch.server.observability import logs
from cobatch.server.observability.logs import Capture, JsonFormatter, LogHandler, LogStream, Times


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
    big = '{"n": 1}' + " " * (logs._QUEUE_CHARACTERS // 4 - 100) + "\n"
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
    stream.put("x" * (2 * logs._QUEUE_CHARACTERS) + "\n")
    stream.start()
    assert stream.stop()
    assert len(reader.getvalue()) > 2 * logs._QUEUE_CHARACTERS
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


# Records


class _Logged:
    """A logger whose lines are in `text`, and a clock."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.now_s = 0.0
        self.stream = LogStream(as_json=as_json)
        self.handler = LogHandler(self.stream, lambda: self.now_s)
        self.log = logging.Logger("cobatch.test")  # noqa: LOG001 - each test has its own
        self.log.addHandler(self.handler)

    @property
    def messages(self) -> list[str]:
        lines, self.stream._waiting = "".join(self.stream._waiting).splitlines(), []
        return [line.partition("cobatch.test: ")[2] or line for line in lines]


def test_warnings_of_a_kind_are_limited_and_the_last_is_kept() -> None:
    logged = _Logged()
    for n in range(logs._BURST + 7):
        logged.log.warning("model %s: no", n)
    logged.log.warning("another kind")
    assert logged.messages == [*(f"model {n}: no" for n in range(logs._BURST)), "another kind"]
    logged.now_s = 9.99
    logged.handler.tell_repeats()
    assert logged.messages == []
    logged.now_s = 10.0
    logged.handler.tell_repeats()
    assert logged.messages == [f"7 more in the last 10 s, the last: model {logs._BURST + 6}: no"]
    logged.log.warning("model %s: no", 99)
    assert logged.messages == ["model 99: no"]


def test_levels_below_warning_are_not_limited() -> None:
    logged = _Logged()
    for n in range(3 * logs._BURST):
        logged.log.info("model %s: loaded", n)
    assert len(logged.messages) == 3 * logs._BURST


def test_texts_made_by_their_callers_are_limited_too() -> None:
    logged = _Logged()
    for n in range(2 * logs._MAX_KINDS):
        logged.log.error(f"client {n} did something")  # noqa: G004 - what a library may do
    assert len(logged.messages) == logs._MAX_KINDS + logs._BURST


def test_lines_of_libraries_keep_their_form_and_have_a_limit_of_their_own() -> None:
    logged = _Logged()
    for n in range(logs._FOREIGN_BURST + 2):
        logged.handler.foreign(f"[W:lib] {n}")
    messages = logged.messages
    assert messages[0] == "[W:lib] 0"
    assert len(messages) == logs._FOREIGN_BURST


def test_a_message_that_cannot_be_formatted_reaches_no_caller() -> None:
    logged = _Logged()
    logged.log.error("%d", "no number")
    assert logged.messages == ["cannot format '%d'"]
    logged = _Logged(as_json=True)
    logged.log.error("%d", "no number")
    (line,) = logged.stream._waiting
    assert json.loads(line)["message"] == "cannot format '%d'"


def test_a_traceback_is_one_line_of_json() -> None:
    exc_info = (ValueError, ValueError("why\nnot"), None)
    made = logging.LogRecord("cobatch.server", logging.ERROR, __file__, 1, "it %s", ("broke",), exc_info)
    (line,) = lines_of(JsonFormatter().format(made))
    assert (line["level"], line["logger"], line["message"]) == ("error", "cobatch.server", "it broke")
    assert "ValueError: why\nnot" in line["exception"]


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
    assert lines.get(timeout=20) == "one"
    os.write(fd, b"o \xff\n" + b"x" * (logs._LONGEST_LINE + 1) + b"\nrest")
    assert lines.get(timeout=20) == "two \\xff"
    assert [len(lines.get(timeout=20)) for _ in range(2)] == [logs._LONGEST_LINE, 1]
    capture.end()
    assert lines.get_nowait() == "rest"
    capture.write("direct\n")
    assert os.read(reader, 100) == b"direct\n"
    capture.restore()
    os.write(fd, b"again\n")
    assert os.read(reader, 100) == b"again\n"


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


_FAILING = """
import os, sys, threading
from cobatch.server.observability.logs import ProcessLog
log = ProcessLog("INFO", as_json=True)
thread = threading.Thread(target=lambda: 1 / 0, name="helper")
thread.start()
thread.join()
import warnings
warnings.warn("careful")
os.write(2, b"from C\\n")
print("cobatch: a line")
log.close()
print("the end", file=sys.stderr)
"""


def test_a_process_says_everything_in_one_form() -> None:
    command = [sys.executable, "-c", _FAILING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "cobatch: a line\n"
    *lines, last = done.stderr.splitlines()
    assert last == "the end"
    said = {line["logger"]: line for line in map(json.loads, lines)}
    assert said["cobatch.server"]["message"] == "helper failed"
    assert "ZeroDivisionError" in said["cobatch.server"]["exception"]
    assert "careful" in said["py.warnings"]["message"]
    assert said["stderr"]["message"] == "from C"


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)])
def test_a_process_may_be_started_without_them(closed: tuple[int, ...]) -> None:
    code = (
        "from cobatch.server.observability.logs import ProcessLog, log\n"
        "process_log = ProcessLog('INFO', as_json=False)\n"
        "log.info('hello')\nprint('out')\nprocess_log.close()"
    )
    shell = ["sh", "-c", f'exec "$0" -c "$1" {" ".join(f"{fd}>&-" for fd in closed)}', sys.executable, code]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=True)
    assert ("out" in done.stdout, "hello" in done.stderr) == (1 not in closed, 2 not in closed)
