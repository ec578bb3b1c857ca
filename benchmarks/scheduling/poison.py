"""Good callers beside callers whose rows fail, on a real server: their cost to the good ones.

`python -m benchmarks.scheduling.poison [--rounds 7] [--seconds 3] [--check]` needs `wrk`. The model looks an
index up in a table and multiplies the row found (two layers); an index outside the table fails the whole run.

* anonymous: 16 connections beside 16 more good ones, and beside 16 whose rows fail, in turns. The ratio of
  the first ones' answers per second should be at least 0.5.
* tenants: a light tenant that sends 100 requests/s, alone and beside 16 connections of a tenant whose rows
  fail, in turns. The ratio of its p99 should be at most 1.5.

Prints the median of the first ratio over the rounds, and the ratio of the p99s over all turns. With `--check`
the exit status is 1 if one misses its limit. Both need a quiet machine: its own stalls are longer than a run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common.models import SEED
from benchmarks.common.open_loop import Load, constant, drive
from benchmarks.common.processes import Server, cobatch
from benchmarks.common.turns import wait_until_idle
from benchmarks.common.wire import Message, raw_request
from benchmarks.common.wrk import run_wrk
from cobatch.server.auth.api_keys import mint
from cobatch.server.loadtest.statistics import LatencyHistogram

_KEPT, _P99 = 0.5, 1.5  # the limits
_CONNECTIONS = 16
_LIGHT_PER_S = 100
_PATH = "/v2/models/table/infer"
_ROWS, _WIDTH = 1000, 256


def table() -> bytes:
    """y = relu(table[x] w0) w1: INT64 [batch, 1] -> FP32 [batch, 8]; x outside the table fails the run."""
    rng = np.random.default_rng(SEED)
    weights = {"table": (_ROWS, _WIDTH), "w0": (_WIDTH, _WIDTH), "w1": (_WIDTH, 8)}
    nodes = [
        helper.make_node("Squeeze", ["x", "axis"], ["at"]),
        helper.make_node("Gather", ["table", "at"], ["found"]),
        helper.make_node("MatMul", ["found", "w0"], ["product"]),
        helper.make_node("Relu", ["product"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w1"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "table",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [
            numpy_helper.from_array(np.array([1]), "axis"),
            *(
                numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32), name)
                for name, shape in weights.items()
            ),
        ],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@dataclass(frozen=True)
class Caller:
    """The index that a caller sends, and its key, "" without authentication."""

    index: int
    key: str = ""

    @property
    def message(self) -> Message:
        """Its request."""
        tensor = {"name": "x", "shape": [1, 1], "datatype": "INT64", "data": [self.index]}
        headers = {"Content-Type": "application/json"} | ({"X-API-Key": self.key} if self.key else {})
        return Message(json.dumps({"inputs": [tensor]}).encode(), headers)


def closed(server: Server, caller: Caller, seconds: float) -> float:
    """Return the answers per second that 16 connections of a caller get in a closed loop."""
    message = caller.message
    url = f"http://{server.address}{_PATH}"
    load = run_wrk(url, message.body, message.headers, _CONNECTIONS, math.ceil(seconds), strict=False)
    return load.requests / load.duration_us * 1e6


def light(server: Server, caller: Caller, seconds: float) -> LatencyHistogram:
    """Return the latencies of the light tenant's requests, sent at a constant rate."""
    request = raw_request(caller.message, server.address, _PATH)
    (counts,) = drive(server.address, Load([request], constant(_LIGHT_PER_S, seconds)))
    assert not counts.errors, counts.errors
    return counts.latency


def beside(pool: ThreadPoolExecutor, server: Server, other: Caller, seconds: float) -> Future[float]:
    """Start a closed loop that begins half a second before the measurement and outlasts it."""
    load = pool.submit(closed, server, other, seconds + 2)
    time.sleep(0.5)
    return load


def anonymous(file: Path, rounds: int, seconds: float) -> list[float]:
    """Print the turns and return the ratio of each round."""
    ratios = []
    with cobatch(file, "table", True) as server, ThreadPoolExecutor() as pool:
        for _ in range(rounds):
            rates = []
            for other in (Caller(7), Caller(_ROWS)):
                load = beside(pool, server, other, seconds)
                rates.append(closed(server, Caller(7), seconds))
                others = load.result()
                wait_until_idle(server.pid)
            ratios.append(rates[1] / rates[0])
            print(f"  {rates[0]:,.0f}/s beside good, {rates[1]:,.0f}/s beside failing ({others:,.0f}/s)")
    return ratios


def tenants(file: Path, folder: Path, rounds: int, seconds: float) -> float:
    """Print the turns and return the ratio of the p99."""
    keys, lines = {}, []
    for name in ("light", "poisoner"):
        keys[name], entry = mint(name, ["infer"])
        lines.append(entry)
    (folder / "keys.toml").write_text("\n".join(lines))
    config = folder / "cobatch.toml"
    config.write_text('[auth]\napi_keys_file = "keys.toml"\n')
    good, failing = Caller(7, keys["light"]), Caller(_ROWS, keys["poisoner"])
    alone, disturbed = LatencyHistogram(), LatencyHistogram()
    with cobatch(file, "table", True, config) as server, ThreadPoolExecutor() as pool:
        light(server, good, 1.0)
        for _ in range(rounds):
            wait_until_idle(server.pid)
            before = light(server, good, seconds)
            load = beside(pool, server, failing, seconds)
            after = light(server, good, seconds)
            others = load.result()
            alone.merge(before)
            disturbed.merge(after)
            figures = f"{_p99_ms(before):.2f} ms alone, {_p99_ms(after):.2f} ms beside failing"
            print(f"  p99 {figures} ({others:,.0f}/s)")
    return _p99_ms(disturbed) / _p99_ms(alone)


def _p99_ms(latency: LatencyHistogram) -> float:
    return latency.quantile_us(0.99) / 1000


def main(arguments: list[str] | None = None) -> int:
    """Return 0; with --check 1 if a ratio misses its limit."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling.poison", description=about)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cobatch-poison-") as name:
        folder = Path(name)
        file = folder / "table.onnx"
        file.write_bytes(table())
        print("anonymous: answers per second of 16 good callers beside 16 others")
        kept = median(anonymous(file, options.rounds, options.seconds))
        print("tenants: a light tenant, alone and beside 16 callers of a tenant whose rows fail")
        p99 = tenants(file, folder, options.rounds, options.seconds)
    print(f"answers/s kept: {kept:.2f} (at least {_KEPT})")
    print(f"p99 of the light tenant: {p99:.2f} times (at most {_P99})")
    return 1 if options.check and (kept < _KEPT or p99 > _P99) else 0


if __name__ == "__main__":
    sys.exit(main())
