"""How long a health check waits while many clients send large bodies at once.

`python -m benchmarks.hostile.crowd [--clients 400] [--mib 4] [--asgi]`

The clients, in a process of their own, connect, then send one binary request each as fast as it is taken.
Prints the waits of health checks meanwhile, asked every 2 ms, and the seconds until all were answered.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import selectors
import socket
import statistics
import sys
import time
from contextlib import ExitStack

from benchmarks.common.processes import cobatch
from benchmarks.hostile.__main__ import Prober
from benchmarks.memory import FLAGS, request_of, sum_model

_TIMEOUT_S = 120.0


def send_all(address: str, clients: int, mib: int) -> float:
    """Send a request from each client at the same time; return the seconds until the last answer."""
    host, _, port = address.rpartition(":")
    request = memoryview(request_of(mib))
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(clients):
            client = stack.enter_context(socket.create_connection((host, int(port)), _TIMEOUT_S))
            client.setblocking(False)
            selector.register(client, selectors.EVENT_WRITE, [0])
        began_s = time.monotonic()
        while selector.get_map():
            for key, events in selector.select():
                client = key.fileobj  # type: ignore[assignment]
                if events & selectors.EVENT_READ:
                    assert client.recv(1 << 16).startswith(b"HTTP/1.1 ")  # with 503 where the queue is full
                    selector.unregister(client)
                    continue
                sent = key.data
                sent[0] += client.send(request[sent[0] : sent[0] + (1 << 20)])
                if sent[0] == len(request):
                    selector.modify(client, selectors.EVENT_READ)
        return time.monotonic() - began_s


def main() -> int:
    """Print the waits."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hostile.crowd", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--clients", type=int, default=400)
    parser.add_argument("--mib", type=int, default=4, help="size of each body")
    parser.add_argument("--asgi", action="store_true", help="without the fast path")
    options = parser.parse_args()
    with (
        cobatch(sum_model(), "sum", not options.asgi, flags=FLAGS) as server,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        pool.apply(json.dumps, (None,))  # it has started
        prober = Prober(server.address, "GET", "/v2/health/live", None)
        prober.start()
        took_s = pool.apply(send_all, (server.address, options.clients, options.mib))
        prober.stopped = True
        prober.join()
        waits_ms = sorted(wait_s * 1e3 for _, wait_s in prober.waits)
    cuts = statistics.quantiles(waits_ms, n=100)
    print(f"{options.clients} clients with {options.mib} MiB each took {took_s:.1f} s")
    print(f"{len(waits_ms)} health checks: median {cuts[49]:.1f}, 99th percentile {cuts[98]:.1f},", end=" ")
    print(f"longest {waits_ms[-1]:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
