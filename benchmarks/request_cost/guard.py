"""Has the request path become more than 10 % costlier? Seconds, and the same answer each time, so CI can ask.

`python -m benchmarks.request_cost.guard [--update] [--time]`: what a request costs
(`benchmarks.request_cost.request_path`) is counted in instructions under valgrind's callgrind, which does not
vary with the machine's load, and divided by what the floor costs in the same run: so another processor or
another build of Python hardly changes it. With `--time`, CPU time stands for instructions, and only a
difference of 25 % counts. The baseline, guard.json, has figures for each minor version of Python; it is
changed by `--update` alone.
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
_NAME = re.compile(r"^desc: Trigger: Client Request: (.+)$", re.MULTILINE)
_TOTAL = re.compile(r"^totals: (\d+)$", re.MULTILINE)


def ratios(costs: Mapping[str, float]) -> dict[str, float]:
    """Of each case to the floor with as many callers at once."""
    floors = {CASES[case][2]: cost for case, cost in costs.items() if CASES[case][0] == "floor"}
    return {
        case: round(cost / floors[CASES[case][2]], 4)
        for case, cost in costs.items()
        if CASES[case][0] != "floor"
    }


def costlier(found: Mapping[str, float], baseline: Mapping[str, float], tolerance: float) -> list[str]:
    """Those cases that cost more than the baseline allows, or that it does not know."""
    return [case for case, ratio in found.items() if ratio > baseline.get(case, 0.0) * (1 + tolerance)]


def advice(worse: Sequence[str], method: str) -> str:
    """What a person does about cases that have become costlier."""
    named = "; ".join(worse)
    time = "" if method == "instructions" else " --time"
    return (
        f"costlier than the baseline by more than {TOLERANCE[method]:.0%}: {named}\n"
        f"Not meant? `git bisect run python -m benchmarks.request_cost.guard{time}` finds the commit.\n"
        f"The price of something wanted? `python -m benchmarks.request_cost.guard --update{time}`, "
        "and commit guard.json\n"
        "with a word on what is paid for."
    )


def tools() -> tuple[str, str] | None:
    """valgrind and a C compiler; None where one is missing."""
    valgrind, compiler = shutil.which("valgrind"), shutil.which("cc") or shutil.which("g++")
    return None if valgrind is None or compiler is None else (valgrind, compiler)


def counted(valgrind: str, compiler: str) -> dict[str, float]:
    """Instructions per request in each case, the fewest of some repeats."""
    with tempfile.TemporaryDirectory(prefix="cobatch-guard-") as folder:
        library, out = Path(folder, "counting.so"), Path(folder, "out")
        built = [compiler, "-shared", "-fPIC", "-x", "c", str(_COUNTING), "-o", str(library)]
        subprocess.run(built, check=True)
        command = [valgrind, "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        command += [sys.executable, "-m", "benchmarks.request_cost.request_path", str(library)]
        # The order of sets and dicts of text must not differ from run to run.
        environ = os.environ | {"PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"benchmarks.request_cost.request_path failed under callgrind: {done.stderr[-2000:]}"
            )
        costs = _read(Path(folder))
    return {case: costs[case] for case in CASES}


def _read(folder: Path) -> dict[str, float]:
    costs: dict[str, float] = {}
    for part in folder.glob("out.*"):
        text = part.read_text()
        name, total = _NAME.search(text), _TOTAL.search(text)
        if name is not None and total is not None:
            cost = int(total[1]) / REQUESTS
            costs[name[1]] = min(cost, costs.get(name[1], cost))
    return costs


def measured() -> dict[str, float]:
    """Microseconds of CPU per request in each case, the least of many rounds."""
    return {case: min(times) for case, times in uvloop.run(timed(_ROUNDS)).items()}


def main(arguments: list[str] | None = None) -> int:
    """0; 1 where a case has become costlier; 2 where there is nothing to count or to compare with."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request_cost.guard", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--update", action="store_true", help="make what is found the baseline")
    parser.add_argument("--time", action="store_true", help="by CPU time, where there is no valgrind")
    options = parser.parse_args(arguments)
    method = "time" if options.time else "instructions"
    found_tools = tools()
    if options.time:
        costs = measured()
    elif found_tools is None:
        print("needs valgrind and a C compiler (apt-get install valgrind g++); or --time", file=sys.stderr)
        return 2
    else:
        costs = counted(*found_tools)
    found = ratios(costs)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    baseline = known.get(method, {}).get(python, {})
    print(f"{method} per request, Python {python}; ratios to the floor's")
    for case, cost in costs.items():
        ratio = f"{found[case]:.3f} (baseline {baseline.get(case, 0.0):.3f})" if case in found else ""
        print(f"  {case:32} {cost:12,.1f}  {ratio}")
    if options.update:
        known.setdefault(method, {})[python] = found
        BASELINE.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        print(f"{BASELINE} now has these")
        return 0
    if not baseline:
        print(f"no baseline of {method} for Python {python}: add one with --update")
        return 2
    worse = costlier(found, baseline, TOLERANCE[method])
    if worse:
        print(advice(worse, method))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
