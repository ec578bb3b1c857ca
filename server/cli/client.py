"""What `cobatch explain` and `cobatch trace` have in common: one request to a running server.

The credential comes from a file or from the environment, not from an argument, which every user of the
machine could read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import typer

from cobatch.server.settings.schema import TOKEN_VARIABLE

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
