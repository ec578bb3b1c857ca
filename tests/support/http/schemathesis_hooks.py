"""Hooks that schemathesis loads by the name of this file.

No schema says which parameters a body permits. Without these hooks nearly every request would be refused.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import Case, HookContext

RAW = ("application/octet-stream", "application/x-npy")


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, object]) -> None:
    """Remove parameters that the body forbids, and used keys, from most valid requests."""
    meta = case.meta
    if meta is None or not meta.generation.mode.is_positive:
        return
    size = len(str(case.body))
    if case.media_type is not None and case.media_type not in RAW and size % 4:
        case.query.clear()
        case.headers.pop("Inference-Header-Content-Length", None)
    if size % 3:
        case.headers.pop("Idempotency-Key", None)
