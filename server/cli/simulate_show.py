"""What `cobatch simulate` prints, and writes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from cobatch.batcher.simulator.engine import Profile
from cobatch.batcher.simulator.scenario import Figures, Results
from cobatch.batcher.simulator.svg import Line, chart
from cobatch.server.console import plain_table, stdout

Found = Sequence[tuple[str, float | None, Results]]  # policy as it was given, load, results


def show(profile: Profile, found: Found) -> None:
    """The tables, on stdout."""
    console = stdout()
    console.print(Text(profile.name, "bold"), soft_wrap=True)
    console.print(_policies(found))
    if any(len(results.tenants) > 1 for _, _, results in found):
        console.print(_tenants(found))
    took_s = sum(results.took_s for _, _, results in found)
    came = sum(results.came for _, _, results in found)
    console.print(f"{came:,} requests in {took_s:.1f} s")


def _policies(found: Found) -> Table:
    table = plain_table(
        "policy", "load", "offered/s", "goodput/s", "bound/s", "of bound", "p50 ms", "p99 ms", "late",
        "expired", "refused", "batch", "busy", "left because",
    )  # fmt: skip
    for name, load, results in found:
        total, offered = results.total, results.offered
        reasons = sum(results.reasons.values()) or 1
        table.add_row(
            name,
            "-" if load is None else f"{load:.2f}",
            "-" if offered is None else f"{offered:,.0f}",
            f"{total.goodput:,.0f}",
            "-" if results.bound is None else f"{results.bound:,.0f}",
            f"{total.goodput / results.bound:.1%}" if results.bound else "-",
            f"{total.latency_ms['p50']:.1f}",
            f"{total.latency_ms['p99']:.1f}",
            *(_part(count, total) for count in (total.late, total.expired, total.refused)),
            f"{results.mean_batch:.1f}",
            f"{results.utilisation:.0%}",
            " ".join(f"{reason} {count / reasons:.0%}" for reason, count in results.reasons.items()),
        )
    return table


def _tenants(found: Found) -> Table:
    table = plain_table(
        "tenant", "policy", "load", "goodput/s", "rows", "p50 ms", "p99 ms", "expired", "refused"
    )
    for name, load, results in found:
        for tenant, figures in results.tenants.items():
            table.add_row(
                tenant,
                name,
                "-" if load is None else f"{load:.2f}",
                f"{figures.goodput:,.0f}",
                f"{figures.rows_share:.1%}",
                f"{figures.latency_ms['p50']:.1f}",
                f"{figures.latency_ms['p99']:.1f}",
                _part(figures.expired, figures),
                _part(figures.refused, figures),
            )
    return table


def _part(count: int, figures: Figures) -> str:
    return f"{count / max(1, figures.ended):.1%}"


def as_json(profile: Profile, found: Found) -> str:
    """All figures of all runs."""
    runs = [{**results.as_json(), "policy": name, "load": load} for name, load, results in found]
    document = {"profile": profile.as_json(), "runs": runs}
    return json.dumps(document, indent=2) + "\n"


def plot(profile: Profile, found: Found) -> str:
    """Goodput over load as SVG where there are several loads; else the batches' sizes."""
    loads = {load for _, load, _ in found}
    if None in loads or len(loads) == 1:
        sizes = {name: _sizes(results) for name, _, results in found}
        return chart(profile.name, "rows in a batch", "part of all rows, %", sizes)
    lines: dict[str, list[tuple[float, float]]] = {}
    bound = {}
    for name, load, results in found:
        assert load is not None
        lines.setdefault(name, []).append((load, results.total.goodput))
        if results.bound is not None:
            bound[load] = results.bound
    named: dict[str, Line] = {**lines, "bound": sorted(bound.items())} if bound else {**lines}
    return chart(profile.name, "load, parts of capacity", "goodput per second", named, ["bound"])


def _sizes(results: Results) -> Line:
    rows = sum(size * count for size, count in results.batches.items()) or 1
    return [(size, 100 * size * count / rows) for size, count in results.batches.items()]
