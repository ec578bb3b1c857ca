"""Settings of all tests: hypothesis judges answers, never how long they took; Ctrl-C is not ignored."""

import gc
import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings

from tests.support.examples import FACTOR

settings.register_profile(
    "cobatch", max_examples=50 * FACTOR, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("cobatch")
# A shell starts a background command with SIGINT ignored, and the processes of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Otherwise each worker and each process that a test starts compiles every module of the repository again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no worker ends long after the others."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Exclude modules and tests from garbage collection, which would otherwise visit them again and again."""
    gc.collect()
    gc.freeze()
