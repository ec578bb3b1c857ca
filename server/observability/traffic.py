"""Counts of one model's inference requests. Always on, so an answer with rows costs one appended element."""

from __future__ import annotations

from collections import Counter

from cobatch.batcher.durations import PENDING_LIMIT, DurationHistogram

# The status of a request whose client disconnected before the response (nginx's number), and its kind.
LEFT = 499
LEFT_SLUG = "client-left"


class Traffic:
    """Inference requests for one model.

    `durations`: of answers with rows, in seconds from complete headers until the response was written.
    `problems`: all other answers, by status and kind of problem.
    """

    __slots__ = ("durations", "problems")

    def __init__(self) -> None:
        self.durations = DurationHistogram()
        self.problems: Counter[tuple[int, str]] = Counter()

    def count(self, status: int, slug: str, duration_s: float) -> None:
        if status == 200:
            self.count_alike(1, duration_s)
        else:
            self.problems[status, slug] += 1

    def count_alike(self, answers: int, duration_s: float) -> None:
        """Count answers with rows that were given together."""
        values = self.durations.values
        values += [duration_s] * answers
        if len(values) >= PENDING_LIMIT:
            self.durations.count_in()

    def plus(self, other: Traffic) -> Traffic:
        """Return the sum of both."""
        both = Traffic()
        both.durations = self.durations.plus(other.durations)
        both.problems = self.problems + other.problems
        return both
