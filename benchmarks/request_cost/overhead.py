"""The cost of cobatch compared with a server that does nothing, and with the model alone.

`python -m benchmarks.request_cost.overhead [--quick] [--only tiny,wide,magika,asgi] [--check]`

For each case cobatch is started, and beside it the floor (bare uvicorn that answers with as many fixed
bytes), the model alone in a process (offline), or both. A round measures the references, cobatch, and the
references again; its ratio compares cobatch with the mean of the two, which cancels a drift of the machine's
speed. The median of the rounds' ratios is reported. Answers are compared with a direct run before anything is
timed, and a single failed request fails the run.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.offline import offline
from benchmarks.common.processes import Server, StartError, cobatch, floor, some_of
from benchmarks.common.turns import Turn, mean_turn, offline_turn, serve_turn, wait_until_idle
from benchmarks.common.wrk import WrkError, require_wrk
from benchmarks.request_cost import answers, report
from benchmarks.request_cost.cases import CASES, GROUPS, Case, Figure, Result, Round

_WARM_UP_S = 1
_AGAINST_FLOOR = (Figure.CPU, Figure.LATENCY, Figure.SINGLE)
_FAILURES = (WrkError, StartError, wire.RefusedError, answers.WrongAnswerError, OSError)
_AGAINST_OFFLINE = (Figure.RATE, Figure.SINGLE)


class Bench:
    """The processes of a case."""

    def __init__(self, case: Case, seconds: int, stack: ExitStack) -> None:
        self._case = case
        self._seconds = max(seconds, case.at_least_s)
        self._path = f"/v2/models/{case.model}/infer"
        file = model_path(case.model)
        self._request = wire.encode(case.model, wire.rows_of(case.model, 1, 0), case.binary)
        self._server = stack.enter_context(cobatch(file, case.model, case.fast_path))
        answers.check(self._server.address, self._path, case.model, file, case.binary)
        self._floor: Server | None = None
        if case.figure in _AGAINST_FLOOR:
            answer = wire.post(self._server.address, self._path, self._request)
            kind = {key.lower(): value for key, value in answer.headers.items()}["content-type"]
            self._floor = stack.enter_context(floor(len(answer.body), kind))
        self._offline = stack.enter_context(offline(file, case.model)) if self._needs_offline else None
        # A single caller's request costs a run of one row; the rate is bounded by that of the best size.
        self._rows = self._offline.best_size() if self._offline and case.figure is Figure.RATE else 1
        for who, server in (("cobatch", self._server), ("floor", self._floor)):
            if server is not None:
                self._serve(who, server, _WARM_UP_S, trace=False)

    @property
    def _needs_offline(self) -> bool:
        return self._case.figure in _AGAINST_OFFLINE

    def round(self) -> Round:
        """Measure the references, cobatch, and the references again in the opposite order."""
        around = max(1, (self._seconds + 1) // 2)
        floors: list[Turn] = []
        offlines: list[Turn] = []
        self._measure_offline(offlines, around)
        self._measure_floor(floors, around)
        ours = self._serve("cobatch", self._server, self._seconds, trace=self._case.figure is Figure.RATE)
        self._measure_floor(floors, around)
        self._measure_offline(offlines, around)
        return Round(
            ours,
            mean_turn(floors) if floors else None,
            mean_turn(offlines) if offlines else None,
        )

    def _measure_floor(self, turns: list[Turn], seconds: int) -> None:
        if self._floor is not None:
            turns.append(self._serve("floor", self._floor, seconds, trace=False))

    def _measure_offline(self, turns: list[Turn], seconds: int) -> None:
        if self._offline is not None:
            # Requests left by wrk would slow down the reference.
            wait_until_idle(self._server.pid)
            turns.append(offline_turn(self._offline, self._rows, seconds))

    def _serve(self, who: str, server: Server, seconds: int, *, trace: bool) -> Turn:
        return serve_turn(who, server, self._path, self._request, self._case.connections, seconds, trace)


def measure(case: Case, rounds: int, seconds: int, console: Console) -> Result:
    """Start the servers of a case and measure it."""
    result = Result(case)
    with ExitStack() as stack:
        console.print(f"{case.title}: starting", style="dim")
        bench = Bench(case, seconds, stack)
        for number in range(1, rounds + 1):
            result.rounds.append(bench.round())
            console.print(f"  round {number} of {rounds}: {result.ratios[-1]:.3f}", style="dim")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Return 0; with --check 1 if a target is missed; 2 if the measurement failed."""
    options = _parse(arguments)
    progress = Console(stderr=True)
    try:
        require_wrk()
        results = [
            measure(case, options.rounds, options.seconds, progress)
            for case in CASES
            if case.group in options.only
        ]
    except _FAILURES as error:
        progress.print(f"benchmarks.request_cost.overhead: {error}", style="bold red", markup=False)
        return 2
    report.show(results, report.wide_console(), options.markdown)
    if options.json is not None:
        report.write(results, options.json, options.rounds, options.seconds)
    return 1 if options.check and not all(result.met for result in results) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request_cost.overhead", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one round of one second")
    parser.add_argument("--rounds", type=int, help="rounds of each case (default: 3)")
    parser.add_argument("--seconds", type=int, help="seconds of cobatch's turn in a round (default: 3)")
    parser.add_argument(
        "--only", type=some_of(GROUPS), default=GROUPS, metavar="GROUPS", help=f"some of {','.join(GROUPS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every turn to a file")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a target is missed")
    options = parser.parse_args(arguments)
    for name, usual in (("rounds", 3), ("seconds", 3)):
        if getattr(options, name) is None:
            setattr(options, name, 1 if options.quick else usual)
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
