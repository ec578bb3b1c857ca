"""A guard against a costlier request path: fails at 10 % more than the baseline, reproducibly, in seconds.

`python -m benchmarks.request_cost.guard [--update] [--time]` counts the instructions of a request
(`benchmarks.request_cost.request_path`) under valgrind's callgrind, which do not depend on the machine's
load, and divides them by those of the floor in the same run: another processor or build of Python hardly
changes the ratio. With `--time` it measures CPU time, and only a difference of 25 % counts. The baseline,
guard.json, has figures for each minor version of Python; only `--update` changes it.

`--link` counts those of a front and home instead (`benchmarks.request_cost.link_path`), without a baseline,
and prints their ratios to one process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvloop

from benchmarks.request_cost.request_path import CASES, REQUESTS, timed

BASELINE = Path(__file__).parent / "guard.json"
TOLERANCE = {"instructions": 0.10, "time": 0.25}
_COUNTING = Path(__file__).parent / "counting.c"
_ROUNDS = 40
_REQUEST_PATH = "benchmarks.request_cost.request_path"
_LINK_PATH = "benchmarks.request_cost.link_path"
_NAME = re.compile(r"^desc: Trigger: Client Request: (.+)$", re.MULTILINE)
_TOTAL = re.compile(r"^totals: (\d+)$", re.MULTILINE)


def ratios(costs: Mapping[str, float]) -> dict[str, float]:
    """Return the ratio of each case to the floor with as many concurrent callers."""
    floors = {CASES[case][2]: cost for case, cost in costs.items() if CASES[case][0] == "floor"}
    return {
        case: round(cost / floors[CASES[case][2]], 4)
        for case, cost in costs.items()
        if CASES[case][0] != "floor"
    }


def costlier(current: Mapping[str, float], baseline: Mapping[str, float], tolerance: float) -> list[str]:
    """Return the cases that cost more than the baseline allows or are not in it."""
    return [case for case, ratio in current.items() if ratio > baseline.get(case, 0.0) * (1 + tolerance)]


def advice(worse: Sequence[str], method: str) -> str:
    """Return advice about cases that have become costlier."""
    named = "; ".join(worse)
    time = "" if method == "instructions" else " --time"
    return (
        f"costlier than the baseline by more than {TOLERANCE[method]:.0%}: {named}\n"
        f"To find the commit: `git bisect run python -m benchmarks.request_cost.guard{time}`\n"
        f"To accept the new cost: `python -m benchmarks.request_cost.guard --update{time}`, "
        "and commit guard.json with the reason."
    )


def tools() -> tuple[str, str] | None:
    """Return the paths of valgrind and a C compiler; None if one is missing."""
    valgrind, compiler = shutil.which("valgrind"), shutil.which("cc") or shutil.which("g++")
    return None if valgrind is None or compiler is None else (valgrind, compiler)


def counted(
    valgrind: str, compiler: str, module: str = _REQUEST_PATH, requests: int = REQUESTS
) -> dict[str, float]:
    """Return the instructions per request of each case of a module, the minimum of some repeats."""
    with tempfile.TemporaryDirectory(prefix="cobatch-guard-") as folder:
        library, out = Path(folder, "counting.so"), Path(folder, "out")
        built = [compiler, "-shared", "-fPIC", "-x", "c", str(_COUNTING), "-o", str(library)]
        subprocess.run(built, check=True)
        command = [valgrind, "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        command += [sys.executable, "-m", module, str(library)]
        # A fixed order of sets and dicts of strings.
        environ = os.environ | {"PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{module} failed under callgrind: {done.stderr[-2000:]}")
        return _read(Path(folder), requests)


def _read(folder: Path, requests: int) -> dict[str, float]:
    costs: dict[str, float] = {}
    for part in folder.glob("out.*"):
        text = part.read_text()
        name, total = _NAME.search(text), _TOTAL.search(text)
        if name is not None and total is not None:
            cost = int(total[1]) / requests
            costs[name[1]] = min(cost, costs.get(name[1], cost))
    return costs


def measured() -> dict[str, float]:
    """Return the CPU time per request of each case in microseconds, the minimum of many rounds."""
    return {case: min(times) for case, times in uvloop.run(timed(_ROUNDS)).items()}


def _print_link(costs: Mapping[str, float]) -> int:
    for case, alone in sorted(costs.items()):
        if (both := costs.get(f"{case}, front and home")) is not None:
            print(f"{case:12}{alone:12,.0f}, front and home{both:12,.0f}   x{both / alone:.3f}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Return 0; 1 if a case has become costlier; 2 without valgrind or a baseline."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request_cost.guard", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--update", action="store_true", help="make the figures the baseline")
    parser.add_argument("--time", action="store_true", help="measure CPU time in place of instructions")
    parser.add_argument("--link", action="store_true", help="count a front and home beside one process")
    options = parser.parse_args(arguments)
    method = "time" if options.time else "instructions"
    programs = tools()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    baseline = known.get(method, {}).get(python, {})
    if options.link and programs is not None:
        return _print_link(counted(*programs, _LINK_PATH))
    if options.time:
        costs = measured()
    elif programs is None:
        print("valgrind or a C compiler is missing: apt-get install valgrind g++, or --time", file=sys.stderr)
        return 2
    else:
        found = counted(*programs)
        costs = {case: found[case] for case in CASES}
    current = ratios(costs)
    print(f"{method} per request, Python {python}; ratios to the floor")
    for case, cost in costs.items():
        ratio = f"{current[case]:.3f} (baseline {baseline.get(case, 0.0):.3f})" if case in current else ""
        print(f"  {case:32} {cost:12,.1f}  {ratio}")
    if options.update:
        known.setdefault(method, {})[python] = current
        BASELINE.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        print(f"written to {BASELINE}")
        return 0
    if not baseline:
        print(f"no baseline of {method} for Python {python}: add one with --update")
        return 2
    worse = costlier(current, baseline, TOLERANCE[method])
    if worse:
        print(advice(worse, method))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
