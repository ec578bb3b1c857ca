"""What a caller may: `infer` (all models), `infer:MODEL`, `metadata`, `admin`.

`admin` reads statistics, metrics, the repository and the dashboard; it does not include `infer`. Whoever
may infer with a model may read that model's metadata too, for no V2 client works without it.
"""

from __future__ import annotations

import re

INFER = "infer"
METADATA = "metadata"
ADMIN = "admin"
_PERMISSION = re.compile(r"infer|infer:[A-Za-z0-9][A-Za-z0-9._-]*|metadata|admin")


def is_permission(text: str) -> bool:
    """Whether the word is one of ours."""
    return _PERMISSION.fullmatch(text) is not None
