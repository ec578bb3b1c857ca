"""Latency profiles made for tests."""

from cobatch.batcher.simulator.engine import Profile


def linear(name: str, fixed_us: float, row_us: float, max_rows: int) -> Profile:
    """Return a profile without noise: `fixed_us` for each run and `row_us` for each row."""
    return Profile(name, {rows: {0.5: fixed_us + row_us * rows} for rows in {1, max_rows}})
