"""The accuracy of `cobatch bench`: it and wrk put the same load on a server, in turns, with the same request.

`python -m benchmarks.scheduling.agree [--rounds 5] [--seconds 4]`. Below capacity wrk's callers think between
an answer and their next request; wrk records when each request left, and `cobatch bench` sends requests at
the same times in an open loop. So the server has the same load, and the tools' measurements are compared:
latency from the time of sending, which is all that wrk measures. At capacity both run closed loops, and a
tool's own work is part of its measurement: with one connection nothing runs while the tool computes, and with
many, on a shared machine, the cheaper tool gets more from the server. So that is compared only where a
request costs the server far more than the tool (*wide*); for *tiny* it is shown.

The figures of a round are compared with each other, since the machine's speed changes between rounds. Prints
medians; the exit status is 1 if requests per second, p50 or p90 differ by more than 10 % in a case that
counts. p99 is only shown: it depends on a few interruptions of the machine, which differ between the tools,
and in a closed loop wrk corrects it for the requests that it would have sent meanwhile (stats_correct).
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
from benchmarks.common.wrk import CLOCK, require_wrk, run_wrk

_WITHIN = 0.10

# A script of wrk that thinks, records the time of each request, and prints these and percentiles.
_PACED = """
local file = assert(io.open("BODY", "rb"))
wrk.method, wrk.body = "POST", file:read("*a")
wrk.headers["Content-Type"] = "application/json"
local threads, whole = {}, nil
sent = {}
function setup(thread) threads[#threads + 1] = thread end
function init() whole = wrk.format() end
function delay() return math.random(SHORTEST, LONGEST) end
function request()
  sent[#sent + 1] = now()
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
    """`think_ms` is the pause between an answer and the next request; None: no pause."""

    model: str
    connections: int
    think_ms: tuple[int, int] | None
    counts: bool = True

    @property
    def title(self) -> str:
        """The name in the table."""
        callers = "1 caller" if self.connections == 1 else f"{self.connections} callers"
        think = "" if self.think_ms is None else ", thinking {} to {} ms".format(*self.think_ms)
        return f"{self.model}, {callers}{think}{'' if self.counts else ' (only shown)'}"


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
class Measurement:
    """The figures of one tool in one turn; p90 is 0 if wrk did not report it."""

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


def turns(url: str, case: Case, seconds: int, folder: Path) -> tuple[Measurement, Measurement]:
    """Measure with wrk, then with `cobatch bench`."""
    rows = wire.rows_of(case.model, 1, 0)
    np.save(folder / "x.npy", rows)
    message = wire.encode(case.model, rows, binary=False)
    run_wrk(url, message.body, message.headers, case.connections, 1)
    same = [f"--connections={case.connections}", f"--input=x={folder / 'x.npy'}"]
    if case.think_ms is None:
        load = run_wrk(url, message.body, message.headers, case.connections, seconds)
        wrk = Measurement(load.requests / load.duration_us * 1e6, load.p50_us, 0.0, load.p99_us)
        return wrk, ours(url, [*same, f"--seconds={seconds}"], folder)
    (folder / "body").write_bytes(message.body)
    wrk = thinking(url, case.connections, case.think_ms, seconds, folder)
    # Without a limit of connections: requests leave at wrk's times, answered or not.
    return wrk, ours(url, [*same[1:], f"--arrivals={folder / 'sent.csv'}"], folder)


def thinking(
    url: str, connections: int, think_ms: tuple[int, int], seconds: int, folder: Path
) -> Measurement:
    """Measure with wrk and thinking callers; write the times of their requests to `sent.csv`."""
    script = (CLOCK + _PACED).replace("BODY", str(folder / "body"))
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
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.split() for line in output.splitlines() if line.startswith("#")]
    requests, p50, p90, p99, errors = (int(one) for one in lines[0][1:])
    sent = [float(moment) for _, moment in lines[1:]]
    if errors or not requests:
        raise SystemExit(f"wrk: {requests} answers, {errors} errors")
    (folder / "sent.csv").write_text("".join(f"{moment:.6f}\n" for moment in sent))
    return Measurement(len(sent) / (sent[-1] - sent[0]), p50, p90, p99)


def ours(url: str, options: list[str], folder: Path) -> Measurement:
    """Measure with `cobatch bench`."""
    file = folder / "figures.json"
    command = [sys.executable, "-m", "cobatch", "bench", url, "--quiet", "--json", str(file), *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    run = json.loads(file.read_text())["runs"][0]
    latency_us = {name: value * 1000 for name, value in run["sent_latency_ms"].items()}
    return Measurement(run["total"]["answered_rate"], latency_us["p50"], latency_us["p90"], latency_us["p99"])


def show(case: Case, rounds: list[tuple[Measurement, Measurement]]) -> bool:
    """Print a case, and return True if the tools agree."""
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
