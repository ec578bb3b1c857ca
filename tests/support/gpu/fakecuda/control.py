"""Controls of the fake driver for tests: broken rules, calls, planted errors."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from pathlib import Path

# Errors that tests plant, with their numbers in cuda.h.
OUT_OF_MEMORY = 2
ILLEGAL_ADDRESS = 700
LAUNCH_FAILED = 719

_MODES = {"lazy": 0, "threaded": 1}
_VERSION = re.compile(r"_v\d+\Z")


class FakeCuda:
    """The only driver that is loaded in this process.

    A call's name may have its version or not: "cuMemAlloc", "cuMemAlloc_v2". Besides calls of the driver
    there are `enqueueV3`, by which TensorRT's stand-in queues its kernel, and the points at which queued work
    runs: `exec:htod`, `exec:kernel`, `exec:dtoh`, `exec:host`, `exec:record`, `exec:wait`.
    """

    def __init__(self, library: Path) -> None:
        # Global, so that PyCUDA finds its symbols and cuda-bindings finds the library by name.
        self._fake = fake = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for name in ("fakeViolation", "fakeCallName", "fakeKind"):
            getattr(fake, name).restype = ctypes.c_char_p
        fake.fakeCallCount.restype = ctypes.c_uint64
        fake.fakeMemory.argtypes = [ctypes.c_size_t]

    def reset(self) -> None:
        """Restore the state of a new process; no thread may use the driver meanwhile."""
        self._fake.fakeReset()

    def violations(self) -> list[str]:
        """Return the rules broken since `reset`: the call, and how."""
        return [self._fake.fakeViolation(index).decode() for index in range(self._fake.fakeViolations())]

    def inject(self, call: str, code: int, nth: int = 1, times: int = 1) -> None:
        """Make the nth next call return `code`, `times` times in a row.

        PyCUDA repeats a failed allocation once, after a run of Python's garbage collector. Sticky errors such
        as 700 and 719 make the context unusable; planted at `exec:...` they occur while work runs, and the
        next call returns them.
        """
        for _ in range(times):
            if not self._fake.fakeInject(call.encode(), code, nth):
                raise RuntimeError("too many errors are planted")

    def mode(self, mode: str) -> None:
        """Set the mode. "lazy": queued work runs in calls that wait; "threaded": each stream has a thread."""
        self._fake.fakeThreaded(_MODES[mode])

    def poison(self, byte: int) -> None:
        """Set the byte that new memory is filled with."""
        self._fake.fakePoison(byte)

    def memory(self, total: int) -> None:
        """Set the memory of each device; 1 GiB by default."""
        self._fake.fakeMemory(total)

    def live_objects(self) -> dict[str, int]:
        """Return the number of live objects by kind: contexts, streams, "device memory"; without zeros."""
        return self._by_kind(self._fake.fakeLive)

    def orphans(self) -> dict[str, int]:
        """Return the objects that were not freed before their context ended."""
        return self._by_kind(self._fake.fakeOrphans)

    def calls(self) -> Counter[str]:
        """Return the count of each call since `reset` or `forget_calls`, by name without version."""
        counts: Counter[str] = Counter()
        for call in range(self._fake.fakeCalls()):
            if count := self._fake.fakeCallCount(call):
                counts[_VERSION.sub("", self._fake.fakeCallName(call).decode())] += count
        return counts

    def forget_calls(self) -> None:
        """Reset the counts of calls."""
        self._fake.fakeForgetCalls()

    def _by_kind(self, count: ctypes._NamedFuncPointer) -> dict[str, int]:
        counts = {}
        kind = 0
        while (name := self._fake.fakeKind(kind)) is not None:
            if number := count(kind):
                counts[name.decode()] = number
            kind += 1
        return counts
