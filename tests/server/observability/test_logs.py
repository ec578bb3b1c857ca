"""Records of the log: their forms, the limit for repeated ones, and all output of a process."""

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from cobatch.server.observability import logs
from cobatch.server.observability.logs import JsonFormatter, LogHandler
from cobatch.server.observability.output import LogStream


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


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
        logged.log.error(f"client {n} did something")  # noqa: G004 - as a library may do
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
    for _ in range(logs._BURST + 2):
        logged.log.error("%d", "no number")
    assert set(logged.messages) == {"cannot format '%d'"}
    logged.handler.tell_repeats(ending=True)
    assert logged.messages == ["2 more in the last 10 s, the last: cannot format '%d'"]
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


# The process


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
