"""Checks what perf_analyzer printed, against what the server counted. For ./scripts/perf-analyzer.

Usage: perf_report.py REPORT HOST:PORT. Exit status 1 where a level has no requests, where it has none of
the server's statistics, or where a request failed.
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


def complaints(report: str, succeeded: int, failed: int) -> list[str]:
    """What is wrong with a report and the server's counts of the same time; nothing when all is well."""
    levels = LEVEL.findall(report)
    clients = [int(count) for count in CLIENT.findall(report)]
    servers = [int(count) for count in SERVER.findall(report)]
    found = []
    if not levels or len(clients) != len(levels) or not all(clients):
        found.append(f"{len(levels)} levels of load, request counts {clients}")
    if len(servers) != len(levels) or not all(servers):
        found.append(f"it did not read the server's statistics at each level: {servers}")
    if failed or any(int(count) for count in FAILED.findall(report)):
        found.append(f"requests failed; the server counts {failed}")
    if succeeded < sum(clients):
        found.append(f"it counts {sum(clients)} requests, the server {succeeded}")
    return found


def main() -> int:
    report = Path(sys.argv[1]).read_text()
    with urllib.request.urlopen(f"http://{sys.argv[2]}/v2/models/tiny/stats", timeout=30.0) as response:
        stats = json.load(response)["model_stats"][0]["inference_stats"]
    succeeded, failed = stats["success"]["count"], stats["fail"]["count"]
    found = complaints(report, succeeded, failed)
    for complaint in found:
        print(f"perf-analyzer: {complaint}", file=sys.stderr)
    if not found:
        levels = len(LEVEL.findall(report))
        print(f"perf-analyzer: {levels} levels of load, {succeeded} requests answered, none failed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
