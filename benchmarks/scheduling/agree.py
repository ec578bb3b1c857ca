"""Does `cobatch bench` measure what an independent tool measures? wrk and it put the same load on one server,
in turns, with the same request.

`python -m benchmarks.scheduling.agree [--rounds 5] [--seconds 4]`. Below capacity: wrk's callers think for a
while between an answer and their next request, wrk says when each request left, and `cobatch bench` sends
requests at those very moments, in an open loop. So the server has the same to do, and what is compared is how
each tool measures: latency from the sending, for wrk knows no other. At capacity: both as closed loops. There
a tool's own work is part of what it measures: at one connection nothing runs while the tool computes, and at
many, on a machine that tool and server share, the cheaper tool gets more out of the server. So that is
compared only where a request costs the server far more than the tool (*wide*); for *tiny* it is shown.

A round's figures are compared with each other, since the machine's speed changes between rounds; prints
medians, and ends with status 1 if requests per second, p50 or p90 differ by more than 10 % where it counts.
p99 is shown beside them: a few hiccups of the machine decide it, each tool has its own, and in a closed loop
wrk adds to the slow ones what it would have sent meanwhile (its stats_correct).
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

import numpy as np

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.processes import ROOT, cobatch
from benchmarks.common.wrk import require_wrk, run_wrk

_WITHIN = 0.10

# wrk's script: think, note when a request leaves on the monotonic clock, print that and percentiles.
_PACED = """
local ffi = require("ffi")
ffi.cdef[[
  typedef struct { long seconds; long nanoseconds; } moment_t;
  int clock_gettime(int clock, moment_t *moment);
]]
local moment = ffi.new("moment_t")
local file = assert(io.open("BODY", "rb"))
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Content-Type"] = "application/json"
local threads, whole = {}, nil
sent = {}
function setup(thread) threads[#threads + 1] = thread end
function init() whole = wrk.format() end
function delay() return math.random(SHORTEST, LONGEST) end
function request()
  ffi.C.clock_gettime(1, moment)
  sent[#sent + 1] = tonumber(moment.seconds) + tonumber(moment.nanoseconds) / 1e9
  return whole
end
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format("\\n#wrk %d %d %d %d %d\\n", summary.requests, latency:percentile(50),
    latency:percentile(90), latency:percentile(99), errors.connect + errors.read + errors.write
    + errors.timeout + errors.status))
  for _, one in ipairs(threads[1]:get("sent")) do io.write(string.format("#sent %.6f\\n", one)) end
end
"""


@dataclass(frozen=True, slots=True)
class Case:
    """`think_ms`: how long a caller waits between an answer and its next request; None: not at all."""

    model: str
    connections: int
    think_ms: tuple[int, int] | None
    counts: bool = True

    @property
    def title(self) -> str:
        """For a person."""
        callers = "1 caller" if self.connections == 1 else f"{self.connections} callers"
        think = "" if self.think_ms is None else ", thinking {} to {} ms".format(*self.think_ms)
        return f"{self.model}, {callers}{think}{'' if self.counts else ' (does not count)'}"


_CASES = (
    Case("tiny", 1, (1, 3)),
    Case("tiny", 16, (2, 14)),
    Case("wide", 16, (20, 60)),
    Case("wide", 1, None),
    Case("wide", 16, None),
    Case("tiny", 1, None, counts=False),
    Case("tiny", 16, None, counts=False),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one tool saw in one turn; p90 is 0 where wrk was not asked for it."""

    per_s: float
    p50_us: float
    p90_us: float
    p99_us: float


_SHOWN = {"per_s": "requests/s", "p50_us": "p50, us", "p90_us": "p90, us", "p99_us": "p99, us"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduling.agree")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    options = parser.parse_args()
    print("| case | | wrk | cobatch bench | ratio (lowest-highest) |\n|---|---|---:|---:|---:|")
    agrees = True
    for case in _CASES:
        with (
            cobatch(model_path(case.model), case.model, True) as server,
            tempfile.TemporaryDirectory(prefix="cobatch-agree-") as folder,
        ):
            url = f"http://{server.address}/v2/models/{case.model}/infer"
            rounds = [turns(url, case, options.seconds, Path(folder)) for _ in range(options.rounds)]
        agrees &= show(case, rounds) or not case.counts
    return 0 if agrees else 1


def turns(url: str, case: Case, seconds: int, folder: Path) -> tuple[Seen, Seen]:
    """wrk, then `cobatch bench`."""
    rows = wire.rows_of(case.model, 1, 0)
    np.save(folder / "x.npy", rows)
    message = wire.encode(case.model, rows, binary=False)
    run_wrk(url, message.body, message.headers, case.connections, 1)
    same = [f"--connections={case.connections}", f"--input=x={folder / 'x.npy'}"]
    if case.think_ms is None:
        load = run_wrk(url, message.body, message.headers, case.connections, seconds)
        wrk = Seen(load.requests / load.duration_us * 1e6, load.p50_us, 0.0, load.p99_us)
        return wrk, ours(url, [*same, f"--seconds={seconds}"], folder)
    (folder / "body").write_bytes(message.body)
    wrk = thinking(url, case.connections, case.think_ms, seconds, folder)
    # As many as there may be: at wrk's moments requests leave, answered or not.
    return wrk, ours(url, [*same[1:], f"--arrivals={folder / 'sent.csv'}"], folder)


def thinking(url: str, connections: int, think_ms: tuple[int, int], seconds: int, folder: Path) -> Seen:
    """wrk's callers think; when their requests left is in `sent.csv`."""
    script = _PACED.replace("BODY", str(folder / "body"))
    script = script.replace("SHORTEST", str(think_ms[0])).replace("LONGEST", str(think_ms[1]))
    (folder / "paced.lua").write_text(script)
    command = [
        require_wrk(),
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "-s",
        str(folder / "paced.lua"),
        url,
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in said.splitlines() if line.startswith("#")]
    requests, p50, p90, p99, errors = (int(one) for one in lines[0][1:])
    sent = [float(moment) for _, moment in lines[1:]]
    if errors or not requests:
        raise SystemExit(f"wrk: {requests} answers, {errors} errors")
    (folder / "sent.csv").write_text("".join(f"{moment:.6f}\n" for moment in sent))
    return Seen(len(sent) / (sent[-1] - sent[0]), p50, p90, p99)


def ours(url: str, options: list[str], folder: Path) -> Seen:
    """The same with `cobatch bench`."""
    file = folder / "figures.json"
    command = [sys.executable, "-m", "cobatch", "bench", url, "--quiet", "--json", str(file), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    run = json.loads(file.read_text())["runs"][0]
    latency_us = {name: value * 1000 for name, value in run["sent_latency_ms"].items()}
    return Seen(run["total"]["answered_rate"], latency_us["p50"], latency_us["p90"], latency_us["p99"])


def show(case: Case, rounds: list[tuple[Seen, Seen]]) -> bool:
    """Print a case; whether the two agree."""
    agrees = True
    for name, title in _SHOWN.items():
        pairs = [(getattr(wrk, name), getattr(own, name)) for wrk, own in rounds]
        if not all(wrk for wrk, _ in pairs):
            continue
        ratios = sorted(own / wrk for wrk, own in pairs)
        theirs, own = (median(side) for side in zip(*pairs, strict=True))
        print(
            f"| {case.title} | {title} | {theirs:,.0f} | {own:,.0f} "
            f"| {median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |",
            flush=True,
        )
        agrees &= name == "p99_us" or abs(median(ratios) - 1) <= _WITHIN
    return agrees


if __name__ == "__main__":
    sys.exit(main())
