"""The demo's tables: the types of the files, and the batches that their requests formed."""

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
OTHER_COLUMNS = 45  # characters of the other columns and of the lines between columns


@dataclass(frozen=True, slots=True)
class Line:
    """A classified file; `checked`: magika gave the same answer."""

    name: str
    verdict: Verdict
    checked: bool

    @property
    def score(self) -> str:
        """The score as text."""
        return "too short" if self.verdict.score is None else f"{self.verdict.score:.4f}"


def labels_table(console: Console, lines: Sequence[Line]) -> None:
    """Print the labels with their number of files and their best example, the most frequent first."""
    table = Table(title="\nFile types", title_justify="left")
    table.add_column("label", no_wrap=True)
    table.add_column("files", justify="right", no_wrap=True)
    table.add_column("for example", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    by_label: dict[str, list[Line]] = {}
    for line in lines:
        by_label.setdefault(line.verdict.label, []).append(line)
    for label, files in sorted(by_label.items(), key=lambda item: -len(item[1])):
        example = max(files, key=lambda line: line.verdict.score or 0.0)
        name = _shortened(example.name, console.width - OTHER_COLUMNS)
        table.add_row(label, str(len(files)), name, example.score)
    console.print(table)


def files_table(console: Console, lines: Sequence[Line], title: str) -> None:
    """Print the files, at most SHOWN, evenly spread over the list."""
    step = max(1, -(-len(lines) // SHOWN))
    shown = lines[::step]
    table = Table(title=title, title_justify="left", row_styles=["", "dim"])
    table.add_column("file", no_wrap=True)
    table.add_column("label", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    for line in shown:
        name = _shortened(line.name, console.width - OTHER_COLUMNS)
        table.add_row(name, line.verdict.label, line.score)
    console.print(table)
    if len(shown) < len(lines):
        console.print(f"and {len(lines) - len(shown)} more")


def timing_table(console: Console, load: Load) -> None:
    """Print the batch sizes and times that the server reported, and the rate.

    The rate is no benchmark: this client shares the machine's cores with the server.
    """
    table = Table(title="\nBatches", title_justify="left")
    table.add_column("batch size", justify="right")
    table.add_column("batches", justify="right")
    table.add_column("requests", justify="right")
    table.add_column("share of requests")
    for (low, high), (batches, requests) in _bins(load.batch_rows).items():
        share = requests / load.requests
        sizes = str(low) if low == high else f"{low} to {high}"
        table.add_row(sizes, str(batches), str(requests), f"{'█' * round(30 * share)} {share:.0%}")
    console.print(table)
    if max(load.batch_rows) < load.in_flight / 2:
        console.print(
            "Batches stay small because this model gains nothing from larger ones on this machine: "
            "cobatch measured its run time by batch size when it loaded the model."
        )
    for name, times in (("queued", load.queue_ms), ("execution", load.compute_ms)):
        p50, p95 = np.percentile(times, [50, 95])
        console.print(f"{name:>9}: p50 {p50:.1f} ms, p95 {p95:.1f} ms")
    console.print(
        f"{load.requests:>9} requests from {load.in_flight} concurrent callers in {load.seconds:.2f} s: "
        f"{load.rate:.0f} requests/s"
    )


def batching_table(console: Console, alone: Load, together: Load) -> None:
    """Print the same model's figures without concurrent callers and with them, side by side."""
    title = "\nWhat batching does for wide, whose 73 MiB of weights are read once for a whole batch"
    table = Table(title=title, title_justify="left")
    table.add_column("callers")
    for name in ("requests/s", "p50 ms", "p95 ms", "rows in a batch"):
        table.add_column(name, justify="right")
    for name, load in (("one after another", alone), (f"{together.in_flight} at once", together)):
        p50, p95 = np.percentile(load.latency_ms, [50, 95])
        table.add_row(name, f"{load.rate:.0f}", f"{p50:.1f}", f"{p95:.1f}", f"{load.mean_batch:.1f}")
    console.print(table)
    slower = float(np.median(together.latency_ms) / np.median(alone.latency_ms))
    console.print(
        f"{together.rate / alone.rate:.1f} times the requests per second, at {slower:.1f} times the latency; "
        f"without batching, each of {together.in_flight} callers would wait for {together.in_flight} runs."
    )


def _shortened(name: str, width: int) -> str:
    """Shorten a long path at its beginning."""
    width = max(width, 20)
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _bins(batch_rows: Sequence[int]) -> dict[tuple[int, int], tuple[int, int]]:
    """Count batches and requests by (smallest, largest size), in powers of two: 1, 2, 3-4, 5-8, ...

    Each request is one row, so N requests in batches of `size` rows are N / `size` batches.
    """
    bins: dict[tuple[int, int], tuple[int, int]] = {}
    for size, requests in sorted(Counter(batch_rows).items()):
        high = 1 << (size - 1).bit_length()
        key = (high // 2 + 1, high) if high > 1 else (1, 1)
        batches, before = bins.get(key, (0, 0))
        bins[key] = (batches + round(requests / size), before + requests)
    return bins
