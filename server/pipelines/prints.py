"""What a handler prints: each line with the id of its call, since calls run at the same time."""

import io
import sys
from contextvars import ContextVar

# The X-Request-Id of the call whose code runs.
REQUEST_ID: ContextVar[str] = ContextVar("cobatch_request_id", default="")


class Marked(io.TextIOWrapper):
    """A stream that puts the id of the call before each line that its code prints."""

    _begins = True  # of a line is next

    def write(self, text: str) -> int:
        """Write text; return its length."""
        request_id = REQUEST_ID.get()
        if not request_id or not text:
            return super().write(text)
        mark = f"{request_id}: "
        begin, self._begins = mark if self._begins else "", text.endswith("\n")
        inner = text[:-1] if self._begins else text
        super().write(begin + inner.replace("\n", f"\n{mark}") + text[len(inner) :])
        return len(text)


def mark_lines() -> None:
    """Mark the lines of stdout and stderr, from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, Marked(stream.detach(), encoding="utf-8", errors="replace", line_buffering=True))
