"""The cost of a request inside POST /batch, compared with the same request alone.

`python -m benchmarks.request_cost.batch_route [--seconds 1] [--rounds 2] [--items 64] [--check]`

Two servers have the tiny model: one with the fast path, one with ASGI only. In each round wrk sends in turn
single infer requests on the fast path from 64 connections, the same through ASGI, and to the first server
batches of 64 items, from one connection (as many concurrent requests as before) and from four. The CPU time
of the server's processes (/proc) per infer request is compared, which includes reading, parsing and writing.
A single failed call fails the run. wrk sees only the outer status of a batch, so a batch is checked item by
item beforehand, and after each turn the model's statistics must count every item as successful.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from statistics import median

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.processes import Server, StartError, cobatch
from benchmarks.common.procstat import cpu_us
from benchmarks.common.turns import wait_until_idle
from benchmarks.common.wrk import WrkError, require_wrk, run_wrk

_CONNECTIONS = 64
_FOUR = "batch, 4 at once"
_INFER = "/v2/models/tiny/infer"
_TARGET = 0.5


def _batch_of(single: wire.Message, items: int) -> wire.Message:
    item = {"url": _INFER, "method": "POST", "body": json.loads(single.body)}
    requests = [{"id": str(number), **item} for number in range(items)]
    body = json.dumps({"requests": requests}, separators=(",", ":")).encode()
    return wire.Message(body, {"Content-Type": "application/json"})


def _check(server: Server, single: wire.Message, batch: wire.Message) -> None:
    """Raise WrkError unless each item of a batch gets the answer of the single request."""
    alone = json.loads(wire.post(server.address, _INFER, single).body)
    for item in json.loads(wire.post(server.address, "/batch", batch).body)["responses"]:
        if item["status"] != 200 or item["body"] != alone:
            raise WrkError(f"item {item['id']} was answered {item}, the single request {alone}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request_cost.batch_route", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seconds", type=int, default=1, help="seconds of each turn (default: 1)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of four turns (default: 2)")
    parser.add_argument("--items", type=int, default=64, help="items in a batch (default: 64)")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the target is missed")
    return parser.parse_args(arguments)


def _measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the CPU time per infer request in microseconds, for each way and round."""
    single = wire.encode("tiny", wire.rows_of("tiny", 1, 0), False)
    batch = _batch_of(single, options.items)
    path = model_path("tiny")
    used: dict[str, list[float]] = {}
    with ExitStack() as stack:
        fast = stack.enter_context(cobatch(path, "tiny", True))
        asgi = stack.enter_context(cobatch(path, "tiny", False))
        _check(fast, single, batch)
        ways = (
            ("fast path", fast, _INFER, single, 1, _CONNECTIONS),
            ("ASGI", asgi, _INFER, single, 1, _CONNECTIONS),
            ("batch", fast, "/batch", batch, options.items, 1),
            (_FOUR, fast, "/batch", batch, options.items, 4),
        )
        for number in range(options.rounds + 1):
            for who, server, target, message, each, connections in ways:
                cpu = _cpu_per_call(server, target, message, connections, options.seconds, each)
                if number:  # the first round warms up
                    used.setdefault(who, []).append(cpu / each)
    return used


def _cpu_per_call(
    server: Server, path: str, message: wire.Message, connections: int, seconds: int, items: int
) -> float:
    """Return the server's CPU time per call in microseconds. Raises WrkError unless every item succeeded."""
    wait_until_idle(server.pid)
    done, before = _done(server), cpu_us(server.pid)
    load = run_wrk(f"http://{server.address}{path}", message.body, message.headers, connections, seconds)
    used = cpu_us(server.pid) - before
    if _done(server) - done < load.requests * items:
        raise WrkError(f"{path}: some of the items were refused or failed")
    return used / load.requests


def _done(server: Server) -> int:
    """Return the number of infer requests that the model has answered with a result."""
    _, body = wire.get(server.address, "/v2/models/tiny/stats")
    return int(json.loads(body)["model_stats"][0]["inference_stats"]["success"]["count"])


def main(arguments: list[str] | None = None) -> int:
    """Return 0; with --check 1 if the target is missed; 2 if the measurement failed."""
    options = _parse(arguments)
    try:
        require_wrk()
        used = _measure(options)
    except (WrkError, StartError, wire.RefusedError, OSError) as error:
        print(f"benchmarks.request_cost.batch_route: {error}", file=sys.stderr)
        return 2
    for who, figures in used.items():
        print(f"{who:16}  {median(figures):6.1f} us of CPU per infer request")
    for who in ("fast path", "ASGI"):
        print(f"batch / {who}: {_ratio(used, 'batch', who):.2f} (target: below {_TARGET})")
    print(f"{_FOUR} / fast path: {_ratio(used, _FOUR, 'fast path'):.2f}")
    return 1 if options.check and _ratio(used, "batch", "fast path") >= _TARGET else 0


def _ratio(used: dict[str, list[float]], batch: str, alone: str) -> float:
    """Return the median of the rounds' ratios."""
    return median(one / other for one, other in zip(used[batch], used[alone], strict=True))


if __name__ == "__main__":
    sys.exit(main())
