"""Serves magika's file-type model with cobatch, classifies real files through it, and checks the answers.

Started by ./scripts/demo, which prepares the environment first. Ends with 0 when every answer that was
checked is what the `magika` package itself says and the server stopped as it should; else with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import numpy as np
from rich.console import Console
from tritonclient.utils import InferenceServerException

from callers import Load, NoTimesError, Rows, call
from filetypes import FileTypes, Verdict, find_files, own_files
from report import Line, files_table, timing_table
from serving import Server, ServingError

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("bytes", "target_label")
CHECKED = 64  # files held against magika, spread evenly over all of them
TOLERANCE = 1e-3  # a row's score depends in its last digits on the batch that it rode in


class MismatchError(Exception):
    """The server's answer is not what it must be; the message says which file and both answers."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, help="classify its files as well")
    parser.add_argument("--serve", action="store_true", help="leave the server running until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="the server's port (default: any free one)")
    parser.add_argument("--callers", type=int, default=64, help="concurrent callers (default: 64)")
    parser.add_argument("--max-files", type=int, default=1000, help="from each directory (default: 1000)")
    parser.add_argument("--request", metavar="FILE", type=Path, help="only print FILE's infer request, JSON")
    options = parser.parse_args()
    if options.directory is not None and not options.directory.is_dir():
        parser.error(f"{options.directory} is not a directory")
    if options.callers < 1 or options.max_files < 1:
        parser.error("--callers and --max-files must be at least 1")
    return options


def print_request(types: FileTypes, path: Path) -> int:
    row = types.features(path)
    if row is None:
        print(f"demo: {path} is too short for the model", file=sys.stderr)
        return 1
    tensor = {"name": NAMES[0], "datatype": "INT32", "shape": [1, len(row)], "data": row.tolist()}
    print(json.dumps({"inputs": [tensor]}))
    return 0


def collect(options: argparse.Namespace) -> list[Path]:
    """The repository's own files and DIR's, each once."""
    found = own_files(ROOT)[: options.max_files]
    if options.directory:
        found += [path.resolve() for path in find_files(options.directory, options.max_files)]
    return list(dict.fromkeys(found))


def extract(types: FileTypes, files: Sequence[Path]) -> dict[Path, Rows | None]:
    """The model's input for each file, None for one too short; a file that vanished is left out."""
    rows: dict[Path, Rows | None] = {}
    for path in files:
        try:
            rows[path] = types.features(path)
        except OSError as error:
            print(f"demo: left out {path}: {error.strerror}", file=sys.stderr)
    return rows


def answers(types: FileTypes, asked: Sequence[Path], load: Load) -> dict[Path, Verdict]:
    """A verdict a file. MismatchError where a file's answer depends on the batch that it rode in."""
    verdicts = {}
    for path, outputs in zip(asked, load.outputs, strict=True):
        first, *others = map(types.verdict, outputs)
        for other in others:
            compare(path, "one batch", first, "another", other)
        verdicts[path] = first
    return verdicts


def compare(path: Path, one: str, a: Verdict, another: str, b: Verdict) -> None:
    assert a.score is not None
    assert b.score is not None
    if a.label != b.label or abs(a.score - b.score) > TOLERANCE:
        raise MismatchError(f"{path}: {one} says {a.label} {a.score:.4f}, {another} {b.label} {b.score:.4f}")


def check(types: FileTypes, rows: dict[Path, Rows], verdicts: dict[Path, Verdict]) -> set[Path]:
    """The files of the sample, each found to be what magika says. MismatchError where one is not."""
    sample = list(verdicts)[:: max(1, len(verdicts) // CHECKED)]
    checked = set()
    for path in sample:
        expected = types.expected(path)
        # magika reads the file again: a log that grew in between is no mismatch.
        now = types.features(path)
        if now is not None and np.array_equal(rows[path], now):
            compare(path, "cobatch", verdicts[path], "magika", expected)
            checked.add(path)
    return checked


def shown_name(path: Path, directory: Path | None) -> str:
    for root in (ROOT, directory.resolve() if directory else ROOT):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)


def classify(types: FileTypes, server: Server, options: argparse.Namespace, console: Console) -> None:
    """Everything that the demo shows; MismatchError, or the client's own error, where it goes wrong."""
    rows = extract(types, collect(options))
    asked = {path: row for path, row in rows.items() if row is not None}
    # Few files are sent more than once, so that every caller has a few requests to send.
    rounds = max(1, -(-4 * options.callers // len(asked)))
    load = asyncio.run(
        call(server.url, "magika", NAMES, list(asked.values()), options.callers, rounds=rounds)
    )
    verdicts = answers(types, list(asked), load)
    checked = check(types, asked, verdicts)
    lines = [
        Line(
            shown_name(path, options.directory),
            verdicts.get(path) or types.without_model(path),
            checked=path in checked,
        )
        for path in rows
    ]
    files_table(console, lines)
    times = "once" if rounds == 1 else f"{rounds} times"
    console.print(
        f"{len(asked)} files classified by the model, each {times}; {len(rows) - len(asked)} too short "
        f"for it. {len(checked)} checked: magika itself says the same, to {TOLERANCE:g}."
    )
    timing_table(console, load)


def keep_serving(server: Server, console: Console) -> None:
    """Waits until Ctrl-C or SIGTERM; ServingError where the server ends before that."""
    request = f"{sys.executable} {ROOT}/scripts/demo.py --request {ROOT}/LICENSE"
    post = "curl -sS -H 'Content-Type: application/json' --data-binary @-"
    console.print("\nThe server is still running. Ask it something, from another terminal:\n")
    console.print(f"  curl -sS {server.url}/v2/models/magika", soft_wrap=True)
    console.print(f"  {request} | {post} {server.url}/v2/models/magika/infer", soft_wrap=True, markup=False)
    console.print("\nStop it with Ctrl-C here.")
    server.echo = True
    try:
        status = server.wait()
    except KeyboardInterrupt:
        return
    raise ServingError(f"the server ended by itself, with status {status}")


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options = arguments()
    types = FileTypes()
    if options.request:
        return print_request(types, options.request)
    # SIGTERM, or the terminal going away, must take the server along just as Ctrl-C does.
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    console = Console(highlight=False)
    try:
        with Server([str(types.model), "--name", "magika", "--port", str(options.port)]) as server:
            server.wait_ready()
            console.print(f"cobatch serves {types.model.parent.name} at {server.url} (process {server.pid})")
            classify(types, server, options, console)
            if options.serve:
                keep_serving(server, console)
            server.stop()
    except KeyboardInterrupt:
        print("demo: interrupted; the server was stopped", file=sys.stderr)
        return 130
    except (ServingError, MismatchError, NoTimesError, InferenceServerException, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    console.print("\nThe server was asked to stop and ended with status 0.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
