"""Request ids: the client's own if it is sane, else one of ours; the response repeats it.

Ids are written into log lines, traces and URLs (`GET /v1/requests/ID`), so a client's id must be harmless in
all of them. Any other is ignored.

Our id in the response to an infer request names the place where it ran: `PROCESS-BATCH.ROW`, the batch in
hexadecimal. Nothing is kept per request to find it again, and writing the id costs almost nothing.
"""

import re
import secrets
from itertools import count

# Enough for UUIDs, ULIDs, and the ids of Amazon (Root=1-...), Heroku and nginx.
_SANE = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:=@+-]{0,127}")
# Unique to this process. A client's id that begins with it belongs to another request.
PROCESS = secrets.token_hex(4)
_ours: tuple[bytes, ...] = (f"{PROCESS}-".encode(),)
_new_lead = f"{PROCESS}-r"
# The beginning of the ids in a batch, for its number.
LEAD = f"{PROCESS}-%x.".encode()
_OF_BATCH = re.compile(rf"{PROCESS}-([0-9a-f]{{1,15}})\.(\d{{1,9}})")
_numbers = count(1)


def sane(value: bytes) -> str | None:
    """Return the id as text, None if it is not harmless or is one of ours."""
    return value.decode("ascii") if _SANE.fullmatch(value) and not value.startswith(_ours) else None


def new_id() -> str:
    """Return an id that names no place."""
    return f"{_new_lead}{next(_numbers):x}"


def join(process: str) -> None:
    """Give ids that belong to another process too, that of the engines: no client can take one of either."""
    global _ours, _new_lead  # noqa: PLW0603 - as is PROCESS
    if process != PROCESS:
        _ours = f"{PROCESS}-".encode(), f"{process}-".encode()
        _new_lead = f"{process}-{PROCESS}r"


def place_of(request_id: str) -> tuple[int, int] | None:
    """Return the batch's number and the request's first row in it; None if the id names no place."""
    match = _OF_BATCH.fullmatch(request_id)
    return None if match is None else (int(match[1], 16), int(match[2]))
