"""The longest waits of others while the server reads, runs and answers one hostile request.

`python -m benchmarks.hostile [--limit-ms 50] [--only TEXT] [--tries N] [--asgi] [--processes N]
[--json FILE]`

One thread asks for `/v2/health/live` and another one infers, on connections of their own, as fast as they are
answered, but at most every 2 ms; with several processes, two threads for each front. Each attack
(`benchmarks.hostile.bodies`) is sent alone; the time counted is from its first byte to its last answer. The
first line, without an attack, is the machine's own part. On a busy machine send each several times
(`--tries`): of its longest waits the least one is taken. Exits with 1 if a wait is over the limit.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple, Self

import onnx
from onnx import NodeProto, TensorProto, helper

from benchmarks.common.models import OUT, model_path
from benchmarks.common.processes import cobatch
from benchmarks.common.procstat import descendants, memory_bytes
from benchmarks.hostile.bodies import Attack, attacks

_EVERY_S = 0.002
_QUIET_S = 2.0
Axes = list[str | int]
_WIDTHS = (6, 11, 11, 8, 7, 7, 5)
_TIMEOUT_S = 120.0
_TINY = json.dumps({"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [0.5] * 16}]})


class Line(NamedTuple):
    """The result of one attack: the longest waits for health and for a good answer."""

    name: str
    status: int
    sent_bytes: int
    answered_bytes: int
    took_ms: float
    health_ms: float
    infer_ms: float
    memory_mib: float

    def longest_ms(self) -> float:
        """The longer of both waits."""
        return max(self.health_ms, self.infer_ms)


class Probers:
    """Probers of health and of inference, of each as many as there are fronts, or one."""

    def __init__(self, address: str, fronts: int) -> None:
        self.health = [Prober(address, "GET", "/v2/health/live", None) for _ in range(fronts)]
        self.infer = [Prober(address, "POST", "/v2/models/tiny/infer", _TINY) for _ in range(fronts)]

    def __enter__(self) -> Self:
        for prober in [*self.health, *self.infer]:
            prober.start()
        return self

    def __exit__(self, *_: object) -> None:
        for prober in [*self.health, *self.infer]:
            prober.stopped = True
            prober.join()

    def longest_ms(self, began_s: float, ended_s: float) -> tuple[float, float]:
        """Return the longest waits for health and for an answer between these times."""
        health = max(prober.longest_ms(began_s, ended_s) for prober in self.health)
        return health, max(prober.longest_ms(began_s, ended_s) for prober in self.infer)


class Prober(threading.Thread):
    """Sends one small request after another and notes when each was sent and how long it took."""

    def __init__(self, address: str, method: str, path: str, body: str | None) -> None:
        super().__init__(daemon=True)
        self._connection = http.client.HTTPConnection(address, timeout=_TIMEOUT_S)
        self._request = method, path, body
        self.waits: list[tuple[float, float]] = []
        self.stopped = False

    def run(self) -> None:
        while not self.stopped:
            began_s = time.perf_counter()
            self._connection.request(*self._request)
            self._connection.getresponse().read()
            self.waits.append((began_s, time.perf_counter() - began_s))
            time.sleep(_EVERY_S)

    def longest_ms(self, began_s: float, ended_s: float) -> float:
        """The longest wait of a request that was under way between these times."""
        while not self.waits or self.waits[-1][0] < ended_s:
            time.sleep(_EVERY_S)
        waits = [wait_s for sent_s, wait_s in self.waits if sent_s + wait_s > began_s and sent_s < ended_s]
        return max(waits, default=0.0) * 1e3


def send(address: str, attack: Attack) -> tuple[int, int]:
    """Send an attack; return its status and the bytes of its answer, 0 if the connection was closed."""
    host, _, port = address.partition(":")
    lines = [f"POST {attack.path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(attack.body)}"]
    lines += [f"{name}: {value}" for name, value in attack.headers.items()]
    with socket.create_connection((host, int(port)), _TIMEOUT_S) as client:
        try:
            client.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode())
            client.sendall(attack.body)
        except OSError:
            pass  # it is refused by its length
        head, size = b"", 0
        try:
            while data := client.recv(1 << 20):
                head = (head + data)[:12]
                size += len(data)
        except OSError:
            pass
    return (int(head[9:12]) if head.startswith(b"HTTP/1.1 ") else 0), size


def write_models(folder: Path) -> list[str]:
    """Write the attacked models; return their names."""
    node = helper.make_node
    number, flag, text, integer = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.STRING, TensorProto.INT64
    n: Axes = ["batch", "n"]
    sums = [node("ReduceSum", ["x", "one"], ["y"])]
    products = [
        node("Unsqueeze", ["x", "one"], ["rows"]),
        node("Unsqueeze", ["x", "two"], ["columns"]),
        node("Mul", ["rows", "columns"], ["y"]),
    ]
    texts = [node("Cast", ["x"], ["y"], to=text)]
    constants = [helper.make_tensor(name, integer, [1], [value]) for name, value in (("one", 1), ("two", 2))]
    written: dict[str, tuple[list[NodeProto], int, Axes, int, Axes]] = {
        "width": ([node("Neg", ["x"], ["y"])], number, n, number, n),
        "sum": (sums, number, n, number, ["batch", 1]),
        "sum-3": (sums, number, ["batch", "n", "m"], number, ["batch", 1, "m"]),
        "truth": ([node("Identity", ["x"], ["y"])], flag, n, flag, n),
        "any-truth": ([node("Not", ["x"], ["y"])], flag, n, flag, n),
        "text": ([node("Identity", ["x"], ["y"])], text, n, text, n),
        "outer": (products, number, n, number, ["batch", "n", "n"]),
        "labels": (texts, integer, n, text, n),
        "unforeseen": (texts, integer, n, text, ["batch", "m"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (nodes, taken, axes, given, kept) in written.items():
        x = helper.make_tensor_value_info("x", taken, axes)
        y = helper.make_tensor_value_info("y", given, kept)
        names = {one for made in nodes for one in made.input}
        graph = helper.make_graph(nodes, "graph", [x], [y], [one for one in constants if one.name in names])
        built = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
        onnx.checker.check_model(built)
        (folder / f"{name}.onnx").write_bytes(built.SerializeToString())
    return list(written)


def configure(folder: Path) -> Path:
    """Write the models, and a configuration that serves them beside *tiny*; return its path."""
    names = write_models(folder)
    tables = [f'[[models]]\npath = "{folder / name}.onnx"\nname = "{name}"\n' for name in names]
    tables.append(f'[[models]]\npath = "{model_path("tiny")}"\n')
    config = folder / "cobatch.toml"
    config.write_text("\n".join(tables))
    return config


def main() -> int:
    """Return 0; 1 if a wait was over the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__.splitlines()[0])
    parser.add_argument("--limit-ms", type=float, default=50.0)
    parser.add_argument("--only", default="", help="attacks whose name has this text")
    parser.add_argument("--tries", type=int, default=1, help="send each so often; the best try counts")
    parser.add_argument("--asgi", action="store_true", help="without the fast path")
    parser.add_argument("--processes", type=int, default=1, help="of the server")
    parser.add_argument("--json", type=Path, help="write the lines to this file")
    options = parser.parse_args()
    config = configure(OUT / "hostile")
    lines = []
    flags = ["--processes", str(options.processes)]
    with (
        cobatch(None, None, not options.asgi, config, flags) as server,
        Probers(server.address, max(1, options.processes - 1)) as probers,
    ):
        began_s = time.perf_counter()
        time.sleep(_QUIET_S)
        names = ("status", "sent", "answer", "took", "health", "infer", "MiB")
        print(f"{'attack':44}", *(f"{name:>{width}}" for name, width in zip(names, _WIDTHS, strict=True)))
        lines.append(_line("(none)", (0, 0), 0, began_s, probers, server.pid))
        _show(lines[-1])
        for attack in attacks():
            if options.only in attack.name:
                tries = []
                for _ in range(options.tries):
                    began_s = time.perf_counter()
                    answer = send(server.address, attack)
                    tries.append(_line(attack.name, answer, len(attack.body), began_s, probers, server.pid))
                lines.append(min(tries, key=Line.longest_ms))
                _show(lines[-1])
    if options.json:
        options.json.write_text(json.dumps([line._asdict() for line in lines], indent=1) + "\n")
    worst = max(lines[1:], key=Line.longest_ms)
    over = [line.name for line in lines[1:] if line.longest_ms() > options.limit_ms]
    print(f"longest: {worst.longest_ms():.1f} ms ({worst.name}); over the limit: {len(over)}")
    return 1 if over else 0


def _line(name: str, answer: tuple[int, int], sent: int, began_s: float, probers: Probers, pid: int) -> Line:
    ended_s = time.perf_counter()
    health_ms, infer_ms = probers.longest_ms(began_s, ended_s)
    took_ms = (ended_s - began_s) * 1e3
    memory_mib = sum(memory_bytes(one) for one in descendants(pid)) / (1 << 20)
    return Line(name, answer[0], sent, answer[1], took_ms, health_ms, infer_ms, memory_mib)


def _show(line: Line) -> None:
    shown = [f"{line.status}", f"{line.sent_bytes:,}", f"{line.answered_bytes:,}", f"{line.took_ms:.0f}"]
    shown += [f"{line.health_ms:.1f}", f"{line.infer_ms:.1f}", f"{line.memory_mib:.0f}"]
    cells = [f"{text:>{width}}" for text, width in zip(shown, _WIDTHS, strict=True)]
    print(f"{line.name:44}", *cells, flush=True)


if __name__ == "__main__":
    sys.exit(main())
