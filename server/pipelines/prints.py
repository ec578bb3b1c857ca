"""The output of handlers: each line with the id of its call, since calls run at the same time."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

# A longer line is written as several.
_LONGEST_LINE = 4 << 10


class Prints:
    """The output of a call: its mark, and by stream the line that is not whole yet."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.begun: dict[Marked, str] = {}


# Of the call whose code runs.
_PRINTS: ContextVar[Prints | None] = ContextVar("cobatch_prints", default=None)


@contextmanager
def marked(request_id: str) -> Iterator[None]:
    """Mark the lines of this context as those of a call, by its X-Request-Id."""
    prints = Prints(f"{request_id}: " if request_id else "")
    _PRINTS.set(prints)
    try:
        yield
    finally:
        for stream in list(prints.begun):
            with suppress(OSError, ValueError):  # the handler may have closed it
                stream.write_begun(prints)


class Marked(io.TextIOWrapper):
    """A stream that puts the id of the call before each line that its code prints."""

    def write(self, text: str) -> int:
        """Write the lines that are whole; return the length of the text."""
        prints = _PRINTS.get()
        if prints is None:
            return super().write(text)
        *lines, begun = (prints.begun.pop(self, "") + text).split("\n")
        if begun:
            prints.begun[self] = begun
        if lines:
            super().write("".join([f"{prints.mark}{line}\n" for line in lines]))
        if len(begun) > _LONGEST_LINE:
            self.write_begun(prints)
        return len(text)

    def write_begun(self, prints: Prints) -> None:
        """Write a call's line that has no end as a whole one."""
        if begun := prints.begun.pop(self, ""):
            super().write(f"{prints.mark}{begun}\n")

    def flush(self) -> None:
        """Write all, also a line of this call that has no end."""
        if prints := _PRINTS.get():
            self.write_begun(prints)
        super().flush()


def mark_lines() -> None:
    """Mark the lines of stdout and stderr, from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, Marked(stream.detach(), encoding="utf-8", errors="replace", line_buffering=True))
