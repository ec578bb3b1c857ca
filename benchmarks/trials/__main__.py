"""All trials, one after another, about six minutes: `python -m benchmarks.trials [--seed 1]`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.trials import faults, oracle, paths, streams, tokens
from benchmarks.trials.trial import command


def main() -> int:
    """Return 1 if a trial has a finding."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trials", description=__doc__)
    parser.add_argument("--seed", default="1", help="seed of the random choices (default: 1)")
    seed = parser.parse_args().seed
    statuses = []
    for module in (oracle, streams, paths, tokens, faults):
        name = module.__name__.rpartition(".")[2]
        print(f"\n## {name}\n", flush=True)
        statuses.append(command(name, None, module.COUNT, module.trial, "", ["--seed", seed]))
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
