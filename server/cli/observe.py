"""What `cobatch explain` and `cobatch trace` have in common: one request to a running server.

The credential comes from a file or from the environment, not from an argument, which every user of the
machine could read.

`cobatch explain` and `cobatch trace`: asking a running server what it did, and what it does.

Registered by server/cli/__init__.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

import typer

from cobatch.server.console import end
from cobatch.server.settings.load import TOKEN_VARIABLE

_TIMEOUT_S = 10.0

Url = Annotated[str, typer.Option("--url", metavar="URL", help="The server's address.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help=f"Holds a token or an API key with the permission admin (default: ${TOKEN_VARIABLE}).",
    ),
]
DEFAULT_URL = "http://127.0.0.1:8000"


class CallError(Exception):
    """The server could not be asked, or refused; the text says so in one line."""


def call(
    method: str,
    url: str,
    path: str,
    token_file: Path | None,
    *,
    wait_s: float = 0.0,
    keep: Callable[[bytes], Any] | None = None,
) -> bytes:
    """The answer's body; piece by piece to `keep`, where that is given. Raises CallError."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise CallError(f"--url: expected an address with http:// or https://, got {url!r}")
    target = url.rstrip("/") + path
    asked = request.Request(target, method=method, headers=_credential(token_file))  # noqa: S310 - checked
    try:
        with request.urlopen(asked, timeout=wait_s + _TIMEOUT_S) as answer:  # noqa: S310 - the same
            if keep is None:
                body: bytes = answer.read()
                return body
            while piece := answer.read(1 << 16):
                keep(piece)
            return b""
    except HTTPError as error:
        raise CallError(f"{url} answered {error.code}: {_detail(error)}") from None
    except URLError as error:
        raise CallError(f"{url} cannot be asked: {error.reason}") from None
    except OSError as error:
        raise CallError(f"{url} cannot be asked: {error}") from None


def _credential(token_file: Path | None) -> dict[str, str]:
    if token_file is None:
        token = os.environ.get(TOKEN_VARIABLE, "")
    else:
        try:
            token = token_file.read_text()
        except (OSError, ValueError) as error:
            raise CallError(f"--token-file: cannot read {token_file}: {error}") from None
    token = token.strip()
    if not token:
        return {}
    return {"X-API-Key": token} if token.startswith("cb_") else {"Authorization": f"Bearer {token}"}


def _detail(error: HTTPError) -> str:
    try:
        return str(json.loads(error.read())["detail"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)


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
