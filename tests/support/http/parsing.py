"""Counts of the work that decoders do: the length of each text that a parser gets."""

from __future__ import annotations

from typing import Any

import pytest


class ParsedTexts:
    """The lengths of the texts that the watched functions got as their last positional argument."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lengths: list[int] = []
        self._monkeypatch = monkeypatch

    def watch(self, owner: object, name: str) -> None:
        """Count what this function gets from now on."""
        parse = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.lengths.append(len(args[-1]))
            return parse(*args, **options)

        self._monkeypatch.setattr(owner, name, counted)

    @property
    def longest(self) -> int:
        """The longest text."""
        return max(self.lengths, default=0)

    @property
    def total(self) -> int:
        """The length of all texts together."""
        return sum(self.lengths)
