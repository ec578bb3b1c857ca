"""What no schema says: which parameters go with which body. schemathesis loads this file by its name.

Left to chance, nearly every request would be refused for these, and nothing behind them tested.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import Case, HookContext

RAW = ("application/octet-stream", "application/x-npy")


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, object]) -> None:
    """Half of the time, leave away what belongs to raw bodies where a valid request has another."""
    meta = case.meta
    positive = meta is not None and meta.generation.mode.is_positive
    if positive and case.media_type not in RAW and len(str(case.body)) % 2:
        case.query.clear()
        case.headers.pop("Inference-Header-Content-Length", None)
