"""Restore the places of modules, which models loaded here add to."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def module_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a copy of `sys.path`."""
    monkeypatch.setattr(sys, "path", sys.path[:])
