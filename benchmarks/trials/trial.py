"""One trial: its command line, its counts and findings, and a server for it."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common.processes import Server, configured
from cobatch.server.auth import api_keys

_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 2000


class Report:
    """The counts of a trial by name, and its findings by kind, with some examples of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.findings: dict[str, list[str]] = {}

    def find(self, kind: str, example: object) -> None:
        """Add a finding."""
        self.counts[f"FINDING: {kind}"] += 1
        self.findings.setdefault(kind, []).append(str(example)[:_EXAMPLE_CHARACTERS])

    def check_log(self, server: Server) -> None:
        """A traceback in the server's output is a finding."""
        text = server.log.read_text(errors="replace")
        if "Traceback" in text:
            self.find("a traceback in the log", text[text.index("Traceback") :])

    def table(self) -> str:
        """Return the counts as a table, then examples of the findings."""
        lines = ["| what | number |", "|---|---:|"]
        lines += [f"| {name} | {number:,} |" for name, number in self.counts.items()]
        for kind, examples in self.findings.items():
            lines += [f"\n{kind}:", *[f"  {example}" for example in examples[:_EXAMPLES]]]
        return "\n".join(lines)


def command(
    name: str,
    about: str | None,
    count: int,
    trial: Callable[[int, int], Report],
    unit: str,
    argv: Sequence[str],
) -> int:
    """Run `python -m benchmarks.trials.NAME`; return the exit status, 1 if there is a finding."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.trials.{name}", description=about)
    parser.add_argument("--count", type=int, default=count, help=f"{unit} (default: {count})")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random choices (default: 1)")
    options = parser.parse_args(argv)
    began_s = time.perf_counter()
    report = trial(options.count, options.seed)
    print(report.table())
    findings = sum(map(len, report.findings.values()))
    print(f"\nseed {options.seed}, {time.perf_counter() - began_s:.0f} s; {findings} findings")
    return 1 if findings else 0


@contextmanager
def served(
    name: str,
    models: Mapping[str, tuple[bytes, str]],
    *,
    server: str = "",
    auth: str = "",
    tenants: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[tuple[Server, dict[str, str]]]:
    """Serve models, by name: their file's content and their settings in TOML.

    `tenants`: for each its permissions; yields their API keys beside the server.
    """
    with tempfile.TemporaryDirectory(prefix=f"cobatch-{name}-") as text:
        folder = Path(text)
        parts = [f"[server]\n{server}\n"]
        minted = {tenant: api_keys.mint(tenant, scopes) for tenant, scopes in (tenants or {}).items()}
        if minted:
            (folder / "keys.toml").write_text("".join(table for _, table in minted.values()))
            auth = f'[auth]\napi_keys_file = "keys.toml"\n{auth}'
        parts.append(auth)
        for model, (content, settings) in models.items():
            (folder / f"{model}.onnx").write_bytes(content)
            parts.append(f'[[models]]\npath = "{model}.onnx"\nthreads = 1\n{settings}\n')
        config = folder / "cobatch.toml"
        config.write_text("\n".join(parts))
        with configured(name, config) as process:
            yield process, {tenant: key for tenant, (key, _) in minted.items()}
