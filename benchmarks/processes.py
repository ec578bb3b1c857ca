"""One process and several on this machine: requests/s, CPU time and latency, in turns within each round.

`python -m benchmarks.processes [--quick] [--only tiny-json-64,...] [--processes 2,3]`: `wrk` is on the same
cores, so only ratios within a run mean anything. CPU is microseconds of each request over all of a server's
processes, and of it home's. *row* takes 50,176 floats. Takes about ten minutes. Prints a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import wire
from benchmarks.common.models import MODELS, model_path
from benchmarks.common.processes import Server, cobatch, some_of
from benchmarks.common.procstat import children, cpu_us, descendants
from benchmarks.common.turns import wait_until_idle
from benchmarks.common.wrk import run_wrk

_ROW_ELEMENTS = 50_176
_NOTHING = "-"


@dataclass(frozen=True)
class Case:
    """A model, the form of its requests, and the number of connections."""

    model: str
    binary: bool
    connections: int

    @property
    def load(self) -> str:
        """The name without the connections."""
        return f"{self.model}-{'binary' if self.binary else 'json'}"

    @property
    def name(self) -> str:
        """The name in `--only` and in the table."""
        return f"{self.load}-{self.connections}"

    def message(self) -> wire.Message:
        """Return the request of all clients."""
        return wire.encode(self.model, wire.rows_of(self.model, 1, 5), self.binary)


@dataclass(frozen=True)
class Figures:
    """The figures of one turn of a server. CPU in microseconds per request."""

    per_s: float
    p50_us: float
    p99_us: float
    all_us: float
    home_us: float


CASES = {
    case.name: case
    for case in (
        *(Case("tiny", binary, count) for binary in (False, True) for count in (1, 64, 256)),
        *(Case("wide", binary, 64) for binary in (False, True)),
        *(Case("row", binary, 64) for binary in (False, True)),
    )
}
wire.INPUTS["row"] = wire.Tensor("x", "FP32", _ROW_ELEMENTS)


def main(arguments: list[str] | None = None) -> int:
    """Measure the cases and print them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.processes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one short round")
    cases = tuple(CASES)
    parser.add_argument("--only", type=some_of(cases), default=cases, help=f"some of {','.join(cases)}")
    parser.add_argument("--processes", default="2,3", help="numbers of processes beside one, with commas")
    options = parser.parse_args(arguments)
    counts = [1, *map(int, options.processes.split(","))]
    rounds, seconds = (1, 2) if options.quick else (5, 3)
    titles = ("p50 us", "p99 us", "CPU us", "home us")
    print(f"{'case':16}{'processes':>10}{'requests/s':>12}" + "".join(f"{title:>11}" for title in titles))
    for name in options.only:
        _print(name, measure(CASES[name], counts, rounds, seconds))
    return 0


def measure(case: Case, counts: Sequence[int], rounds: int, seconds: int) -> dict[int, list[Figures]]:
    """Return the figures of each round, by the number of processes."""
    message = case.message()
    figures: dict[int, list[Figures]] = {count: [] for count in counts}
    with ExitStack() as stack:
        servers = {count: stack.enter_context(serving(case, count)) for count in counts}
        for server in servers.values():
            turn_of(server, case, message, 1)
        for _ in range(rounds):
            for count, server in servers.items():
                figures[count].append(turn_of(server, case, message, seconds))
    return figures


def serving(case: Case, count: int) -> AbstractContextManager[Server]:
    """Start a server with a case's model and this number of processes."""
    path = _row_model() if case.model == "row" else model_path(case.model)
    flags = ["--processes", str(count), "--max-queue-rows", "8192"]
    return cobatch(path, case.model, True, flags=flags)


def turn_of(server: Server, case: Case, message: wire.Message, seconds: int) -> Figures:
    """Load a server once."""
    for pid in descendants(server.pid):
        wait_until_idle(pid, 0.1)
    home = children(server.pid).get("home", server.pid)  # one process has the engines itself
    before, before_home = cpu_us(server.pid), cpu_us(home)
    url = f"http://{server.address}/v2/models/{case.model}/infer"
    load = run_wrk(url, message.body, message.headers, case.connections, seconds)
    used, used_home = cpu_us(server.pid) - before, cpu_us(home) - before_home
    count = load.requests
    per_s = count / load.duration_us * 1e6
    return Figures(per_s, load.p50_us, load.p99_us, used / count, used_home / count)


def _row_model() -> Path:
    """Return a model that takes a long row and does nearly nothing with it."""
    path = MODELS / "row.onnx"
    if not path.exists():
        weight = numpy_helper.from_array(np.arange(8, dtype=np.int64), "indices")
        graph = helper.make_graph(
            [helper.make_node("Gather", ["x", "indices"], ["y"], axis=1)],
            "row",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", _ROW_ELEMENTS])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
            [weight],
        )
        model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)
    return path


def _print(name: str, figures: dict[int, list[Figures]]) -> None:
    one = figures[1]
    for count, turns in figures.items():
        per_s, *others = [median([getattr(turn, one.name) for turn in turns]) for one in fields(Figures)]
        line = f"{name:16}{count:>10}{per_s:>12,.0f}" + "".join(f"{value:>11,.1f}" for value in others)
        if count > 1:
            pairs = list(zip(turns, one, strict=True))
            rate = median([turn.per_s / alone.per_s for turn, alone in pairs])
            cpu = median([turn.all_us / alone.all_us for turn, alone in pairs])
            line += f"   requests/s x{rate:.2f}, CPU x{cpu:.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
