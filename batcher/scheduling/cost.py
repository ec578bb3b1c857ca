"""Which batch size is worth growing to, from measured run times.

On a GPU and on wide CPU models a row gets cheaper the more rows share a run; on others (Magika on
one core: 10 ms for one row, 84 ms for eight) it does not, and a larger batch only makes everyone
wait for everyone. Clipper (Crankshaw et al., NSDI 2017) searches for the size by additive increase;
here the sizes were already timed by the warm-up, so it can be read off.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

# What a batch costs beside the engine's run: waking the worker, the callback, taking a slot. Counted
# in so that a model whose own run is almost free is still batched as far as it goes.
BATCH_OVERHEAD_US = 100.0
# A size counts as good enough when a row costs at most this many times the best size's.
NEAR_BEST = 1.03
# The same while requests are lost for want of the engine's time: then rows per second are all that counts.
NEAR_BEST_CROWDED = 1.003


def efficient_rows(run_us: Mapping[int, float], max_batch_size: int, near: float = NEAR_BEST) -> int:
    """Smallest batch size at which a row is about as cheap as it gets: at most `near` times that.

    `run_us` maps rows to the microseconds of one run. Nothing measured: `max_batch_size`.
    """
    per_row = _per_row({rows: us for rows, us in run_us.items() if rows <= max_batch_size})
    if not per_row:
        return max_batch_size
    good = min(per_row.values()) * near
    return min(rows for rows, us in per_row.items() if us <= good)


def cost_over_best(run_us: Mapping[int, float], rows: int) -> float:
    """How many times the best size's cost a row has at this size; infinite where that was not measured."""
    per_row = _per_row(run_us)
    return per_row[rows] / min(per_row.values()) if rows in per_row else inf


def _per_row(run_us: Mapping[int, float]) -> dict[int, float]:
    return {rows: (us + BATCH_OVERHEAD_US) / rows for rows, us in run_us.items()}
