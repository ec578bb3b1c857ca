"""The default batch size, which follows from measured run times, beside the best `max_batch_size` of a grid.

`python -m benchmarks.scheduling.sizes [--connections 64] [--seconds 6] [--rounds 3] [--neighbour]`: for
*magika* (where batching hardly pays) and *wide* (where it does), a server with default settings and one for
each size take turns under the same closed loop. The median latency counts for magika, the rows per second for
wide. With `--neighbour` each server has one core, where another process computes all the time: its runs have
a tail.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.processes import Server, cobatch
from benchmarks.common.wrk import Load, run_wrk

# None: the default. Small sizes where batching hardly pays, large ones where it does.
SIZES = {"magika": (None, 1, 2, 4, 8), "wide": (None, 8, 16, 32, 64)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling.sizes")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=[*SIZES], help="(default: both)")
    parser.add_argument("--neighbour", action="store_true")
    options = parser.parse_args()
    for model, sizes in SIZES.items():
        if options.model not in (None, model):
            continue
        print(f"{model}, {options.connections} connections, medians of {options.rounds} rounds:")
        print("| max_batch_size | requests/s | p50 ms | p99 ms |\n|---|---:|---:|---:|", flush=True)
        loads: dict[int | None, list[Load]] = {size: [] for size in sizes}
        for _ in range(options.rounds):
            for size in sizes:
                load = measured(model, size, options.connections, options.seconds, options.neighbour)
                loads[size].append(load)
        for size, found in loads.items():
            figures = [
                median(load.requests / load.duration_us * 1e6 for load in found),
                median(load.p50_us for load in found) / 1000,
                median(load.p99_us for load in found) / 1000,
            ]
            cells = " | ".join(f"{figure:,.1f}" for figure in figures)
            print(f"| {'default' if size is None else size} | {cells} |", flush=True)


def measured(model: str, size: int | None, connections: int, seconds: int, neighbour: bool) -> Load:
    """Measure one server under load."""
    message = wire.encode(model, wire.rows_of(model, 1, 0), binary=True)
    flags = [] if size is None else ["--max-batch-size", str(size)]
    with served(model, flags, neighbour) as server:
        url = f"http://{server.address}/v2/models/{model}/infer"
        run_wrk(url, message.body, message.headers, connections, 1, False)
        return run_wrk(url, message.body, message.headers, connections, seconds, False)


@contextmanager
def served(model: str, flags: list[str], neighbour: bool) -> Iterator[Server]:
    """Start a server, with `neighbour` on a core that it shares with a process that never sleeps."""
    cores = os.sched_getaffinity(0)
    if neighbour:
        os.sched_setaffinity(0, {max(cores)})  # children inherit it
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if neighbour else None
    try:
        with cobatch(model_path(model), model, True, flags=flags) as server:
            os.sched_setaffinity(0, cores)
            yield server
    finally:
        os.sched_setaffinity(0, cores)
        if busy is not None:
            busy.kill()
            busy.wait()


if __name__ == "__main__":
    main()
