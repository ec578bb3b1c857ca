"""How it goes, while it goes: on stderr, so that stdout holds the report alone."""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cobatch.server.console import plain_table
from cobatch.server.loadtest.histogram import Histogram
from cobatch.server.loadtest.intervals import Interval
from cobatch.server.loadtest.report import per_s
from cobatch.server.loadtest.tally import Tally

_RECENT_S = 1.0
_LINE_S = 5.0  # where there is no terminal, a line now and then
_KINDS = 5


class Progress:
    """Shows a tally on a terminal, as it grows; a context manager. `quiet`: nothing is shown."""

    def __init__(self, quiet: bool, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._live: Live | None = None
        self._line_s = 0.0
        if self._console.is_terminal and not quiet:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._console.print(Text(text), soft_wrap=True)

    def look(self, what: str, tally: Tally) -> None:
        """Show how it is."""
        since_s = tally.elapsed_s
        recent, recent_s = _recent(tally, since_s)
        if self._live is not None:
            self._live.update(_view(what, tally, since_s, recent, recent_s), refresh=True)
        elif monotonic() >= self._line_s and since_s >= _RECENT_S:
            self._line_s = monotonic() + _LINE_S
            self.say(_line(what, since_s, recent, recent_s))


def _recent(tally: Tally, since_s: float) -> tuple[Interval, float]:
    """What happened in the last second, as far as it is told, and how long that is."""
    each_s = tally.recent.each_s
    # Samples are told ten times a second: of the last two intervals not all is known.
    last = int(since_s / each_s) - 1
    numbers = range(max(0, last - round(_RECENT_S / each_s)), max(0, last))
    return tally.recent.sum(numbers), max(len(numbers), 1) * each_s


def _line(what: str, since_s: float, one: Interval, seconds: float) -> str:
    failed = sum(one.errors.values())
    return (
        f"{what} {since_s:5.1f} s: {per_s(one.due / seconds)} offered, "
        f"{per_s(one.answered / seconds)} answered, p50 {_ms(one.latency, 0.5)} ms, "
        f"p99 {_ms(one.latency, 0.99)} ms, {failed:,} failed"
    )


def _view(what: str, tally: Tally, since_s: float, recent: Interval, recent_s: float) -> Group:
    table = plain_table(
        "", "offered/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "max ms", "batch", no_wrap=True
    )
    total = tally.total
    whole = Interval(total.due, total.latency, total.errors, total.answered)
    whole_s = max(1e-9, min(since_s, tally.trial.lasts_s) - tally.trial.warmup_s)
    for name, figures, seconds in (("last second", recent, recent_s), ("all", whole, whole_s)):
        table.add_row(
            name,
            f"{figures.due / seconds:,.0f}",
            f"{figures.answered / seconds:,.0f}",
            *(_ms(figures.latency, part) for part in (0.5, 0.9, 0.99)),
            f"{figures.latency.most_us / 1000:,.2f}",
            f"{figures.rows / figures.with_rows:.1f}" if figures.with_rows else "",
        )
    waiting = sum(pulse.open_requests for pulse in tally.pulses.values())
    cpu = ", ".join(f"{tally.pulses[number].cpu_share:.0%}" for number in sorted(tally.pulses))
    phase = " (warm-up)" if since_s < tally.trial.warmup_s else ""
    if since_s > tally.trial.lasts_s:
        phase = " (waiting for the last answers)"
    head = Text(f"{what}: {max(0.0, since_s):.1f} of {tally.trial.lasts_s:.1f} s{phase}", "bold")
    foot = [Text(f"{waiting:,} under way, generator's CPU {cpu or '-'}")]
    foot += [Text(f"{count:,} x {kind}", "red") for kind, count in total.errors.most_common(_KINDS)]
    return Group(head, table, *foot)


def _ms(of: Histogram, part: float) -> str:
    return f"{of.quantile_us(part) / 1000:,.2f}"
