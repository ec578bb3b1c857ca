"""The results of a run as files: peers.json, plots and README.md."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peers.catalogue import KNOWN
from benchmarks.peers.plots import write_plots
from benchmarks.peers.results import Results
from benchmarks.peers.tables import TITLES, tables

_INTRODUCTION = """\
# cobatch and others, side by side

Made by `./scripts/bench-peers`: do not edit. Each server is a small app in its framework's own idiom
([apps](../peers/apps)), in an environment of its own, with the same ONNX model, one ONNX Runtime thread,
batches of up to {max_batch} and, where a framework waits for a batch to fill, {wait} ms of waiting. `wrk`
with one thread and keep-alive is the client of the closed loops, on the same cores as the server. All
servers of a model run at the same time and are measured in turns: {rounds}. Between its turns a server is
stopped (SIGSTOP; except Triton, whose processes do not survive that, and which takes 2 % of a core). Before
anything is timed, {checked} different requests from 8 concurrent callers are compared with a direct run.

CPU is the time of all processes of a server, in microseconds per request; memory is their proportional set
size (MB); batch is the mean number of rows in a run, counted by the model. *JSON* and *raw* are
`{{"x": [...]}}` and the bytes of a row, which are shorter than the JSON and binary bodies of the V2 protocol.
Figures are medians of the rounds; ratios are formed within a round, because the machine's speed drifts
(lowest and highest in brackets).

In overload servers with a queue limit, cobatch too, accept as many requests as they answer in 70 % of the
deadline. Triton answers more with a time limit of its queue, half of the deadline. With requests' `timeout`
alone cobatch answered 85-88 % of its capacity in time in short runs, with the limit 91-99 %.

In a closed loop the mean latency is the number of connections divided by requests/s for any server. So no
server can have a tenth of the latency of one that is equally fast: the goal for magika's median latency can
only be met against servers that batching makes slower.

BentoML has a latency goal of 2 s here, 10 s for magika (with its default of a minute it refuses no request,
but a single caller waits even longer). Its dispatcher refuses requests that it expects to be late; these are
its failures.
"""


def write(results: Results, folder: Path) -> None:
    """Write all files, over those of an earlier run."""
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
    parts.append("## Versions, and settings of the deadline\n\n" + _versions(results) + "\n")
    if results.skipped:
        reasons = "\n".join(f"* {TITLES[name]}: {why}" for name, why in results.skipped.items())
        parts.append(f"## Not measured\n\n{reasons}\n")
    return "\n".join(parts)


def _when(results: Results) -> str:
    machine = results.machine
    return (
        f"{results.settings['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
        f"{machine['wrk']}. The whole run took {results.seconds / 60:.0f} minutes.\n"
    )


def _versions(results: Results) -> str:
    lines = ["| server | versions | deadline |", "| --- | --- | --- |"]
    for peer in KNOWN:
        if peer.name in results.versions:
            versions = ", ".join(f"{name} {version}" for name, version in results.versions[peer.name].items())
            lines.append(f"| {peer.title} | {versions} | {peer.deadline} |")
    return "\n".join(lines)
