"""Batched functions in processes of their own: results, exceptions, crashes, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cobatch import BatcherError, BatchFailedError, ExecutionTimeoutError, batched
from tests.support.library import functions
from tests.support.library.gated import WAIT_S, until

PROGRAM = """
import asyncio, os
from cobatch import batched

class Pair:
    def __init__(self, value):
        self.value = value

class OwnError(Exception):
    pass

@batched(run_in="process")
def values(pairs):
    if pairs[0].value is None:
        raise OwnError("no value")
    return [(Pair(pair.value), __name__, os.getpid()) for pair in pairs]

async def main():
    pair, name, pid = await values(Pair(5))
    assert type(pair) is Pair
    print(pair.value, name, pid != os.getpid())
    try:
        await values(Pair(None))
    except OwnError as error:
        print(error)

if __name__ == "__main__":
    asyncio.run(main())
"""


def has_ended(process: int) -> bool:
    """Wait for the end of a process, and close its descriptor."""
    try:
        return bool(select.select([process], [], [], WAIT_S)[0])
    finally:
        os.close(process)


async def outcomes(*items: Any) -> list[Any]:
    return await asyncio.gather(*map(functions.work, items), return_exceptions=True)


@pytest.mark.slow
def test_items_that_fail_or_crash_fail_alone_and_the_process_ends_with_the_loop() -> None:
    async def main() -> int:
        first = await functions.work("x")
        assert first[0] == "x"
        assert first[1] != os.getpid()
        one, raised, two, unpicklable, result, last = await outcomes(
            1, "raise", "two", lambda: 0, "result", [6]
        )
        assert (one, last) == ((1, first[1]), ([6], first[1]))
        assert isinstance(raised, ValueError)
        assert str(raised) == "bad"
        assert 'raise ValueError("bad")' in raised.__notes__[0]  # the traceback there
        assert str(two) == "TwoPartsError: very bad"
        assert isinstance(unpicklable, AttributeError | pickle.PicklingError)
        assert isinstance(result, AttributeError | pickle.PicklingError)
        one, crashed, last = await outcomes(1, "exit", 2)
        assert isinstance(crashed, BatchFailedError)
        assert (one[0], last[0]) == (1, 2)
        assert (await functions.double([1, 2])).tolist() == [2, 4]
        return os.pidfd_open((await functions.work(0))[1])

    assert has_ended(asyncio.run(main()))


@pytest.mark.slow
def test_a_process_ends_with_the_loop_also_during_its_batch() -> None:
    async def main() -> int:
        process = os.pidfd_open((await functions.work(0))[1])
        accepted = functions.work.statistics().accepted
        call = asyncio.ensure_future(functions.work("wait"))
        await until(lambda: functions.work.statistics().accepted > accepted)
        assert not call.done()
        return process

    assert has_ended(asyncio.run(main()))


@pytest.mark.slow
async def test_a_run_that_takes_too_long_is_ended_with_its_process() -> None:
    before = None
    while before is None:  # on a busy machine a run may take too long
        with contextlib.suppress(BatcherError):
            before = await functions.hang(1)
    with pytest.raises(ExecutionTimeoutError):
        await functions.hang(0)
    after = None
    while after is None:
        with contextlib.suppress(BatcherError):
            after = await functions.hang(1)
    assert after != before
    await until(lambda: not Path(f"/proc/{before}").exists())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "head", "name"),
    [
        (["ours/program.py"], "", "__mp_main__"),
        (["-m", "ours.program"], "from . import parts", "ours.__mp_main__"),
    ],
)
def test_a_function_of_a_program(tmp_path: Path, command: list[str], head: str, name: str) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "program.py").write_text(head + PROGRAM)
    (tmp_path / "ours" / "parts.py").write_text("")
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert (done.stdout, done.stderr) == (f"5 {name} True\nno value\n", "")


def test_a_function_that_another_process_cannot_import_is_refused() -> None:
    def local(items: list[int]) -> list[int]:
        return items

    async def coroutine(items: list[int]) -> list[int]:
        return items

    def method(self: object, items: list[int]) -> list[int]:
        return items

    decorate: Any = batched(run_in="process", name="it")
    with pytest.raises(TypeError, match="it must be a function of a module or a program"):
        decorate(local)
    with pytest.raises(TypeError, match="it cannot run in a process: it is a coroutine function"):
        decorate(coroutine)
    with pytest.raises(TypeError, match="it cannot run in a process: it is a method"):
        decorate(method)
