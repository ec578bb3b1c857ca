"""Serve two models with cobatch: classify real files, check the answers, and show what batching does.

*magika*, a file-type model, classifies the files. *wide* (benchmarks/common/models.py) gains by batching.
Started by ./scripts/demo, which prepares the environment. Exit status 0: the answers compared equal those of
the `magika` package or those without batching, and the server stopped with status 0; otherwise 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import numpy as np
from rich.console import Console
from tritonclient.utils import InferenceServerException

from callers import Load, NoTimesError, Rows, call
from filetypes import FileTypes, Verdict, find_files, own_files
from report import Line, batching_table, files_table, labels_table, timing_table
from serving import Server, ServingError

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("bytes", "target_label")
CHECKED = 64  # files compared with magika, spread evenly over all of them
TOLERANCE = 1e-3  # the last digits of a score depend on the batch
SERVE_PORT = 8000


class MismatchError(Exception):
    """Two answers for a file differ; the text has both."""


FAILURES = (
    ServingError,
    MismatchError,
    NoTimesError,
    InferenceServerException,
    OSError,
    subprocess.CalledProcessError,
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, help="classify its files as well")
    parser.add_argument("--serve", action="store_true", help="then leave the server running until Ctrl-C")
    parser.add_argument(
        "--port", type=int, help=f"(default: with --serve {SERVE_PORT}, otherwise any free port)"
    )
    parser.add_argument("--callers", type=int, default=64, help="concurrent callers (default: 64)")
    parser.add_argument("--max-files", type=int, default=1000, help="from each directory (default: 1000)")
    parser.add_argument(
        "--request", metavar="FILE", type=Path, help="only print the request for FILE, as JSON"
    )
    options = parser.parse_args()
    if options.directory is not None and not options.directory.is_dir():
        parser.error(f"{options.directory} is not a directory")
    if options.port is None:
        options.port = SERVE_PORT if options.serve else 0
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
    """Return the files of the repository and of DIR, each once."""
    files = own_files(ROOT)[: options.max_files]
    if options.directory:
        files += [path.resolve() for path in find_files(options.directory, options.max_files)]
    return list(dict.fromkeys(files))


def extract(types: FileTypes, files: Sequence[Path]) -> dict[Path, Rows | None]:
    """Return the model's input for each file, None for a file that is too short; skip unreadable files."""
    rows: dict[Path, Rows | None] = {}
    for path in files:
        try:
            rows[path] = types.features(path)
        except OSError as error:
            print(f"demo: skipped {path}: {error.strerror}", file=sys.stderr)
    return rows


def verdicts_of(types: FileTypes, paths: Sequence[Path], load: Load) -> dict[Path, Verdict]:
    """Return a verdict for each file. Raises MismatchError if a file got different answers in two batches."""
    verdicts = {}
    for path, outputs in zip(paths, load.outputs, strict=True):
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
    """Return the files that were compared with magika. Raises MismatchError if an answer differs."""
    sample = list(verdicts)[:: max(1, len(verdicts) // CHECKED)]
    checked = set()
    for path in sample:
        expected = types.expected(path)
        # magika reads the file again: skip a file that has changed meanwhile.
        features = types.features(path)
        if features is not None and np.array_equal(rows[path], features):
            compare(path, "cobatch", verdicts[path], "magika", expected)
            checked.add(path)
    return checked


def shown_name(path: Path, directory: Path | None) -> str:
    for root in (ROOT, directory.resolve() if directory else ROOT):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)


def classify(types: FileTypes, server: Server, options: argparse.Namespace, console: Console) -> None:
    """Classify the files and print the results. Raises MismatchError, and the client's errors."""
    rows = extract(types, collect(options))
    sent = {path: row for path, row in rows.items() if row is not None}
    # A short list of files is sent several times, so that each caller sends at least four requests.
    rounds = max(1, -(-4 * options.callers // len(sent)))
    console.print(f"{options.callers} callers send {rounds * len(sent)} requests of one file each ...")
    load = asyncio.run(call(server.url, "magika", NAMES, list(sent.values()), options.callers, rounds=rounds))
    verdicts = verdicts_of(types, list(sent), load)
    checked = check(types, sent, verdicts)
    lines = [
        Line(
            shown_name(path, options.directory),
            verdicts.get(path) or types.without_model(path),
            checked=path in checked,
        )
        for path in rows
    ]
    if options.directory:
        folder = options.directory.resolve()
        given = [line for line, path in zip(lines, rows, strict=True) if path.is_relative_to(folder)]
        files_table(console, given, f"\nFiles in {options.directory}")
    labels_table(console, lines)
    console.print(
        f"{len(sent)} files classified; {len(rows) - len(sent)} are too short for the model. "
        f"{len(checked)} answers compared with the magika package: all equal (to {TOLERANCE:g})."
    )
    timing_table(console, load)


def wide_model() -> Path:
    """Return the file of *wide*, made if it is missing (73 MiB, about a second)."""
    command = [sys.executable, "-m", "benchmarks.common.models"]
    paths = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return next(Path(path) for path in paths if path.endswith("wide.onnx"))


def show_batching(server: Server, callers: int, console: Console) -> None:
    """Send rows one after another and at once; print both. Raises MismatchError, and the client's errors."""
    rows = list(np.random.default_rng(1).standard_normal((64, 512), np.float32))
    console.print(f"\n1 caller, then {callers} at once, send rows to wide ...")
    alone, together = (
        asyncio.run(call(server.url, "wide", ("x", "y"), rows, count, rounds=rounds))
        for count, rounds in ((1, 2), (callers, max(8, callers // 4)))
    )
    for number, (one, many) in enumerate(zip(alone.outputs, together.outputs, strict=True)):
        if not all(np.allclose(one[0], other, rtol=TOLERANCE, atol=TOLERANCE) for other in many):
            raise MismatchError(f"row {number} of wide has other answers in a batch than alone")
    batching_table(console, alone, together)


def keep_serving(server: Server, console: Console) -> None:
    """Wait until Ctrl-C or SIGTERM. Raises ServingError if the server exits before."""
    request = f"{sys.executable} {ROOT}/scripts/demo.py --request {ROOT}/LICENSE"
    post = "curl -sS -H 'Content-Type: application/json' --data-binary @-"
    console.print("\nThe server is still running. From another terminal:\n")
    for line in (
        f"curl -sS {server.url}/v2/models/magika",
        f"{request} | {post} {server.url}/v2/models/magika/infer",
    ):
        console.print(f"  {line}", soft_wrap=True, markup=False)
    console.print(f"\nThe live page: {server.url}/dashboard\nCtrl-C stops the server.")
    server.echo = True
    try:
        status = server.wait()
    except KeyboardInterrupt:
        return
    raise ServingError(f"the server exited with status {status}")


def write_config(folder: Path, types: FileTypes) -> str:
    """Write the server's configuration; return its path."""
    models = {"magika": types.model, "wide": wide_model()}
    tables = [f"[[models]]\nname = {json.dumps(n)}\npath = {json.dumps(str(p))}\n" for n, p in models.items()]
    path = folder / "cobatch.toml"
    path.write_text("".join(tables))
    return str(path)


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options = arguments()
    types = FileTypes()
    if options.request:
        return print_request(types, options.request)
    # SIGTERM and a closed terminal stop the server as Ctrl-C does.
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)
    console = Console(highlight=False)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            Server(["--config", write_config(Path(folder), types), "--port", str(options.port)]) as server,
        ):
            server.wait_ready()
            console.print(f"cobatch serves the models magika and wide at {server.url}", soft_wrap=True)
            classify(types, server, options, console)
            show_batching(server, options.callers, console)
            if options.serve:
                keep_serving(server, console)
            server.stop()
    except KeyboardInterrupt:
        print("demo: interrupted; the server was stopped", file=sys.stderr)
        return 130
    except FAILURES as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    console.print("\nThe server was stopped and exited with status 0.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
