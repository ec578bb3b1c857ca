"""Functions for a process of their own, which imports this module."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from cobatch import batched


class TwoPartsError(Exception):
    """One that is pickled, but not made again: it takes two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


@batched(run_in="process", max_batch_size=8)
def work(items: list[Any]) -> list[Any]:
    """Return each item with the number of the process, but for some words."""
    for item in items:
        match item:
            case "raise":
                raise ValueError("bad")
            case "two":
                raise TwoPartsError("very", "bad")
            case "exit":
                os._exit(3)
            case "wait":
                threading.Event().wait()
            case "result":
                return [lambda: None]
    return [(item, os.getpid()) for item in items]


def doubling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Double what a function on lists returns; return a coroutine function unchanged."""

    @functools.wraps(function)
    def doubled(items: Any) -> Any:
        results = function(items)
        return [result * 2 for result in results] if isinstance(results, list) else results

    return doubled


@doubling
def twice(items: list[int]) -> list[int]:
    """Return the items, which the decorator doubles."""
    return items


@batched(run_in="process")
@doubling
def outer(items: list[int]) -> list[int]:
    """Return the items, which the decorator doubles."""
    return items


@doubling
@batched(run_in="process")
@doubling
def inner(items: list[int]) -> list[int]:
    """Return the items, which one decorator doubles; the other one sees the batched function."""
    return items


@batched(run_in="process", stack=True)
def double(rows: NDArray[Any]) -> NDArray[Any]:
    """Return twice the rows."""
    return rows * 2


@batched(run_in="process", execution_timeout_ms=200)
def hang(items: list[int]) -> list[int]:
    """Return the process's number for each item; 0 never ends."""
    if 0 in items:
        threading.Event().wait()
    return [os.getpid() for _ in items]
