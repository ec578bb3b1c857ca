"""The cores that a container's control groups allow, and the number of processes for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cobatch.server.settings import schema
from cobatch.server.settings.cgroups import cores
from cobatch.server.settings.schema import ServerSettings


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process run on 32 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32))


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ("max 100000", "max 100000", 32),
        ("250000 100000", "max 100000", 2.5),
        ("max 100000", "400000 50000", 8),
    ],
)
def test_the_least_quota_of_all_groups_counts(
    tmp_path: Path, inner: str, outer: str, expected: float
) -> None:
    own = tmp_path / "own"
    own.write_text("0::/pods/pod\n")
    write(tmp_path / "fs" / "pods", cpu__max=outer)
    write(tmp_path / "fs" / "pods" / "pod", cpu__max=inner)
    assert cores(tmp_path / "fs", own) == expected


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(("quota", "expected"), [("-1", 32), ("300000", 3)])
def test_quotas_of_the_first_version_count(tmp_path: Path, quota: str, expected: float) -> None:
    own = tmp_path / "own"
    own.write_text("4:cpu,cpuacct:/docker/of-the-host\n")
    write(tmp_path / "fs" / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert cores(tmp_path / "fs", own) == expected


@pytest.mark.parametrize(
    ("available", "count"), [(0.5, 1), (1, 1), (2, 1), (2.5, 1), (3, 2), (4.9, 3), (17, 16), (64, 16)]
)
def test_auto_leaves_a_core_and_takes_sixteen_at_most(
    monkeypatch: pytest.MonkeyPatch, available: float, count: int
) -> None:
    monkeypatch.setattr(schema, "cores", lambda: available)
    assert ServerSettings(processes="auto").process_count == count
    assert ServerSettings(processes=5).process_count == 5
    assert ServerSettings().process_count == 1
