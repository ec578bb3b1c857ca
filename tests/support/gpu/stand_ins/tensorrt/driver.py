"""The fake driver as the stand-ins call it: allocations, kernels, and who broke which rule."""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

_KERNEL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)
LAUNCH_FAILED = 719
ALIGNMENT = 256


@functools.cache
def library() -> Any:
    """libcuda as this process has it, which must be the fake one."""
    fake = ctypes.CDLL("libcuda.so.1")
    fake.fakeRoom.restype = ctypes.c_size_t
    fake.fakeRoom.argtypes = [ctypes.c_uint64]
    fake.fakeBytes.restype = ctypes.c_void_p
    fake.fakeBytes.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
    fake.fakeGeneration.restype = ctypes.c_uint64
    fake.cuMemAlloc_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t]
    fake.cuMemFree_v2.argtypes = [ctypes.c_uint64]
    fake.fakeIsCapturing.argtypes = [ctypes.c_void_p]
    fake.enqueueV3.argtypes = [
        ctypes.c_void_p,
        _KERNEL,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    return fake


def violate(text: str) -> None:
    """Keep a broken rule for the test."""
    library().fakeViolate(f"tensorrt: {text}".encode())


def has_context() -> bool:
    """Whether a live CUDA context is current on this thread."""
    return bool(library().fakeCurrentDevice() >= 0)


def words(code: int) -> str:
    """The driver's own for an error."""
    text = ctypes.c_char_p()
    library().cuGetErrorString(code, ctypes.byref(text))
    return (text.value or b"unknown error").decode()


def room(address: int) -> int:
    """Bytes from a device address to its allocation's end; 0 where there is none, or it was freed."""
    return int(library().fakeRoom(address))


def host_address(address: int, size: int) -> int:
    """Where the bytes of a live device range really are; 0 where it is none."""
    return int(library().fakeBytes(address, size) or 0)


def is_capturing(stream: int) -> bool:
    """Whether a stream is being captured."""
    return bool(library().fakeIsCapturing(stream))


class Owned:
    """An object of TensorRT's that owns device memory, and the thread that it must stay on."""

    def __init__(self, size: int) -> None:
        """Raises MemoryError."""
        self._address = 0
        self._thread = threading.get_ident()
        self._generation = library().fakeGeneration()
        address = ctypes.c_uint64()
        if size and library().cuMemAlloc_v2(ctypes.byref(address), size):
            raise MemoryError(size)
        self._address = address.value

    def on_its_thread(self, what: str) -> bool:
        """Whether the caller is the thread that made it; else a rule is broken."""
        if threading.get_ident() == self._thread:
            return True
        violate(f"{what}: {type(self).__name__} belongs to another thread")
        return False

    def __del__(self) -> None:
        # After a reset the memory is gone, and with it the test that this would be told to.
        if not self._address or self._generation != library().fakeGeneration():
            return
        if threading.get_ident() != self._thread:
            violate(f"{type(self).__name__} is freed on another thread than its own")
        elif not has_context():
            violate(f"{type(self).__name__} is freed without its CUDA context")
        else:
            library().cuMemFree_v2(self._address)


_numbers = itertools.count(1)
_kernels: dict[int, tuple[Callable[[], None], bool]] = {}


def _run(number: int) -> int:
    work, once = _kernels[number]
    if once:
        del _kernels[number]
    try:
        work()
    except Exception as error:  # noqa: BLE001 - a kernel that fails spoils its context, whatever it is
        failures.append(f"{type(error).__name__}: {error}")
        return LAUNCH_FAILED
    return 0


_generation = 0


def _forget_old() -> None:
    """Kernels of graphs that were there before the last reset."""
    global _generation  # noqa: PLW0603 - of the process, as the driver is
    if _generation != (now := library().fakeGeneration()):
        _generation = now
        _kernels.clear()


# Why kernels failed, newest last: what a person who debugs a test wants to know, and a GPU doesn't tell.
failures: list[str] = []
_run_in_c = _KERNEL(_run)


def enqueue(
    stream: int, work: Callable[[], None], ranges: Sequence[tuple[int, int]], *, captured: bool
) -> int:
    """Queue `work`, which uses these device ranges (address, size); the driver's error code, 0 for none."""
    _forget_old()
    number = next(_numbers)
    # A captured kernel runs as often as its graph is launched.
    _kernels[number] = (work, not captured)
    count = len(ranges)
    addresses = (ctypes.c_uint64 * count)(*(address for address, _ in ranges))
    sizes = (ctypes.c_size_t * count)(*(size for _, size in ranges))
    code = int(library().enqueueV3(stream, _run_in_c, number, count, addresses, sizes))
    if code:
        _kernels.pop(number, None)
    return code
