"""The demo's two tables: what the files are, and how their requests left the queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from callers import Load
from filetypes import Verdict

SHOWN = 40
OTHERS = 45  # characters that the other columns and the lines between them may take


@dataclass(frozen=True, slots=True)
class Line:
    """One file of the first table; `checked` says that magika itself said the same."""

    name: str
    verdict: Verdict
    checked: bool


def files_table(console: Console, lines: Sequence[Line]) -> None:
    """The files, spread over the whole list where there are more than SHOWN, and a count of the rest."""
    step = max(1, -(-len(lines) // SHOWN))
    shown = lines[::step]
    table = Table(title="Files", title_justify="left", row_styles=["", "dim"])
    table.add_column("file", no_wrap=True)
    table.add_column("label", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("magika", no_wrap=True)
    for line in shown:
        score = "too short" if line.verdict.score is None else f"{line.verdict.score:.4f}"
        table.add_row(
            _shortened(line.name, console.width - OTHERS),
            line.verdict.label,
            score,
            "the same" if line.checked else "",
        )
    console.print(table)
    if len(shown) < len(lines):
        console.print(f"and {len(lines) - len(shown)} more (one in {step} is shown)")


def timing_table(console: Console, load: Load) -> None:
    """Batch sizes in powers of two, times as the server stated them, and the rate seen from here.

    The rate is no benchmark: this client shares the machine's cores with the server.
    """
    table = Table(title="\nBatches that formed", title_justify="left")
    table.add_column("rows in the batch", justify="right")
    table.add_column("batches", justify="right")
    table.add_column("requests", justify="right")
    table.add_column("share of the requests")
    for (low, high), (batches, requests) in _bins(load.batch_rows).items():
        share = requests / load.requests
        sizes = str(low) if low == high else f"{low} to {high}"
        table.add_row(sizes, str(batches), str(requests), f"{'█' * round(30 * share)} {share:.0%}")
    console.print(table)
    if max(load.batch_rows) < load.in_flight / 2:
        console.print("Batches stay small: timed at load, a row of this model got no cheaper in larger ones.")
    for name, times in (("queue", load.queue_ms), ("compute", load.compute_ms)):
        middle, late = np.percentile(times, [50, 95])
        console.print(f"{name:>8}: median {middle:.2f} ms, 95th percentile {late:.2f} ms")
    console.print(
        f"{load.requests:>8} requests in {load.seconds:.2f} s from {load.in_flight} callers at once: "
        f"{load.requests / load.seconds:.0f} requests/s"
    )


def _shortened(name: str, width: int) -> str:
    """The end of a long path says more than its beginning."""
    width = max(width, 20)
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _bins(batch_rows: Sequence[int]) -> dict[tuple[int, int], tuple[int, int]]:
    """(smallest, largest size) -> (batches, requests), sizes in powers of two: 1, 2, 3-4, 5-8, ...

    Each request is one row, so `n` requests that rode in batches of `size` rows are `n / size` batches.
    """
    bins: dict[tuple[int, int], tuple[int, int]] = {}
    for size, requests in sorted(Counter(batch_rows).items()):
        high = 1 << (size - 1).bit_length()
        key = (high // 2 + 1, high) if high > 1 else (1, 1)
        batches, before = bins.get(key, (0, 0))
        bins[key] = (batches + round(requests / size), before + requests)
    return bins
