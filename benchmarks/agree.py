"""Does `cobatch bench` measure what an independent tool measures? wrk and it put the same closed loop on one
server, in turns.

`python -m benchmarks.agree [--rounds 5] [--seconds 4]`: *wide* at one connection and at 16, *tiny* at one. A
round's figures are compared with each other, since the machine's speed changes between rounds; prints
medians, and ends with status 1 if requests per second or the median latency of *wide* differ by more than
10 %. p99 is shown beside them: a few hiccups of the machine decide it, and each tool has its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import wire
from benchmarks.models import model_path
from benchmarks.processes import ROOT, Server, cobatch
from benchmarks.wrk import run_wrk

# Model, connections, whether it must agree: a generator in Python takes some 7 us for each request more than
# one in C, which shows where a whole request takes 70.
_CASES = (("wide", 1, True), ("wide", 16, True), ("tiny", 1, False))
_NAMES = {"per_s": "requests/s", "p50_us": "p50, us", "p99_us": "p99, us"}
_WITHIN = 0.10


@dataclass(frozen=True, slots=True)
class Seen:
    """What one tool saw in one turn."""

    per_s: float
    p50_us: float
    p99_us: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agree")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    options = parser.parse_args()
    print("| case | | wrk | cobatch bench | ratio (lowest-highest) |\n|---|---|---:|---:|---:|")
    agrees = True
    for model, connections, counts in _CASES:
        with cobatch(model_path(model), model, True) as server:
            rounds = [turns(server, model, connections, options.seconds) for _ in range(options.rounds)]
        agrees &= show(f"{model}, {connections} connections", rounds) or not counts
    return 0 if agrees else 1


def turns(server: Server, model: str, connections: int, seconds: int) -> tuple[Seen, Seen]:
    """wrk, then `cobatch bench`."""
    message = wire.encode(model, wire.rows_of(model, 1, 0), binary=False)
    url = f"http://{server.address}/v2/models/{model}/infer"
    run_wrk(url, message.body, message.headers, connections, 1)
    load = run_wrk(url, message.body, message.headers, connections, seconds)
    return Seen(load.requests / load.duration_us * 1e6, load.p50_us, load.p99_us), ours(
        url, connections, seconds
    )


def ours(url: str, connections: int, seconds: int) -> Seen:
    """A closed loop of `cobatch bench`."""
    with tempfile.TemporaryDirectory(prefix="cobatch-agree-") as folder:
        file = Path(folder, "figures.json")
        command = [sys.executable, "-m", "server.cli", "bench", url, "--quiet", "--json", str(file)]
        command += [f"--connections={connections}", f"--seconds={seconds}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        run = json.loads(file.read_text())["runs"][0]
    latency = run["total"]["latency_ms"]
    return Seen(run["answered_rate"], latency["p50"] * 1000, latency["p99"] * 1000)


def show(case: str, rounds: list[tuple[Seen, Seen]]) -> bool:
    """Print a case; whether the two agree."""
    agrees = True
    for name, title in _NAMES.items():
        pairs = [(getattr(wrk, name), getattr(own, name)) for wrk, own in rounds]
        ratios = sorted(own / wrk for wrk, own in pairs)
        theirs, own = (median(side) for side in zip(*pairs, strict=True))
        print(
            f"| {case} | {title} | {theirs:,.0f} | {own:,.0f} "
            f"| {median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |",
            flush=True,
        )
        agrees &= name == "p99_us" or abs(median(ratios) - 1) <= _WITHIN
    return agrees


if __name__ == "__main__":
    sys.exit(main())
