"""The report on the terminal, and the table that it shares with the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from cobatch.server.console import plain_table, stdout
from cobatch.server.loadtest.capacity import Capacity
from cobatch.server.loadtest.statistics import Figures, Results

_SHOWN = ("p50", "p90", "p99", "p99.9", "max")
_MOST_KINDS = 12


def show(title: str, found: Sequence[Results], capacity: Capacity | None) -> None:
    """All of it, on stdout."""
    console = stdout()
    console.print(Text(title, "bold"), soft_wrap=True)
    heads, *rows = cells(found, capacity)
    table = plain_table(*heads, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    # Of a search, what it ended with: the others' figures are in the table.
    for results in found if capacity is None else found[-1:]:
        _details(console, results, f"{_load(results)}: " if len(found) > 1 else "")
    if capacity is not None:
        console.print(Text(capacity.sentence(), "bold"), soft_wrap=True)


def cells(found: Sequence[Results], capacity: Capacity | None) -> list[list[str]]:
    """The heads of a table, and its rows: one for each trial, and then one for each of its callers."""
    several = any(results.callers for results in found)
    good = any(results.total.good_rate is not None for results in found)
    held = [one.held for one in capacity.tried] if capacity is not None else []
    heads = [
        "load",
        *(["tenant"] if several else []),
        "offered/s",
        "answered/s",
        *(["good/s"] if good else []),
    ]
    heads += [*(f"{name} ms" for name in _SHOWN), "failed", "batch", *(["held"] if held else [])]
    rows = [heads]
    for number, results in enumerate(found):
        batch = "-" if results.mean_batch is None else f"{results.mean_batch:.1f}"
        for one in (results.total, *results.callers):
            whole = one is results.total
            row = [_load(results) if whole else "", *([one.name] if several else [])]
            row += [f"{one.offered_rate:,.0f}", f"{one.answered_rate:,.0f}"]
            if good:
                row.append("" if one.good_rate is None else f"{one.good_rate:,.0f}")
            row += [
                *(f"{one.latency_ms[name]:,.2f}" for name in _SHOWN),
                _failed(one),
                batch if whole else "",
            ]
            if held:
                row.append(("yes" if held[number] else "no") if whole else "")
            rows.append(row)
    return rows


def _load(results: Results) -> str:
    return f"{results.connections} connections" if results.rate is None else per_s(results.rate)


def per_s(rate: float) -> str:
    """A rate with as many digits as tell it from its neighbours."""
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def _failed(figures: Figures) -> str:
    if not figures.failed:
        return "0"
    return f"{figures.failed:,} ({figures.failed / max(1, figures.requests):.1%})"


def _details(console: Console, results: Results, which: str) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(Text(which + text, style), soft_wrap=True)

    for kind, count, said in results.errors_said()[:_MOST_KINDS]:
        say(f"{count:,} x {kind}{': ' if said else ''}{said}", "red")
    if results.server is not None:
        server = results.server
        say(
            f"the server counted {server['inferences']:,.0f} inferences in {server['executions']:,.0f} runs "
            f"({server['mean_batch']:.1f} each); in the mean {server['queue_ms']:.2f} ms in the queue, "
            f"{server['compute_ms']:.2f} ms in the run"
        )
    generator = results.generator
    shares = ", ".join(f"{share:.0%}" for share in generator.cpu_shares)
    text = f"generator: CPU {shares} of a core, {generator.connections} connections"
    if results.rate is not None:
        text += f", sent {generator.late_ms['p99']:.2f} ms late (p99)"
        text += f"; from the sending p99 was {results.sent_latency_ms['p99']:,.2f} ms"
    say(text)
    for limit in generator.limits:
        say(f"the generator was the bottleneck: {limit}", "bold red")
    for note in generator.notes:
        say(f"note: {note}")
