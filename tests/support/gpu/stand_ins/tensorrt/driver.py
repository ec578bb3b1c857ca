"""The fake driver's functions for the stand-ins: allocations, kernels, broken rules."""

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
    """Return this process's libcuda, which must be the fake one."""
    fake = ctypes.CDLL("libcuda.so.1")
    fake.fakeRoom.restype = ctypes.c_size_t
    fake.fakeRoom.argtypes = [ctypes.c_uint64]
    fake.fakeBytes.restype = ctypes.c_void_p
    fake.fakeBytes.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
    fake.fakeGeneration.restype = ctypes.c_uint64
    fake.cuMemAlloc_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t]
    fake.cuMemFree_v2.argtypes = [ctypes.c_uint64]
    fake.fakeIsCapturing.argtypes = [ctypes.c_void_p]
    fake.cuStreamSynchronize.argtypes = [ctypes.c_void_p]
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
    """Report a broken rule to the test."""
    library().fakeViolate(f"tensorrt: {text}".encode())


def has_context() -> bool:
    """Return True if a live CUDA context is current on this thread."""
    return bool(library().fakeCurrentDevice() >= 0)


def words(code: int) -> str:
    """Return the driver's name of an error."""
    text = ctypes.c_char_p()
    library().cuGetErrorString(code, ctypes.byref(text))
    return (text.value or b"unknown error").decode()


def room(address: int) -> int:
    """Return the bytes from a device address to its allocation's end; 0 if invalid or freed."""
    return int(library().fakeRoom(address))


def host_address(address: int, size: int) -> int:
    """Return the host address of a live device range; 0 if it is invalid."""
    return int(library().fakeBytes(address, size) or 0)


def is_capturing(stream: int) -> bool:
    """Return True if a stream is being captured."""
    return bool(library().fakeIsCapturing(stream))


def synchronize(stream: int) -> int:
    """Wait for a stream; return the driver's error code."""
    return int(library().cuStreamSynchronize(stream))


class Owned:
    """An object of TensorRT that owns device memory and belongs to one thread."""

    def __init__(self, size: int) -> None:
        """Allocate the memory. Raises MemoryError."""
        self._address = 0
        self._thread = threading.get_ident()
        self._generation = library().fakeGeneration()
        address = ctypes.c_uint64()
        if size and library().cuMemAlloc_v2(ctypes.byref(address), size):
            raise MemoryError(size)
        self._address = address.value

    def on_its_thread(self, what: str) -> bool:
        """Return True on the thread that created it; else report a broken rule."""
        if threading.get_ident() == self._thread:
            return True
        violate(f"{what}: {type(self).__name__} belongs to another thread")
        return False

    def __del__(self) -> None:
        # After a reset the memory and the test are gone.
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
    """Drop the kernels of graphs from before the last reset."""
    global _generation  # noqa: PLW0603 - of the process, as the driver is
    if _generation != (now := library().fakeGeneration()):
        _generation = now
        _kernels.clear()


# Reasons of failed kernels, newest last, for debugging a test: a GPU does not tell them.
failures: list[str] = []
_run_in_c = _KERNEL(_run)


def enqueue(
    stream: int, work: Callable[[], None], ranges: Sequence[tuple[int, int]], *, captured: bool
) -> int:
    """Queue `work`, which uses these device ranges (address, size); return the driver's error code."""
    _forget_old()
    number = next(_numbers)
    # A captured kernel runs at each launch of its graph.
    _kernels[number] = (work, not captured)
    count = len(ranges)
    addresses = (ctypes.c_uint64 * count)(*(address for address, _ in ranges))
    sizes = (ctypes.c_size_t * count)(*(size for _, size in ranges))
    code = int(library().enqueueV3(stream, _run_in_c, number, count, addresses, sizes))
    if code:
        _kernels.pop(number, None)
    return code
