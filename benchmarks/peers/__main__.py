"""All servers side by side: `./scripts/bench-peers [--quick] [--only tiny,overload] [--peers A,B]`.

Makes an environment for each server (some minutes, once), measures, prints tables, and writes peers.json,
plots and README.md into benchmarks/results (`--quick`, or a part: benchmarks/out/peers/results). A server
that cannot be installed, does not start or answers wrongly is left out, with the reason on the page; for
cobatch that is an error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.common import wire
from benchmarks.common.processes import ROOT, some_of
from benchmarks.common.wrk import WrkError, require_wrk
from benchmarks.peers import overload, page, turns
from benchmarks.peers.catalogue import KNOWN, OURS, PEERS, Peer
from benchmarks.peers.environments import FOLDER, MissingError, python_of, versions_of
from benchmarks.peers.results import Results
from benchmarks.peers.servers import OUR_PYTHON, Running, started
from benchmarks.peers.tables import tables
from benchmarks.request_cost import answers
from benchmarks.request_cost.report import describe_machine

# Connections, and seconds of a turn: a batch of 64 of magika takes a third of a second or more.
_MODELS = {"tiny": ((1, 16, 64, 256), 2), "wide": ((16, 64, 256), 2), "magika": ((1, 16, 64, 256), 4)}
_SECTIONS = (*_MODELS, "overload")
_OVERLOAD_S = 6
_MAX_WAIT_MS = 2  # as apps/shared.py has it
_CHECKED = 32  # as benchmarks.request_cost.answers has it
_CANNOT = (MissingError, answers.WrongAnswerError, wire.RefusedError, WrkError, OSError)


class Bench:
    """One run: the servers that take part, and the results so far."""

    def __init__(self, options: argparse.Namespace, plans: Sequence[turns.Plan]) -> None:
        self._options = options
        self._plans = plans
        self._pythons: dict[str, Path] = {}
        settings = {
            "date": datetime.now(UTC).strftime("%d %b %Y"),
            "max_batch": options.max_batch,
            "max_wait_ms": _MAX_WAIT_MS,
            "checked": _CHECKED,
            "plans": [f"{plan.model} {plan.rounds} rounds of {plan.seconds} s" for plan in plans],
        }
        self.results = Results(describe_machine(), settings)

    def prepare(self) -> None:
        """Make the environments and read the versions."""
        for peer in self._options.peers:
            try:
                python = OUR_PYTHON if peer.is_ours else python_of(peer, self._options.environments)
                self.results.versions[peer.name] = versions_of(peer, python)
                self._pythons[peer.name] = python
            except MissingError as error:
                self._skip(peer, error)

    def run(self) -> None:
        began = time.monotonic()
        for plan in self._plans:
            self._closed(plan)
        if "overload" in self._options.only:
            self._overload()
        self.results.seconds = time.monotonic() - began

    def _closed(self, plan: turns.Plan) -> None:
        with ExitStack() as stack:
            servers: list[Running] = []
            for peer in self._present():
                try:
                    servers.append(self._ready(peer, plan.model, stack))
                except _CANNOT as error:
                    self._skip(peer, error)
            self.results.turns += turns.rounds(plan, servers)

    def _ready(self, peer: Peer, model: str, stack: ExitStack) -> Running:
        """Start a server, check and warm it up, and pause it until its turn."""
        print(f"{model}: starting {peer.title}", flush=True)
        running = stack.enter_context(started(peer, model, self._pythons[peer.name], self._options.max_batch))
        turns.check(running)
        turns.warm_up(running)
        running.pause()
        return running

    def _overload(self) -> None:
        for number in range(self._options.overload_rounds):
            for peer in self._present():
                python, size = self._pythons[peer.name], self._options.max_batch
                try:
                    measured = overload.measure(peer, python, size, self._options.overload_s, number)
                except _CANNOT as error:
                    self._skip(peer, error)
                    continue
                self.results.overload.append(measured)
                print(f"  {overload.shown(measured)}", flush=True)

    def _present(self) -> list[Peer]:
        return [peer for peer in self._options.peers if peer.name in self._pythons]

    def _skip(self, peer: Peer, error: Exception) -> None:
        if peer is OURS:
            raise error
        print(f"{peer.title} is left out: {error}", flush=True)
        self.results.skipped[peer.name] = str(error)
        self._pythons.pop(peer.name, None)


def main(arguments: list[str] | None = None) -> int:
    """Return 0; 2 if cobatch itself could not be measured."""
    options = _parse(arguments)
    bench = Bench(options, _plans(options))
    try:
        require_wrk()
        bench.prepare()
        bench.run()
    except _CANNOT as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return 2
    for table in tables(bench.results):
        print(f"\n{table.title}\n{table.markdown()}")
    page.write(bench.results, options.results)
    print(f"\nwritten to {options.results}, in {bench.results.seconds / 60:.1f} minutes")
    return 0


def _plans(options: argparse.Namespace) -> list[turns.Plan]:
    plans = []
    for model, (connections, seconds) in _MODELS.items():
        if model in options.only:
            levels = options.connections or ((64,) if options.quick else connections)
            length = options.seconds or (1 if options.quick and model != "magika" else seconds)
            # Magika is slow and its figures vary little: one round less.
            rounds = max(1, options.rounds - 1) if model == "magika" else options.rounds
            plans.append(turns.Plan(model, levels, rounds, length))
    return plans


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./scripts/bench-peers", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round with 64 connections")
    parser.add_argument(
        "--only", type=some_of(_SECTIONS), default=_SECTIONS, help=f"some of {','.join(_SECTIONS)}"
    )
    names = tuple(peer.name for peer in PEERS)
    known = ",".join(peer.name for peer in KNOWN)
    text = f"some of {known} (default: all but the last)"
    parser.add_argument("--peers", type=some_of(tuple(known.split(","))), default=names, help=text)
    parser.add_argument(
        "--connections", type=_numbers, help="with each model (default: 1,16,64,256; wide: not 1)"
    )
    parser.add_argument("--rounds", type=int, help="of the closed loops (default: 3; magika has one less)")
    parser.add_argument("--seconds", type=int, help="of each turn (default: 2; magika: 4)")
    parser.add_argument("--overload-rounds", type=int, help="(default: 1)", default=1)
    parser.add_argument("--max-batch", type=int, default=64, help="rows in a batch at most (default: 64)")
    parser.add_argument(
        "--environments",
        type=Path,
        metavar="FOLDER",
        default=FOLDER,
        help="the folder of the environments (default: benchmarks/out/peers)",
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="output folder")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.overload_s = 2 if options.quick else _OVERLOAD_S
    if options.results is None:
        whole = not options.quick and options.only == _SECTIONS and options.peers == names
        options.results = ROOT / "benchmarks" / "results" if whole else FOLDER / "results"
    options.peers = [peer for peer in KNOWN if peer.name in options.peers]
    return options


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
