"""The fake driver's controls, for tests: what broke a rule, what was called, what is to fail."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from pathlib import Path

# Errors that tests plant, by their number in cuda.h.
OUT_OF_MEMORY = 2
ILLEGAL_ADDRESS = 700
LAUNCH_FAILED = 719

_MODES = {"lazy": 0, "threaded": 1}
_VERSION = re.compile(r"_v\d+\Z")


class FakeCuda:
    """The driver that is loaded in this process; there is only one.

    A call's name may be given with or without its version: "cuMemAlloc", "cuMemAlloc_v2". Beside calls of
    the driver there are `enqueueV3`, which is TensorRT's stand-in queueing its kernel, and points where
    queued work runs: `exec:htod`, `exec:kernel`, `exec:dtoh`, `exec:host`, `exec:record`, `exec:wait`.
    """

    def __init__(self, library: Path) -> None:
        # Global, so that PyCUDA finds its symbols and cuda-bindings this library by its name.
        self._fake = fake = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for name in ("fakeViolation", "fakeCallName", "fakeKind"):
            getattr(fake, name).restype = ctypes.c_char_p
        fake.fakeCallCount.restype = ctypes.c_uint64
        fake.fakeMemory.argtypes = [ctypes.c_size_t]

    def reset(self) -> None:
        """As if the process had just started; no thread may still use the driver."""
        self._fake.fakeReset()

    def violations(self) -> list[str]:
        """Every rule that was broken since `reset`: the call, and how."""
        return [self._fake.fakeViolation(index).decode() for index in range(self._fake.fakeViolations())]

    def inject(self, call: str, code: int, nth: int = 1, times: int = 1) -> None:
        """The nth time that this call is made from now on it answers `code`, and so `times` times in a row.

        PyCUDA asks for memory a second time when there is none, after Python's garbage collector has run.

        700, 719 and their like spoil the context for good; planted at `exec:…` they do so while work runs,
        and the next call tells.
        """
        for _ in range(times):
            if not self._fake.fakeInject(call.encode(), code, nth):
                raise RuntimeError("too many errors are planted")

    def mode(self, mode: str) -> None:
        """ "lazy": queued work runs when somebody waits for it. "threaded": each stream runs by itself."""
        self._fake.fakeThreaded(_MODES[mode])

    def poison(self, byte: int) -> None:
        """What unwritten memory is filled with."""
        self._fake.fakePoison(byte)

    def memory(self, total: int) -> None:
        """How much memory each device has; 1 GiB until told."""
        self._fake.fakeMemory(total)

    def live_objects(self) -> dict[str, int]:
        """How many contexts, streams, events, "device memory", … are alive; without those that are none."""
        return self._by_kind(self._fake.fakeLive)

    def orphans(self) -> dict[str, int]:
        """What was still there when its context ended, and nobody had freed."""
        return self._by_kind(self._fake.fakeOrphans)

    def calls(self) -> Counter[str]:
        """How often each call was made since `reset` or `forget_calls`, without versions in the names."""
        found: Counter[str] = Counter()
        for call in range(self._fake.fakeCalls()):
            if count := self._fake.fakeCallCount(call):
                found[_VERSION.sub("", self._fake.fakeCallName(call).decode())] += count
        return found

    def forget_calls(self) -> None:
        """Count from nothing again."""
        self._fake.fakeForgetCalls()

    def _by_kind(self, count: ctypes._NamedFuncPointer) -> dict[str, int]:
        found = {}
        kind = 0
        while (name := self._fake.fakeKind(kind)) is not None:
            if number := count(kind):
                found[name.decode()] = number
            kind += 1
        return found
