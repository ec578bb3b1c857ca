"""A real Prometheus (Debian's package `prometheus`), and its promtool."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 30.0
_WHY_NOT = "needs Prometheus: apt-get install prometheus"


def found(program: str) -> str:
    """Its path. Skips the test where it is missing, and fails it under CI."""
    path = shutil.which(program)
    if path is None and os.environ.get("CI"):
        pytest.fail(_WHY_NOT)
    if path is None:
        pytest.skip(_WHY_NOT)
    return path


def promtool(*arguments: str | Path, stdin: str = "") -> str:
    """What it prints; fails the test where it finds fault."""
    done = subprocess.run(
        [found("promtool"), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


class Prometheus:
    """A running one."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, path: str, **query: str) -> Any:
        """Its HTTP API's answer."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            reply = json.load(answer)
        assert reply["status"] == "success"
        return reply["data"]

    def values(self, query: str) -> list[tuple[dict[str, str], float]]:
        """What a query gives now: labels and value of each series."""
        result = self.ask("query", query=query)["result"]
        return [(one["metric"], float(one["value"][1])) for one in result]


@contextlib.contextmanager
def prometheus(config: Path, folder: Path) -> Iterator[Prometheus]:
    """Run it with this configuration; it is ready."""
    program = found("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line)
                if "Server is ready to receive web requests" in line:
                    break
            else:
                pytest.fail("".join(said))
            yield Prometheus(port)
        finally:
            process.terminate()
            process.communicate(timeout=DEADLINE_S)
