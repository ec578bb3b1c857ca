"""The report's three forms: on the terminal, as JSON, as a page."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from cobatch import __version__
from cobatch.server.loadtest.capacity import Capacity
from cobatch.server.loadtest.page import page
from cobatch.server.loadtest.report import show
from cobatch.server.loadtest.runner import Report


def show_report(report: Report) -> None:
    """On stdout."""
    text = f"{_title(report)}, {_load(report)}"
    show(f"{text} (interrupted)" if report.interrupted else text, report.results, report.capacity)


def as_html(report: Report) -> str:
    """One page."""
    about = [_load(report), _where()]
    return page(_title(report), about, report.results, report.capacity)


def as_json(report: Report) -> str:
    """All figures. No credential is in it."""
    asked = report.asked
    document = {
        "tool": f"cobatch {__version__}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _where(),
        "target": {
            "url": asked.url,
            "server": report.model.server,
            "model": report.model.name,
            "platform": report.model.platform,
        },
        "load": _options(report),
        "interrupted": report.interrupted,
        "runs": [results.as_json() for results in report.results],
        "capacity": None if report.capacity is None else _capacity(report.capacity),
    }
    return json.dumps(document, indent=1) + "\n"


def _title(report: Report) -> str:
    server = f" ({report.model.server})" if report.model.server else ""
    return f"{report.model.name} at {report.asked.url}{server}"


def _load(report: Report) -> str:
    asked = report.asked
    parts = ["binary" if asked.binary else "JSON"]
    parts.append(f"open loop, {asked.arrivals} arrivals" if asked.open_loop else "closed loop")
    if len(asked.callers) == 1:
        caller = asked.callers[0]
        parts += [f"{caller.rows} rows a request"] if caller.rows > 1 else []
        parts += [f"deadline {caller.deadline_ms:g} ms"] if caller.deadline_ms is not None else []
    parts.append("answers checked" if asked.expect else "answers not checked")
    return ", ".join(parts)


def _where() -> str:
    python = platform.python_version()
    return f"generator on {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {python}"


def _options(report: Report) -> dict[str, Any]:
    asked = report.asked
    names = (
        "rates", "arrivals", "connections", "processes", "seconds", "warmup_s", "timeout_s", "seed", "binary",
        "shapes", "values", "inputs", "expect", "slo_ms",
    )  # fmt: skip
    found = {name: getattr(asked, name) for name in names}
    callers = [asdict(caller) for caller in asked.callers]
    for caller in callers:
        del caller["headers"]  # credentials
    return {**found, "open_loop": asked.open_loop, "callers": callers}


def _capacity(found: Capacity) -> dict[str, Any]:
    return {
        "slo_ms": found.slo_ms,
        "rate": found.rate,
        "failed_rate": found.failed_rate,
        "limited_by_generator": found.limited,
        "sentence": found.sentence(),
        "tried": [
            {
                "rate": one.rate,
                "bad_part": one.bad_part,
                "p99_ms": one.p99_ms if one.p99_ms < float("inf") else None,
                "held": one.held,
                "confirms": one.confirms,
            }
            for one in found.tried
        ],
    }
