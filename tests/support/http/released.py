"""Objects that must go when their last reference does, without the garbage collector."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any, TypeVar

T = TypeVar("T")


class Released:
    """Objects under watch. One that is in a reference cycle is alive at the end, or goes in a collection."""

    def __init__(self) -> None:
        self._alive: set[weakref.ref[Any]] = set()
        self._collected = 0
        self._collector: int | None = None  # the thread that collects now

    def watch(self, thing: T) -> T:
        """Watch an object; return it."""
        if self._on_collection not in gc.callbacks:
            gc.callbacks.append(self._on_collection)
        self._alive.add(weakref.ref(thing, self._gone))
        return thing

    def check(self) -> None:
        """Check that all are gone, none by a collection."""
        if self._on_collection in gc.callbacks:
            gc.callbacks.remove(self._on_collection)
        left = [ref() for ref in self._alive]
        assert not left, f"{len(left)} are left, such as {left[0]!r}"
        assert not self._collected, f"{self._collected} were in a reference cycle"

    def _on_collection(self, phase: str, _: dict[str, int]) -> None:
        self._collector = threading.get_ident() if phase == "start" else None

    def _gone(self, ref: weakref.ref[Any]) -> None:
        self._alive.discard(ref)
        # Another thread may run between a collection and the calls that tell of its start and end.
        self._collected += self._collector == threading.get_ident()
