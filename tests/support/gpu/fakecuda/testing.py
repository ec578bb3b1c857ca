"""Helpers of the fake driver's own tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest


def in_thread(work: Callable[[], Any]) -> Any:
    """Run a function on a new thread; return its result or raise its error."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised again below
            outcome.extend((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def broke(fake: Any, *expected: str) -> None:
    """Check that exactly these rules were broken, in this order, each by a part of its text."""
    violations = fake.violations()
    if len(violations) != len(expected) or any(
        part not in text for part, text in zip(expected, violations, strict=True)
    ):
        pytest.fail(f"expected {list(expected)}, the fake tells {violations}")
