"""The report of a load test: on the terminal, as JSON, and live on stderr while it runs."""

import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Self

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cobatch import __version__
from cobatch.server.console import plain_table, stdout
from cobatch.server.loadtest.capacity import Capacity
from cobatch.server.loadtest.options import Options
from cobatch.server.loadtest.results import Results, per_s
from cobatch.server.loadtest.statistics import Counts, LatencyHistogram, Tally, total
from cobatch.server.loadtest.target import Model

_TABLE_PERCENTILES = ("p50", "p90", "p99", "p99.9", "max")
_ERROR_KINDS = 12
_LIVE_ERROR_KINDS = 5
_LIVE_PERIOD_S = 1.0
_LINE_S = 5.0  # between two lines where stderr is no terminal
_LOAD_OPTIONS = (
    "rates", "arrivals", "connections", "processes", "seconds", "warmup_s", "timeout_s", "seed", "binary",
    "shapes", "values", "inputs", "expect", "slo_ms", "open_loop",
)  # fmt: skip
_TRIAL_FIELDS = ("rate", "violations", "p99_ms", "held", "confirms")


@dataclass
class Report:
    """Everything that a load test found."""

    options: Options
    model: Model
    results: list[Results] = field(default_factory=list)
    capacity: Capacity | None = None
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        """True if an answer was wrong, or no request was answered."""
        wrong = any("wrong answer" in results.total.errors for results in self.results)
        return wrong or not any(results.total.answered for results in self.results)

    @property
    def title(self) -> str:
        server = f" ({self.model.server})" if self.model.server else ""
        return f"{self.model.name} at {self.options.url}{server}"

    @property
    def load(self) -> str:
        options = self.options
        parts = ["binary" if options.binary else "JSON"]
        parts.append(f"open loop, {options.arrivals} arrivals" if options.open_loop else "closed loop")
        if len(options.callers) == 1:
            caller = options.callers[0]
            parts += [f"{caller.rows} rows per request"] if caller.rows > 1 else []
            parts += [f"deadline {caller.deadline_ms:g} ms"] if caller.deadline_ms is not None else []
        parts.append("answers checked" if options.expect else "answers not checked")
        return ", ".join(parts)

    def as_json(self) -> str:
        """Return all results as a JSON document without credentials."""
        options, capacity = self.options, self.capacity
        callers = [msgspec.structs.asdict(caller) for caller in options.callers]
        for caller in callers:
            del caller["headers"]  # credentials
        document: dict[str, Any] = {
            "tool": f"cobatch {__version__}",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "target": {
                "url": options.url,
                "server": self.model.server,
                "model": self.model.name,
                "platform": self.model.platform,
            },
            "load": {name: getattr(options, name) for name in _LOAD_OPTIONS} | {"callers": callers},
            "interrupted": self.interrupted,
            "runs": [results.as_json() for results in self.results],
            "capacity": None,
        }
        if capacity is not None:
            # An infinite p99 becomes null.
            trials = [{name: getattr(one, name) for name in _TRIAL_FIELDS} for one in capacity.trials]
            document["capacity"] = {
                **{name: getattr(capacity, name) for name in ("slo_ms", "rate", "failed_rate")},
                "limited_by_generator": capacity.limited,
                "sentence": capacity.sentence(),
                "trials": trials,
            }
        return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"


def machine() -> str:
    """Return a line on the machine that the generator runs on."""
    python = platform.python_version()
    return f"generator on {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {python}"


def show(report: Report) -> None:
    """Print the report on stdout."""
    console, all_results, capacity = stdout(), report.results, report.capacity
    suffix = " (interrupted)" if report.interrupted else ""
    console.print(Text(f"{report.title}, {report.load}{suffix}", "bold"), soft_wrap=True)
    heads, *rows = table(report)
    grid = plain_table(*heads, no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
    # After a search only the last trial has details; the others' figures are in the table.
    for results in all_results if capacity is None else all_results[-1:]:
        _show_details(console, results, f"{results.load}: " if len(all_results) > 1 else "")
    if capacity is not None:
        console.print(Text(capacity.sentence(), "bold"), soft_wrap=True)


def table(report: Report) -> list[list[str]]:
    """Return the heads and rows of a table: a row for each trial and, below it, each of its callers."""
    several = any(results.callers for results in report.results)
    good = any(results.total.good_rate is not None for results in report.results)
    held = [trial.held for trial in report.capacity.trials] if report.capacity is not None else []
    heads = ["load", *["tenant"] * several, "offered/s", "answered/s", *["good/s"] * good]
    heads += [*(f"{name} ms" for name in _TABLE_PERCENTILES), "failed", "batch", *["held"] * bool(held)]
    rows = [heads]
    for number, results in enumerate(report.results):
        batch = "-" if results.mean_batch is None else f"{results.mean_batch:.1f}"
        for one in (results.total, *results.callers):
            whole = one is results.total
            row = [results.load if whole else "", *[one.name] * several]
            row += [f"{one.offered_rate:,.0f}", f"{one.answered_rate:,.0f}"]
            row += ["" if one.good_rate is None else f"{one.good_rate:,.0f}"] * good
            row += [f"{one.latency_ms[name]:,.2f}" for name in _TABLE_PERCENTILES]
            share = f" ({one.failed / max(1, one.requests):.1%})" if one.failed else ""
            row += [f"{one.failed:,}{share}", batch if whole else ""]
            if held:
                row.append(("yes" if held[number] else "no") if whole else "")
            rows.append(row)
    return rows


def _show_details(console: Console, results: Results, prefix: str) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(Text(prefix + text, style), soft_wrap=True)

    for kind, count, message in results.errors()[:_ERROR_KINDS]:
        say(f"{count:,} x {kind}{': ' if message else ''}{message}", "red")
    if results.server is not None:
        server = results.server
        say(
            f"server: {server['inferences']:,.0f} inferences in {server['executions']:,.0f} executions "
            f"({server['mean_batch']:.1f} each); mean {server['queue_ms']:.2f} ms in the queue, "
            f"{server['compute_ms']:.2f} ms executing"
        )
    generator = results.generator
    shares = ", ".join(f"{share:.0%}" for share in generator.cpu_shares)
    text = f"generator: CPU {shares} of a core, {generator.connections} connections"
    if results.rate is not None:
        text += f", send delay {generator.send_delay_ms['p99']:.2f} ms (p99)"
        text += f"; p99 from the time of sending {results.sent_latency_ms['p99']:,.2f} ms"
    say(text)
    for reason in generator.bottlenecks:
        say(reason, "bold red")
    for note in generator.notes:
        say(f"note: {note}")


class Progress(ExitStack):
    """Shows a growing tally on stderr, so that stdout has only the report; a context manager.

    `quiet`: show nothing.
    """

    def __init__(self, quiet: bool, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._live: Live | None = None
        self._next_line_s = 0.0
        if self._console.is_terminal and not quiet:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self.enter_context(self._live)
        return self

    def say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(Text(text), soft_wrap=True)

    def update(self, load: str, tally: Tally) -> None:
        """Refresh the live view, or print a line every few seconds where stderr is no terminal."""
        elapsed_s = tally.elapsed_s
        recent, seconds = _last_second(tally, elapsed_s)
        if self._live is not None:
            self._live.update(_view(load, tally, elapsed_s, recent, seconds), refresh=True)
        elif monotonic() >= self._next_line_s and elapsed_s >= _LIVE_PERIOD_S:
            self._next_line_s = monotonic() + _LINE_S
            self.say(
                f"{load} {elapsed_s:5.1f} s: {per_s(recent.due / seconds)} offered, "
                f"{per_s(recent.answered / seconds)} answered, p50 {_ms(recent.latency, 0.5)} ms, "
                f"p99 {_ms(recent.latency, 0.99)} ms, {recent.errors.total():,} failed"
            )


def _last_second(tally: Tally, elapsed_s: float) -> tuple[Counts, float]:
    """Return the sum of the last complete intervals, and their length in seconds."""
    each_s = tally.recent.each_s
    # Samples arrive ten times a second, so the last two intervals are incomplete.
    last = int(elapsed_s / each_s) - 1
    numbers = range(max(0, last - round(_LIVE_PERIOD_S / each_s)), max(0, last))
    return total(tally.recent[number] for number in numbers), max(len(numbers), 1) * each_s


def _view(load: str, tally: Tally, elapsed_s: float, recent: Counts, recent_s: float) -> Group:
    grid = plain_table(
        "", "offered/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "max ms", "batch", no_wrap=True
    )
    whole, trial = tally.total, tally.trial
    whole_s = max(1e-9, min(elapsed_s, trial.lasts_s) - trial.warmup_s)
    for name, counts, seconds in (("last second", recent, recent_s), ("all", whole, whole_s)):
        grid.add_row(
            name,
            f"{counts.due / seconds:,.0f}",
            f"{counts.answered / seconds:,.0f}",
            *(_ms(counts.latency, q) for q in (0.5, 0.9, 0.99)),
            f"{counts.latency.max_us / 1000:,.2f}",
            f"{counts.mean_batch:.1f}" if counts.mean_batch else "",
        )
    open_requests = sum(beat.open_requests for beat in tally.heartbeats.values())
    cpu = ", ".join(f"{tally.heartbeats[number].cpu_share:.0%}" for number in sorted(tally.heartbeats))
    phase = " (warm-up)" if elapsed_s < trial.warmup_s else ""
    if elapsed_s > trial.lasts_s:
        phase = " (waiting for the last answers)"
    head = Text(f"{load}: {max(0.0, elapsed_s):.1f} of {trial.lasts_s:.1f} s{phase}", "bold")
    foot = [Text(f"{open_requests:,} in flight, generator CPU {cpu or '-'}")]
    foot += [
        Text(f"{count:,} x {kind}", "red") for kind, count in whole.errors.most_common(_LIVE_ERROR_KINDS)
    ]
    return Group(head, grid, *foot)


def _ms(latency: LatencyHistogram, q: float) -> str:
    return f"{latency.quantile_us(q) / 1000:,.2f}"
