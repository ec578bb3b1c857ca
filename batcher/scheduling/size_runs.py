"""The last runs of one range of batch sizes, and the run times predicted from them.

The expected time is their median; while they are few and vary, it lies between that and the warm-up's time,
as the machine is now. The logarithm of a median of n runs has the variance pi/2 s^2/n, with s the standard
deviation of theirs; that of the warm-up's has `SEED_DOUBT`^2. Each counts by its precision (shrinkage: Efron
and Morris, JASA 1975): otherwise a size of three runs, of which two were slow by chance, would not be used
again. The time to plan a deadline with is the one with the largest ratio of runs within it to its length: a
longer one makes batches smaller, a shorter one makes more of them late. In the sure time nine of ten runs
end.
"""

from collections import deque
from math import inf, log, pi

from cobatch.batcher.scheduling import tuning

# Of a normal distribution: the distance of its quartiles in standard deviations, and the variance of the
# median of n samples in that of a sample divided by n.
QUARTILES = 1.349
MEDIAN_VARIANCE = pi / 2


class SizeRuns:
    """The runs of one range of sizes, seeded by the warm-up. `rows` is their mean size."""

    __slots__ = (
        "count", "excess_s", "excess_s2", "expected_s", "known", "median_s", "new", "observed", "planned_s",
        "rows", "runs", "seed_rows", "seed_s", "spread", "stale_s", "sure_s",
    )  # fmt: skip

    def __init__(self, rows: int, seed_s: float | None = None) -> None:
        self.count = 0  # runs
        self.new = 0  # of them since the last look
        # The sums of what runs took beyond the expected time and of its squares, and the number of runs,
        # older ones counting less.
        self.excess_s = self.excess_s2 = self.known = 0.0
        self.rows = float(rows)
        self.seed_rows = rows
        self.seed_s = seed_s
        self.stale_s = tuning.STALE_S
        self.observed = False
        self.spread = 0.0
        self.median_s = self.expected_s = self.planned_s = self.sure_s = seed_s or 0.0
        self.runs: deque[tuple[float, int, float]] = deque(maxlen=tuning.RUNS_KEPT)  # when, rows, seconds
        self._sow()

    def _sow(self) -> None:
        if self.seed_s is not None:
            # Twice, so that one run that was held up does not make the size look bad.
            self.runs.extend([(-inf, self.seed_rows, self.seed_s)] * 2)

    def forget(self) -> None:
        """Return to the warm-up's measurement, if there is one."""
        if self.seed_s is not None:
            self.observed = False
            self.excess_s = self.excess_s2 = self.known = 0.0
            self.count = self.new = 0
            self.stale_s = min(2 * self.stale_s, tuning.MOST_STALE_S)
            self.rows = float(self.seed_rows)
            self.runs.clear()
            self._sow()

    def predict(self, foretold_s: float, spread: float) -> None:
        """Move the predicted times towards `foretold_s`, the warm-up's time as the machine is now.

        `spread`: the standard deviation of a run's logarithm. Without runs they are all `foretold_s`.
        """
        if not self.observed:
            self.expected_s = self.planned_s = self.sure_s = foretold_s
            return
        noise = MEDIAN_VARIANCE * (spread / tuning.SEED_DOUBT) ** 2
        foretold = noise / (noise + len(self.runs))
        expected_s = self.median_s * (foretold_s / self.median_s) ** foretold
        self.planned_s *= expected_s / self.expected_s
        self.sure_s *= expected_s / self.expected_s
        self.expected_s = expected_s

    def learn(self, now_s: float, more_row_s: float) -> list[float]:
        """Take in new runs; `more_row_s` is the cost of one more row at about this size.

        Return the excess over the expected time of new runs, but for the last ones: they may be the first
        ones after a change.
        """
        runs, recent = self.runs, tuning.RUNS_RECENT
        self.observed = True
        while len(runs) > tuning.ALWAYS_KEPT and runs[0][0] < now_s - tuning.MEMORY_S:
            runs.popleft()
        times = self._times_s(more_row_s)
        earlier, last = sorted(times[:-recent]), sorted(times[-recent:])
        quarter = len(earlier) // 4
        if len(earlier) >= recent and not earlier[quarter] <= last[recent // 2] <= earlier[-1 - quarter]:
            # No chance result: what ran before ran under other circumstances.
            for _ in earlier:
                runs.popleft()
            times = self._times_s(more_row_s)
            earlier, last = [], sorted(times)
        ascending = sorted(earlier + last)
        count = len(ascending)
        self.median_s = self.expected_s = expected_s = ascending[count // 2]
        self.spread = log(ascending[3 * count // 4] / ascending[count // 4]) / QUARTILES
        self.planned_s = time_to_plan_s(ascending)
        self.sure_s = max(self.planned_s, ascending[int((count - 1) * tuning.SURE)])
        end = max(0, count - recent)
        begin = max(end - self.new, count - self.count, 0)
        self.new = 0
        return [time_s - expected_s for time_s in times[begin:end]]

    def _times_s(self, more_row_s: float) -> list[float]:
        """Return the runs' times at their mean size. Otherwise the larger ones would be the slow ones, and
        the median of the times would not belong to the mean of the rows."""
        runs, first = self.runs, self.runs[0][1]
        if all(run[1] == first for run in runs):
            self.rows = float(first)
            return [run[2] for run in runs]
        self.rows = mean = sum([run[1] for run in runs]) / len(runs)
        # A larger run is never scaled below its proportional part: a run of no rows costs at least nothing.
        return [max(s + (mean - rows) * more_row_s, s * min(1.0, mean / rows)) for _, rows, s in runs]


def time_to_plan_s(times_s: list[float]) -> float:
    """Return, of ascending measured times from the median on, the one with the most runs for its length."""
    half = len(times_s) // 2
    worth = [number / (time_s + 1e-9) for number, time_s in enumerate(times_s[half:], half + 1)]
    return times_s[half + worth.index(max(worth))]
