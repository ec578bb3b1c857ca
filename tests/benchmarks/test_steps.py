"""The benchmark of steps: a hundredth of it."""

from benchmarks.link.steps import CALLERS, measure


async def test_every_column_is_measured() -> None:
    results = await measure(16, rounds=1, calls=64)
    assert list(results) == [str(callers) for callers in CALLERS]
    for row in results.values():
        assert all(value > 0 for value in row.values())
