"""What the JSON of a prediction's request may hold, as types: msgspec checks it while it parses."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Axis = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a request says beside its tensors. Raw bodies have it in the query."""

    outputs: list[str] | None = None
    deadline_ms: Annotated[float, Meta(gt=0, le=86_400_000)] | None = None
    priority: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    top_k: _Count | dict[str, _Count] | None = None


class JsonRequest(Options, kw_only=True, forbid_unknown_fields=True):
    """A whole request in JSON."""

    inputs: dict[str, msgspec.Raw]


class FormOptions(Options, kw_only=True, forbid_unknown_fields=True):
    """The part "request" of a form: raw parts hold one row, unless their shape is given here."""

    shapes: dict[str, list[_Axis]] = {}


class RawOptions(Options, kw_only=True, forbid_unknown_fields=True):
    """The query of a raw body, which is one row unless its shape is given here."""

    shape: list[_Axis] | None = None


class Encoded(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tensor inside JSON as bytes: little-endian, C order, in base64. `dtype` is V2's or NumPy's name."""

    b64: str
    dtype: str
    shape: list[_Axis]
