"""A run's results as a folder: peers.json, plots, and README.md, which a person reads."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.plots import write_plots
from benchmarks.peers.results import Results
from benchmarks.peers.tables import TITLES, tables

_INTRODUCTION = """\
# cobatch and others, side by side

Made by `./scripts/bench-peers`: do not edit. Each server is a small app in its framework's own idiom
([apps](../peers/apps)), in an environment of its own, with the same ONNX model, one ONNX Runtime thread,
batches of up to {max_batch} and, where a framework waits for a batch to fill, {wait} ms of waiting. `wrk`
with one thread and keep-alive is the client of the closed loops, on the same cores as the server. All
servers of a model run at the same time and are asked in turns: {rounds}. Whoever's turn it is not is
stopped (SIGSTOP; Triton's processes do not survive that, and take 2 % of a core). Before anything is timed,
{checked} different requests from 8 callers at once are compared with a direct run.

CPU is of all of a server's processes, in microseconds per request; memory their proportional set size (MB);
batch the mean rows of a run, by the model's own count. *JSON* and *raw* are `{{"x": [...]}}` and the row's
bytes, which are less to read than the V2 protocol's JSON and binary bodies. Medians of the rounds; ratios
are formed within a round, because the machine's speed drifts (lowest and highest in brackets).

In overload a server that can limit its queue, cobatch too, takes in what it answers in 70 % of the deadline.
Triton answers more with a time limit on its queue instead, half of the deadline. With requests' `timeout`
alone, cobatch had 85-88 % of its capacity in time in short runs, with the limit 91-99 %.

In a closed loop the mean latency is connections divided by requests/s whatever a server does, so no server
that is as fast as another can have a tenth of its latency there: the goal for magika's median latency can
only be met over servers that batching makes slower.

BentoML has a goal for its latency of 2 s here, 10 s for magika (its default is a minute, which refuses
nobody, but makes a caller who comes alone wait a little longer still): what its dispatcher takes for too late
it refuses, and those are its failures.
"""


def write(results: Results, folder: Path) -> None:
    """All files, over those of the run before."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(json.dumps(results.document(), indent=1) + "\n")
    (folder / "README.md").write_text(_readme(results, write_plots(results, folder)))


def _readme(results: Results, plots: list[str]) -> str:
    settings = results.settings
    parts = [
        _INTRODUCTION.format(
            max_batch=settings["max_batch"],
            wait=settings["max_wait_ms"],
            rounds="; ".join(settings["plans"]),
            checked=settings["checked"],
        ),
        _when(results),
    ]
    parts += [
        f"## {table.title[0].upper()}{table.title[1:]}\n\n{table.markdown()}\n" for table in tables(results)
    ]
    parts += [f"![{name}]({name}.svg)\n" for name in plots]
    parts.append("## Versions, and how each was told of the deadline\n\n" + _versions(results) + "\n")
    if results.skipped:
        said = "\n".join(f"* {TITLES[name]}: {why}" for name, why in results.skipped.items())
        parts.append(f"## Not measured\n\n{said}\n")
    return "\n".join(parts)


def _when(results: Results) -> str:
    machine = results.machine
    return (
        f"{results.settings['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
        f"{machine['wrk']}. The whole run took {results.seconds / 60:.0f} minutes.\n"
    )


def _versions(results: Results) -> str:
    lines = ["| server | versions | deadline |", "| --- | --- | --- |"]
    for peer in PEERS:
        if peer.name in results.versions:
            found = ", ".join(f"{name} {version}" for name, version in results.versions[peer.name].items())
            lines.append(f"| {peer.title} | {found} | {peer.deadline} |")
    return "\n".join(lines)
