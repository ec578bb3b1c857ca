"""A request's id: the caller's own where it is sane, else one of ours; the answer repeats it.

Ids stand in log lines, in traces and in URLs (`GET /v1/requests/ID`), so only what is harmless in all of
them is taken. What is not is passed over, as if there were no such header: it is no reason to refuse.

An id of ours that goes with an answer of an infer request says where it rode: `PROCESS-BATCH.ROW`, the batch
in hexadecimal digits. So nothing need be kept for each request to find it again, and to write the id costs
next to nothing.
"""

from __future__ import annotations

import re
import secrets
from itertools import count

from cobatch.batcher.request import Batch

# What UUIDs, ULIDs, Amazon's (Root=1-...), Heroku's and nginx's ids are made of.
_SANE = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:=@+-]{0,127}")
# No other process has this. A caller's id that begins so is that of another request.
_PROCESS = secrets.token_hex(4)
_OURS = f"{_PROCESS}-".encode()
_LEAD = f"{_PROCESS}-%x.".encode()
_OF_BATCH = re.compile(rf"{_PROCESS}-([0-9a-f]{{1,15}})\.(\d{{1,9}})")
_numbers = count(1)


def sane(value: bytes) -> str | None:
    """The id as text, if it is one that may stand anywhere and is not one of ours; else None."""
    return value.decode("ascii") if _SANE.fullmatch(value) and not value.startswith(_OURS) else None


def new_id() -> str:
    """An id that says nothing."""
    return f"{_PROCESS}-r{next(_numbers):x}"


def id_lead(batch: Batch) -> bytes:
    """What the ids of all requests in a batch begin with; empty where the batch is one request's alone."""
    return _LEAD % batch.number if batch.number else b""


def place_of(request_id: str) -> tuple[int, int] | None:
    """The batch's number and the request's first row in it, as the id says; None where it says nothing."""
    found = _OF_BATCH.fullmatch(request_id)
    return None if found is None else (int(found[1], 16), int(found[2]))
