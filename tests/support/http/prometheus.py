"""A real Prometheus (Debian's package `prometheus`), and its promtool."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 60.0
_MISSING = "needs Prometheus: apt-get install prometheus"


def found(program: str) -> str:
    """Return the program's path. Skips the test if it is missing, and fails it under CI."""
    path = shutil.which(program)
    if path is None and os.environ.get("CI"):
        pytest.fail(_MISSING)
    if path is None:
        pytest.skip(_MISSING)
    return path


def promtool(*arguments: str | Path, stdin: str = "") -> str:
    """Run promtool and return its output. Fails the test if promtool fails."""
    done = subprocess.run(
        [found("promtool"), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, path: str, **query: str) -> Any:
        """Return the data of an answer of its HTTP API."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            reply = json.load(answer)
        assert reply["status"] == "success"
        return reply["data"]

    def values(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Run a query; return labels and value of each series."""
        result = self.ask("query", query=query)["result"]
        return [(one["metric"], float(one["value"][1])) for one in result]


@contextlib.contextmanager
def prometheus(config: Path, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with this configuration; yield it when it is ready."""
    program = found("prometheus")
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if "Server is ready to receive web requests" in line:
                    break
            else:
                pytest.fail("".join(lines))
            (port,) = re.findall(r'"Listening on" address=127\.0\.0\.1:(\d+)', "".join(lines))
            yield Prometheus(int(port))
        finally:
            process.terminate()
            process.communicate(timeout=DEADLINE_S)
