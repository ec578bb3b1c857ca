"""`cobatch explain` and `cobatch trace`: ask a running server about its requests.

The credential comes from a file or the environment, not from an argument, which every user of the machine can
read.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.client import HTTPResponse
from pathlib import Path
from typing import Annotated
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

import typer

from cobatch.server.console import end, option, switch
from cobatch.server.settings.load import TOKEN_VARIABLE

_TIMEOUT_S = 10.0
_DEFAULT_URL = "http://127.0.0.1:8000"

_TOKEN_HELP = f"File with a token or API key that permits admin (default: ${TOKEN_VARIABLE})."
_OUTPUT_HELP = "Output file (default: cobatch-TIME.trace.json)."

_Url = Annotated[str, option("URL", "Address of the server.")]
_TokenFile = Annotated[Path | None, option("FILE", _TOKEN_HELP)]


def explain(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="X-Request-Id of a response.")],
    url: _Url = _DEFAULT_URL,
    token_file: _TokenFile = None,
    as_json: Annotated[bool, switch("--json", "Print the full record as JSON.")] = False,
) -> None:
    """Say where a recent request's time went: its batch, why that was sent, and its waits."""
    with _response("GET", url, f"/v1/requests/{quote(request_id, safe='')}", token_file) as response:
        record = json.load(response)
    typer.echo(json.dumps(record, indent=2) if as_json else "\n".join(record["in_words"]))


def trace(
    url: _Url = _DEFAULT_URL,
    seconds: Annotated[float, option("S", "Time to record.")] = 5.0,
    output: Annotated[Path | None, option("FILE", _OUTPUT_HELP, "--output", "-o")] = None,
    token_file: _TokenFile = None,
) -> None:
    """Record the scheduler of a running server, for https://ui.perfetto.dev or chrome://tracing."""
    if not 0 < seconds < math.inf:
        raise end(f"--seconds: expected a number over 0, got {seconds:g}", 1)
    path = output or Path(f"cobatch-{datetime.now().astimezone():%Y%m%dT%H%M%S}.trace.json")
    part = path.with_name(path.name + ".part")
    target = f"/v1/profile?seconds={seconds:g}"
    try:
        with part.open("wb") as file, _response("POST", url, target, token_file, seconds) as response:
            shutil.copyfileobj(response, file)
        part.replace(path)
    except OSError as error:
        raise end(str(error), 1) from None
    finally:
        part.unlink(missing_ok=True)
    typer.echo(f"{path}: open it in https://ui.perfetto.dev or chrome://tracing")


@contextmanager
def _response(
    method: str, url: str, path: str, token_file: Path | None, wait_s: float = 0.0
) -> Iterator[HTTPResponse]:
    """Yield the response to read. A server that refuses or cannot be reached ends the command."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise end(f"--url: expected an address with http:// or https://, got {url!r}", 1)
    try:
        token = (os.environ.get(TOKEN_VARIABLE, "") if token_file is None else token_file.read_text()).strip()
    except (OSError, ValueError) as error:
        raise end(f"--token-file: cannot read {token_file}: {error}", 1) from None
    credential = {"X-API-Key": token} if token.startswith("cb_") else {"Authorization": f"Bearer {token}"}
    headers = credential if token else {}
    call = request.Request(url.rstrip("/") + path, method=method, headers=headers)  # noqa: S310 - checked
    try:
        with request.urlopen(call, timeout=wait_s + _TIMEOUT_S) as response:  # noqa: S310 - the same
            yield response
    except HTTPError as error:
        raise end(f"{url} answered {error.code}: {_detail(error)}", 1) from None
    except OSError as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise end(f"cannot reach {url}: {reason}", 1) from None


def _detail(error: HTTPError) -> str:
    try:
        return str(json.loads(error.read())["detail"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)
