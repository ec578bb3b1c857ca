"""Measuring a latency profile: the sizes, and the tail of the run times."""

import json
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from cobatch.batcher.simulator.bound import capacity
from cobatch.batcher.simulator.engine import Profile, included, load_profile
from cobatch.batcher.simulator.measure import measure, noise_of
from cobatch.engines.base import Engine, Signature

RUN_S = 20e-6
OUTLIER_S = 0.050


class Clocked:
    """An engine whose runs take `RUN_S` for each row on its own clock; some runs take `OUTLIER_S` more."""

    platform = "fake"
    signature = Signature(inputs=(), outputs=(), fixed_batch=None)

    def __init__(self, max_batch_size: int, slow: set[int]) -> None:
        self.max_batch_size = max_batch_size
        self.now_s = 0.0
        self._number = count()
        self._slow = slow

    def inputs(self, *_: Any) -> tuple[()]:
        return ()

    def enqueue(self, slot: int, rows: int, row_shapes: Any) -> None:
        self.now_s += RUN_S * rows + OUTLIER_S * (next(self._number) in self._slow)

    def wait(self, slot: int) -> None:
        pass


def measured(seconds: float, *slow: int, max_batch_size: int = 4) -> Profile:
    engine = Clocked(max_batch_size, set(slow))
    return measure(cast("Engine", engine), "fake", seconds, lambda: engine.now_s)


@pytest.mark.parametrize("seconds", [0.06, 0.5, 2.0])
def test_one_slow_run_counts_as_one(seconds: float, tmp_path: Path) -> None:
    quiet = measured(seconds)
    # The sizes are 1, 2, 3 and 4 in turn; the first round is not counted.
    noisy = measured(seconds + OUTLIER_S, 4 * 10 + 3)
    runs = round(seconds / (10 * RUN_S))
    assert quiet.mean_s(4) == pytest.approx(4 * RUN_S)
    assert noisy.quantile_s(4, 0.98) == pytest.approx(4 * RUN_S)
    # At most the part that it really adds to the mean.
    assert noisy.mean_s(4) <= 4 * RUN_S + 1.1 * OUTLIER_S / runs
    assert noisy.mean_s(4) > 4 * RUN_S
    file = tmp_path / "noisy.json"
    file.write_text(json.dumps(noisy.as_json()))
    assert load_profile(str(file)).mean_s(4) == pytest.approx(noisy.mean_s(4), rel=1e-3)
    assert capacity(noisy, 4, None)[0] >= capacity(quiet, 4, None)[0] / (1.1 + OUTLIER_S / runs / (4 * RUN_S))


def test_few_runs_keep_their_quantiles() -> None:
    profile = measured(0.0)
    assert list(profile.runs) == [1, 2, 3, 4]
    levels = list(profile.runs[1])
    assert levels == sorted(levels)
    assert np.allclose([profile.quantile_s(3, level) for level in levels], 3 * RUN_S)


def test_a_noisy_profile_is_called_noisy() -> None:
    assert all(noise_of(load_profile(name)) is None for name in included())
    us = {0.0: 36.0, 0.5: 40.0, 0.95: 60.0, 0.99: 7_700.0, 1.0: 9_000.0}
    noise = noise_of(Profile("busy", {1: us | {0.99: 60.0, 1.0: 60.0}, 2: us}))
    assert noise is not None
    assert "with 2 rows" in noise
    assert "0.04 ms in the median" in noise
    assert "7.7 ms at the 99th" in noise
