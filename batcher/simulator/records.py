"""What came of each request."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cobatch.batcher.errors import ExpiredError

if TYPE_CHECKING:
    from cobatch.batcher.simulator.clock import VirtualLoop
    from cobatch.batcher.simulator.traffic import SimulatedRequest

ANSWERED, EXPIRED, FAILED, REFUSED = range(4)


class Records:
    """One entry for each request that was answered, given up, or refused; `came` counts those that came.

    The loop is busy for `each_s` with each that comes, and with each that is answered. Latency counts from
    when it should have come.
    """

    def __init__(self, loop: VirtualLoop, each_s: float = 0.0) -> None:
        self._loop = loop
        self._each_s = each_s
        self.came = 0
        self.refusals: Counter[str] = Counter()
        # Told of each end, and whether the request had been accepted.
        self.on_end: Callable[[SimulatedRequest, bool], None] | None = None
        self._ends = array("d")
        self._latencies = array("d")
        self._callers = array("H")
        self._rows = array("H")
        self._fates = array("B")

    def comes(self, request: SimulatedRequest) -> None:
        """It is read, and is about to be submitted."""
        self.came += 1
        request.came_s = self._loop.due_s
        self._loop.spend(self._each_s)

    def done(self, request: SimulatedRequest) -> None:
        """It has its answer, or an error instead."""
        error = request.error
        fate = ANSWERED if error is None else EXPIRED if isinstance(error, ExpiredError) else FAILED
        self._add(request, fate)

    def refused(self, request: SimulatedRequest, why: str) -> None:
        """It was not accepted."""
        self.refusals[why] += 1
        self._add(request, REFUSED)

    def _add(self, request: SimulatedRequest, fate: int) -> None:
        self._loop.spend(self._each_s)
        now_s = self._loop.now_s
        self._ends.append(now_s)
        self._latencies.append(now_s - request.came_s)
        self._callers.append(request.caller)
        self._rows.append(request.rows)
        self._fates.append(fate)
        if self.on_end is not None:
            self.on_end(request, fate != REFUSED)

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """`ends`, `latencies` in seconds, `callers`, `rows`, `fates`."""
        return {
            "ends": np.array(self._ends),
            "latencies": np.array(self._latencies),
            "callers": np.array(self._callers),
            "rows": np.array(self._rows),
            "fates": np.array(self._fates),
        }
