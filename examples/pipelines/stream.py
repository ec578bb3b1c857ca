"""Text in, an answer in parts: the words of a text, each with its place, as server-sent events.

    cobatch serve examples/pipelines/stream.py:Words
    curl -N http://127.0.0.1:8000/v1/models/Words/infer -H 'content-type: text/plain' -d 'one two three'

The last event is `completed`, or `error`.
"""

import asyncio
from collections.abc import AsyncIterator

import msgspec

from cobatch import BadRequest


class Word(msgspec.Struct):
    """A word, and the number of words before it."""

    text: str
    place: int


class Words:
    """The pipeline."""

    async def handle(self, text: str) -> AsyncIterator[Word]:
        """Yield the words; each is an event as soon as it is known."""
        words = text.split()
        if not words:
            raise BadRequest("the text has no words")  # before the first event: a response of its own, 422
        for place, word in enumerate(words):
            await asyncio.sleep(0)  # where a model would compute the next one
            yield Word(word, place)
