"""`cobatch explain` and `cobatch trace`: ask a running server what it did and does.

The credential comes from a file or the environment, not from an argument, which every user of the machine can
read.
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
_CHUNK_BYTES = 1 << 16
_DEFAULT_URL = "http://127.0.0.1:8000"

_Url = Annotated[str, typer.Option(metavar="URL", help="Address of the server.")]
_TokenFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help=f"File with a token or API key that permits admin (default: ${TOKEN_VARIABLE})."
    ),
]


class CallError(Exception):
    """The server cannot be reached, or refused; the text says why in one line."""


def explain(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="X-Request-Id of a response.")],
    url: _Url = _DEFAULT_URL,
    token_file: _TokenFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the full record as JSON.")] = False,
) -> None:
    """Say where a recent request's time went: its batch, why that was sent, and what it waited for."""
    try:
        record = json.loads(_call("GET", url, f"/v1/requests/{quote(request_id, safe='')}", token_file))
    except CallError as error:
        raise end(str(error), 1) from None
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        typer.echo("\n".join(record["in_words"]))


def trace(
    url: _Url = _DEFAULT_URL,
    seconds: Annotated[float, typer.Option(metavar="S", help="Time to record.")] = 5.0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Output file (default: cobatch-TIME.trace.json)."
        ),
    ] = None,
    token_file: _TokenFile = None,
) -> None:
    """Record the scheduler of a running server, for https://ui.perfetto.dev or chrome://tracing."""
    if not 0 < seconds < math.inf:
        raise end(f"--seconds: expected a number over 0, got {seconds:g}", 1)
    path = output or Path(f"cobatch-{datetime.now().astimezone():%Y%m%dT%H%M%S}.trace.json")
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            target = f"/v1/profile?seconds={seconds:g}"
            _call("POST", url, target, token_file, timeout_s=seconds + _TIMEOUT_S, keep=file.write)
        part.replace(path)
    except (CallError, OSError) as error:
        raise end(str(error), 1) from None
    finally:
        part.unlink(missing_ok=True)
    typer.echo(f"{path}: open it in https://ui.perfetto.dev or chrome://tracing")


def _call(
    method: str,
    url: str,
    path: str,
    token_file: Path | None,
    *,
    timeout_s: float = _TIMEOUT_S,
    keep: Callable[[bytes], Any] | None = None,
) -> bytes:
    """Return the response's body, or give it to `keep` piece by piece. Raises CallError."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise CallError(f"--url: expected an address with http:// or https://, got {url!r}")
    headers = _credential(token_file)
    call = request.Request(url.rstrip("/") + path, method=method, headers=headers)  # noqa: S310 - checked
    try:
        with request.urlopen(call, timeout=timeout_s) as response:  # noqa: S310 - the same
            if keep is None:
                return bytes(response.read())
            while piece := response.read(_CHUNK_BYTES):
                keep(piece)
            return b""
    except HTTPError as error:
        raise CallError(f"{url} answered {error.code}: {_detail(error)}") from None
    except OSError as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise CallError(f"cannot reach {url}: {reason}") from None


def _credential(token_file: Path | None) -> dict[str, str]:
    try:
        token = os.environ.get(TOKEN_VARIABLE, "") if token_file is None else token_file.read_text()
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
