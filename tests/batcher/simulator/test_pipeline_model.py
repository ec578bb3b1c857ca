"""The utilisation of a GPU in virtual time, with the real batcher and the real worker.

A slot is packed, copied in, run, copied out, noticed and delivered, and then packed again. So with n slots a
batch ends every

    max(run, copy in, copy out, pack + deliver, (pack + copy in + run + copy out + deliver + turnaround) / n)

and with two slots the GPU is never idle while packing, delivery, copies and turnaround together take no
longer than a run.

Callers send their next request as soon as they are answered, so a full batch is always queued. The turnaround
in Python (noticing, handing over, enqueuing) is 90 us; it must not show while a batch can be enqueued during
a run.
"""

from __future__ import annotations

import pytest

from tests.support.gpu.pipeline import Times, simulate

RUN_S = 2e-3


def times(host_share: float, run_s: float = RUN_S, **more: float) -> Times:
    """Return times in which packing and delivery take this share of a run."""
    return Times(run_s, pack_s=host_share * run_s * 0.4, deliver_s=host_share * run_s * 0.6, **more)


def period(share: float, slots: int = 2, in_share: float = 0.0, out_share: float = 0.0) -> float:
    """Return the time from batch to batch in runs, by the formula above."""
    cycle = share + in_share + 1 + out_share + 90e-6 / RUN_S
    return max(1.0, in_share, out_share, share, cycle / slots)


@pytest.mark.parametrize(
    ("share", "run_s"),
    [(0.0, 0.5e-3), (0.6, 0.5e-3), (0.0, 2e-3), (0.3, 2e-3), (0.6, 2e-3), (0.8, 2e-3), (0.8, 20e-3)],
)
def test_with_two_slots_the_gpu_is_idle_less_than_a_twentieth(share: float, run_s: float) -> None:
    figures = simulate(times(share, run_s), seconds=min(1.0, 300 * run_s))
    assert figures.rows == 64
    assert figures.idle < 0.05


@pytest.mark.parametrize("run_s", [2e-3, 20e-3])
def test_it_is_so_until_packing_and_delivery_take_as_long_as_a_run(run_s: float) -> None:
    assert simulate(times(0.97, run_s), seconds=min(1.0, 300 * run_s)).idle < 0.05


@pytest.mark.parametrize("share", [1.2, 1.5, 2.0])
def test_beyond_that_the_loop_is_the_limit(share: float) -> None:
    # One thread packs and delivers: the GPU gets a batch each time that has taken.
    assert simulate(times(share)).idle == pytest.approx(1 - 1 / share, abs=0.01)


def test_a_third_slot_does_not_lift_that_limit() -> None:
    assert simulate(times(1.5), slots=3).idle == pytest.approx(1 - 1 / 1.5, abs=0.01)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_with_one_slot_all_steps_are_sequential(share: float) -> None:
    figures = simulate(times(share), slots=1)
    # Each run adds delivery, packing and the worker's turnaround.
    assert figures.idle == pytest.approx(1 - RUN_S / (RUN_S * (1 + share) + 90e-6), abs=0.01)


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize(
    ("share", "in_share", "out_share"),
    [(0.3, 0.3, 0.3), (0.3, 0.8, 0.4), (0.8, 0.8, 0.4), (0.3, 1.6, 0.0), (0.8, 0.1, 0.05)],
)
def test_copies_are_hidden_if_there_are_enough_slots(
    slots: int, share: float, in_share: float, out_share: float
) -> None:
    figures = simulate(times(share, in_s=in_share * RUN_S, out_s=out_share * RUN_S), slots=slots, callers=256)
    assert figures.idle == pytest.approx(1 - 1 / period(share, slots, in_share, out_share), abs=0.03)


def test_a_worker_that_enqueues_after_each_run_leaves_gaps() -> None:
    # The turnaround shows if the next batch is enqueued too late.
    late = simulate(times(0.5, 0.5e-3), asynchronous=False, seconds=0.2)
    assert late.idle == pytest.approx(1 - 0.5 / (0.5 + 0.06), abs=0.02)
    assert simulate(times(0.5, 0.5e-3), seconds=0.2).idle < 0.01


def test_too_few_callers_for_a_full_batch_wait_for_each_other() -> None:
    # All callers are in one batch and send again after it: meanwhile the queue is empty.
    figures = simulate(times(0.5), callers=32)
    assert figures.rows == pytest.approx(32, abs=1)
    assert 0.2 < figures.idle < 0.5
