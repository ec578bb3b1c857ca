"""The benchmark of a model's process, with few batches."""

from __future__ import annotations

from unittest import mock

import pytest

from benchmarks.request_cost import process_boundary


def test_it_measures_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.multiple(process_boundary, _TURNS=1, _BATCHES=2):
        assert process_boundary.main() == 0
    printed = capsys.readouterr().out
    assert all(f" {width:,} " in printed for _, width in process_boundary.CASES)
