"""Pipelines in a server of one process or of several: the example, and the end in the middle of a call."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.http.process import Cobatch, eventually
from tests.support.models import models
from tests.support.models.gate import HOLD
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "pipelines"
TWICE = """
import numpy as np

from cobatch import model


class Twice:
    negate = model("negate")

    async def handle(self, value: float) -> list[float]:
        first = await self.negate(x=np.full((1, 3), value, np.float32))
        second = await self.negate(x=first["y"] + 1)
        return second["y"][0].tolist()
"""

# Each call says so in the log when it begins, and then waits for a writer of the gate.
GATED = """
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path


async def passed() -> None:
    print("waits at the gate")
    await asyncio.to_thread(lambda: Path("gate").open().close())


class Parts:
    async def handle(self, text: str) -> AsyncIterator[str]:
        yield "first"
        await passed()
        yield "last"


class Whole:
    async def handle(self, text: str) -> str:
        await passed()
        return text
"""


@pytest.fixture(params=[1, 3], ids=["one process", "three processes"])
def env(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"COBATCH_PROCESSES": str(request.param)}


def test_the_example(tmp_path: Path, env: dict[str, str]) -> None:
    for name in ("shapes.py", "shapes.toml"):
        (tmp_path / name).write_text((EXAMPLE / name).read_text())
    maker = str(EXAMPLE / "make_models.py")
    subprocess.run([sys.executable, maker, str(tmp_path / "models")], check=True)
    square, cross, diagonal = runpy.run_path(maker)["shapes"]()
    picture = np.zeros((16, 24), np.float32)
    picture[:8, 8:16], picture[8:, :8], picture[8:, 16:] = cross, square, diagonal
    with Cobatch(tmp_path, "--config", "shapes.toml", "--port", "0", cwd=tmp_path, env=env) as server:
        connection = server.ready().connect()
        answer = connection.post("/v1/models/shapes/infer", {"pixels": picture.tolist()})
        found: Any = [(one["name"], one["row"], one["column"]) for one in answer.json]
        assert found == [("cross", 0, 8), ("square", 8, 0), ("diagonal", 8, 16)]
        for timing in ("find-queue;dur=", "find-run;dur=", "name-queue;dur=", "name-run;dur="):
            assert timing in answer.headers["server-timing"]
        assert connection.post("/v1/models/shapes/infer", {"pixels": [[1.0]]}).status == 422
        assert server.stop() == 0


def test_an_accepted_call_is_answered_with_all_its_steps(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "twice.py").write_text(TWICE)
    path = models.write(tmp_path, models.negate(), "negate.onnx")
    (tmp_path / "twice.toml").write_text(
        f'[[models]]\npath = "{path}"\n\n[[pipelines]]\npython = "twice.py:Twice"\nprocesses = 1\n'
    )
    arguments = ("--config", "twice.toml", "--port", "0")
    with Cobatch(tmp_path, *arguments, gate=True, cwd=tmp_path, env=env) as server:
        calling, watching = server.ready().connect(), server.connect()
        calling._http.request("POST", "/v1/models/Twice/infer", str(HOLD))
        server.held()
        server.signal()
        server.not_ready(watching)
        server.release()
        answer = calling.answer()
        assert (answer.status, answer.json) == (200, [-(-HOLD + 1)] * 3)
        assert server.wait() == 0


def test_a_stream_and_calls_that_run_and_wait_are_answered_whole(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "gated.py").write_text(GATED)
    os.mkfifo(tmp_path / "gate")
    (tmp_path / "gated.toml").write_text(
        "".join(
            f'[[pipelines]]\npython = "gated.py:{name}"\nprocesses = 1\nconcurrency = 1\n\n'
            for name in ("Parts", "Whole")
        )
    )
    with Cobatch(tmp_path, "--config", "gated.toml", "--port", "0", cwd=tmp_path, env=env) as server:
        watching, streaming, *calling = [server.ready().connect() for _ in range(4)]
        streaming.post_text("/v1/models/Parts/infer", "a")
        stream = streaming._http.getresponse()
        assert [stream.readline() for _ in range(2)] == [b"data: first\n", b"\n"]
        for number, connection in enumerate(calling):
            connection.post_text("/v1/models/Whole/infer", str(number))
        queued = re.compile(rb'cobatch_queue_rows\{model="Whole",[^}]*\} 1\.0')
        eventually(lambda: queued.search(watching.get("/metrics").body))
        eventually(lambda: server.stderr.count("waits at the gate") == 2)
        server.signal()
        server.not_ready(watching)
        with (tmp_path / "gate").open("w"):
            rest = b"data: last\n\nevent: completed\ndata: {}\n\n"
            assert (stream.status, stream.read()) == (200, rest)
            answers = [connection.answer() for connection in calling]
            assert [(answer.status, answer.body) for answer in answers] == [(200, b"0"), (200, b"1")]
            assert server.wait() == 0
