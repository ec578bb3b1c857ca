"""`cobatch explain` and `cobatch trace`: asking a running server what it did, and what it does.

Registered by server/cli/__init__.py.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from cobatch.server.cli.client import DEFAULT_URL, CallError, TokenFile, Url, call
from cobatch.server.cli.end import end


def explain(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="An answer's X-Request-Id.")],
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that is known, as JSON.")] = False,
) -> None:
    """Say where a recent request's time went: its batch, its company, why it left, what it waited for."""
    try:
        found = json.loads(call("GET", url, f"/v1/requests/{quote(request_id, safe='')}", token_file))
    except CallError as error:
        raise end(str(error), 1) from None
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for sentence in found["in_words"]:
        typer.echo(sentence)


def trace(
    url: Url = DEFAULT_URL,
    seconds: Annotated[float, typer.Option(metavar="S", help="How long to record.")] = 5.0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to (default: cobatch-TIME.trace.json)."),
    ] = None,
    token_file: TokenFile = None,
) -> None:
    """Record what the scheduler of a running server does, for https://ui.perfetto.dev or chrome://tracing."""
    if not 0 < seconds < math.inf:
        raise end(f"--seconds: expected a number over 0, got {seconds:g}", 1)
    path = output or Path(f"cobatch-{datetime.now().astimezone():%Y%m%dT%H%M%S}.trace.json")
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            call("POST", url, f"/v1/profile?seconds={seconds:g}", token_file, wait_s=seconds, keep=file.write)
        part.replace(path)
    except (CallError, OSError) as error:
        raise end(str(error), 1) from None
    finally:
        part.unlink(missing_ok=True)
    typer.echo(f"{path}: open it in https://ui.perfetto.dev or chrome://tracing")
