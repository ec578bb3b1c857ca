"""Compare the report of perf_analyzer with the server's counters. For ./scripts/perf-analyzer.

Usage: perf_report.py REPORT HOST:PORT. Exit status 1 if a level of load has no requests, if it has no
statistics of the server, or if a request failed.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from pathlib import Path

LEVEL = re.compile(r"^Request (?:concurrency|Rate): \d", re.MULTILINE)
CLIENT = re.compile(r"^    Request count: (\d+)$", re.MULTILINE)
SERVER = re.compile(r"^    Successful request count: (\d+)$", re.MULTILINE)
FAILED = re.compile(r"^    Failed request count: (\d+)$", re.MULTILINE)


def find_errors(report: str, succeeded: int, failed: int) -> list[str]:
    """Return the errors in a report, given the server's counts of the same time."""
    levels = LEVEL.findall(report)
    clients = [int(count) for count in CLIENT.findall(report)]
    servers = [int(count) for count in SERVER.findall(report)]
    errors = []
    if not levels or len(clients) != len(levels) or not all(clients):
        errors.append(f"{len(levels)} levels of load, request counts {clients}")
    if len(servers) != len(levels) or not all(servers):
        errors.append(f"the server's statistics are missing at some levels: {servers}")
    if failed or any(int(count) for count in FAILED.findall(report)):
        errors.append(f"requests failed; the server counts {failed}")
    if succeeded < sum(clients):
        errors.append(f"perf_analyzer counts {sum(clients)} requests, the server {succeeded}")
    return errors


def main() -> int:
    report = Path(sys.argv[1]).read_text()
    with urllib.request.urlopen(f"http://{sys.argv[2]}/v2/models/tiny/stats", timeout=30.0) as response:
        stats = json.load(response)["model_stats"][0]["inference_stats"]
    succeeded, failed = stats["success"]["count"], stats["fail"]["count"]
    errors = find_errors(report, succeeded, failed)
    for error in errors:
        print(f"perf-analyzer: {error}", file=sys.stderr)
    if not errors:
        levels = len(LEVEL.findall(report))
        print(f"perf-analyzer: {levels} levels of load, {succeeded} requests answered, none failed")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
