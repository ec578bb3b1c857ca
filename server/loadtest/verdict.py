"""Whether the generator, and not the server, set the limit: what a report must say of itself."""

from __future__ import annotations

from cobatch.server.loadtest.tally import Tally

_BUSY = 0.9  # of a core: there is no more in one process, which has one thread
_MACHINE_BUSY = 0.95
_LATE_PART = 0.1  # of the latency's p99
_LATE_LEAST_US = 500.0
_LATE_LEAST = 10  # so many: one that the machine woke late says nothing of 100
_IDLE = 0.5  # of a core: who used less was not what did not keep up
_WAITED_PART = 0.01


def limits(tally: Tally) -> list[str]:
    """Why the figures are the generator's rather than the server's; nothing where they are not."""
    found = []
    processes = len(tally.done)
    busy = max((one.cpu_s / one.took_s for one in tally.done.values() if one.took_s), default=0.0)
    if busy >= _BUSY:
        found.append(
            f"a generator's process used {busy:.0%} of a core: give it more than {processes} (--processes)"
        )
    late_us, latency_us = tally.late.quantile_us(0.99), tally.total.latency.quantile_us(0.99)
    bound_us = max(_LATE_LEAST_US, _LATE_PART * latency_us)
    if late_us > bound_us and tally.late.over(bound_us) >= _LATE_LEAST:
        why = "it did not keep up"
        if busy < _IDLE:
            why = f"the machine did not let it run in time (it used {busy:.0%} of a core)"
        found.append(
            f"1 of 100 requests was sent {late_us / 1000:.2f} ms late or more, beside a p99 of "
            f"{latency_us / 1000:.2f} ms: {why}"
        )
    return found


def notes(tally: Tally, local: bool) -> list[str]:
    """What is to be known beside the figures, though they are the server's."""
    found = []
    due = sum(one.due for one in tally.callers)
    if tally.waited > _WAITED_PART * due:
        found.append(
            f"{tally.waited / due:.1%} of the requests waited for a connection to be free or opened, which "
            f"is in their latency (--connections: {tally.trial.connections})"
        )
    if local and tally.machine_busy is not None and tally.machine_busy >= _MACHINE_BUSY:
        found.append(
            "all cores of this machine were busy, with the generator, the server and whatever else runs "
            "here; on a machine of its own the server would do better"
        )
    p99_of = tally.total.latency.count
    if 0 < p99_of < 1000:
        found.append(f"{p99_of} answers are few: p99 is told by the slowest {max(1, p99_of // 100)}")
    return found
