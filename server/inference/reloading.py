"""When a model in Python is loaded again: after its process has ended, and when its files change."""

from collections.abc import AsyncIterator

_AT_ONCE = 2
_LONGEST_DELAY_S = 30.0


class Backoff:
    """Delays of an engine's restarts: the first ones in a row at once, each later one after twice as long."""

    def __init__(self) -> None:
        self._in_row = 0
        self._batches = 0

    def delay_s(self, batches: int) -> float:
        """Return the delay before the next start. `batches`: that have run so far; a new one ends the row."""
        self._in_row = 1 if batches != self._batches else self._in_row + 1
        self._batches = batches
        late = self._in_row - _AT_ONCE
        return 0.0 if late <= 0 else min(2.0 ** (late - 1), _LONGEST_DELAY_S)


async def changes(folder: str) -> AsyncIterator[None]:
    """Yield once for all changes of files of Python below a folder that come together."""
    from watchfiles import PythonFilter, awatch  # noqa: PLC0415 - an extra

    async for _ in awatch(folder, watch_filter=PythonFilter()):
        yield
