"""A model's process that cannot be started leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any, Never

import pytest

from cobatch.engines.base import Batching
from cobatch.engines.errors import EngineLoadError
from cobatch.engines.link.slab import SlabReader, SlabWriter, create
from cobatch.engines.python.engine import ProcessEngine
from cobatch.engines.python.process import ModelProcess
from tests.support.descriptors import nothing_stays_open, opened


def start() -> ModelProcess:
    return ModelProcess("model", [], {}, lambda error: None)


@contextlib.contextmanager
def most_files(most: int) -> Iterator[None]:
    """Let this process open no descriptor of this number or above."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def no_more(*_: object, **options: object) -> Never:
    raise OSError(errno.EMFILE, "Too many open files")


def no_thread(*_: object) -> Never:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("owner", "name", "fail"),
    [
        (socket, "socketpair", no_more),
        (os, "pipe", no_more),
        (os, "set_blocking", no_more),
        (subprocess, "Popen", no_more),
        (os, "pidfd_open", no_more),
        (threading.Thread, "start", no_thread),
    ],
)
def test_it_leaves_nothing_behind(
    owner: Any, name: str, fail: Callable[..., Never], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self.pid)

    with nothing_stays_open(), monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", Popen)
        patched.setattr(owner, name, fail)
        with pytest.raises(EngineLoadError, match=r"cannot be started: .*(Too many|new thread)"):
            start()
    assert len(started) == (name in ("pidfd_open", "start"))
    for pid in started:  # it has ended, and is no zombie
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("what", ["process", "engine"])
def test_too_few_descriptors(what: str) -> None:
    """Starts fail with the reason, until there are enough."""
    started = start()  # its imports need descriptors, too
    started.kill()
    started.close()
    numbers = {int(number) for number, _ in opened()}
    most = min(set(range(1000)) - numbers)
    while not starts(what, most):
        most += 1


def starts(what: str, most: int) -> bool:
    """Start with this number of descriptors; return False if they are too few. Nothing stays open."""
    engine = ProcessEngine("os:getcwd", 0, ".", 0, Batching("on"), name="model")
    with nothing_stays_open(), contextlib.closing(engine):
        try:
            with most_files(most):
                if what == "engine":
                    engine.open()
                started = start()
        except EngineLoadError as error:
            return "Too many open files" not in str(error)  # the process was started, which has no such model
        started.kill()
        started.close()
        return True


def test_memory_that_cannot_be_made_or_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_stays_open():
        with monkeypatch.context() as patched:
            patched.setattr(os, "ftruncate", no_more)
            with pytest.raises(OSError, match="Too many"):
                create("some", 1)
        for end in (SlabReader, SlabWriter):
            with pytest.raises(ValueError, match="empty file"):
                end(os.memfd_create("empty"))
