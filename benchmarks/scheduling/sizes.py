"""The default batch size, which follows from measured run times, beside the best `max_batch_size` of a grid.

`python -m benchmarks.scheduling.sizes [--connections 64] [--seconds 6] [--rounds 3]`: for *magika* (where
batching hardly pays) and *wide* (where it does), a server with default settings and one for each size take
turns under the same closed loop. The median latency counts for magika, the rows per second for wide.
"""

from __future__ import annotations

import argparse
from statistics import median

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.processes import cobatch
from benchmarks.common.wrk import Load, run_wrk

# None: the default. Small sizes where batching hardly pays, large ones where it does.
SIZES = {"magika": (None, 1, 2, 4, 8), "wide": (None, 8, 16, 32, 64)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling.sizes")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for model, sizes in SIZES.items():
        print(f"{model}, {options.connections} connections, medians of {options.rounds} rounds:")
        print("| max_batch_size | requests/s | p50 ms | p99 ms |\n|---|---:|---:|---:|", flush=True)
        loads: dict[int | None, list[Load]] = {size: [] for size in sizes}
        for _ in range(options.rounds):
            for size in sizes:
                loads[size].append(measured(model, size, options.connections, options.seconds))
        for size, found in loads.items():
            figures = [
                median(load.requests / load.duration_us * 1e6 for load in found),
                median(load.p50_us for load in found) / 1000,
                median(load.p99_us for load in found) / 1000,
            ]
            cells = " | ".join(f"{figure:,.1f}" for figure in figures)
            print(f"| {'default' if size is None else size} | {cells} |", flush=True)


def measured(model: str, size: int | None, connections: int, seconds: int) -> Load:
    """Measure one server under load."""
    message = wire.encode(model, wire.rows_of(model, 1, 0), binary=True)
    flags = [] if size is None else ["--max-batch-size", str(size)]
    with cobatch(model_path(model), model, True, flags=flags) as server:
        url = f"http://{server.address}/v2/models/{model}/infer"
        run_wrk(url, message.body, message.headers, connections, 1, False)
        return run_wrk(url, message.body, message.headers, connections, seconds, False)


if __name__ == "__main__":
    main()
