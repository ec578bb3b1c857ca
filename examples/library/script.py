"""A script: the words of a text are looked up by many tasks, in few runs.

python examples/library/script.py < TEXT
"""

import asyncio
import sys

from cobatch import batched


@batched(max_batch_size=16)
async def look_up(words: list[str]) -> list[int]:
    """Stand in for a query for many words at once, over a network."""
    await asyncio.sleep(0.001)
    return [len(word) for word in words]


async def main() -> None:
    """Print the length of each word, and how many runs that took."""
    words = sys.stdin.read().split()
    for word, length in zip(words, await asyncio.gather(*map(look_up, words)), strict=True):
        print(f"{word} {length}")
    statistics = look_up.statistics()
    print(f"{statistics.accepted} words in {statistics.batches} runs")


asyncio.run(main())
