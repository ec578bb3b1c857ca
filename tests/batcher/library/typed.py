"""The types of batched functions, as type checkers see them: mypy reads it with all other files, and pyright
finds nothing either (`npx pyright tests/batcher/library/typed.py`). It is not run."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cobatch import Batched, BatchedMethod, Explanation, batched


@batched(max_batch_size=64)
def embed(texts: list[str]) -> list[NDArray[np.float32]]:
    return [np.zeros(3, np.float32) for _ in texts]


@batched()
def count(texts: list[str]) -> tuple[int, ...]:
    return tuple(len(text) for text in texts)


@batched()
def encode(texts: list[str]) -> NDArray[np.float64]:
    return np.zeros((len(texts), 3))


@batched()
async def fetch(keys: list[int]) -> list[str]:
    return [str(key) for key in keys]


@batched(stack=True, max_batch_size=8)
def double(rows: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(rows * 2, np.float32)


@batched(stack=True)
def label(rows: NDArray[Any]) -> list[str]:
    return ["" for _ in rows]


class Model:
    @batched(max_batch_size=4)
    def embed(self, texts: list[str]) -> list[bytes]:
        return [text.encode() for text in texts]

    @batched()
    async def fetch(self, keys: list[int]) -> list[str]:
        return [str(key) for key in keys]

    @batched(stack=True)
    def double(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(rows * 2, np.float32)


async def check(model: Model) -> None:
    assert_type(embed, Batched[str, NDArray[np.float32]])
    assert_type(await embed("x"), NDArray[np.float32])
    assert_type(await embed("x", timeout=1, priority=2, tenant="ann"), NDArray[np.float32])
    assert_type(await count("x"), int)
    assert_type(await encode("x"), NDArray[np.float64])
    assert_type(await fetch(1), str)
    assert_type(double, Batched[ArrayLike, NDArray[np.float32]])
    assert_type(await double([1.0, 2.0]), NDArray[np.float32])
    assert_type(await label([1.0]), str)
    assert_type(Model.embed, BatchedMethod[Model, str, bytes])
    assert_type(model.embed, Batched[str, bytes])
    assert_type(await model.embed("x"), bytes)
    assert_type(await model.fetch(1), str)
    assert_type(await model.double([1.0]), NDArray[np.float32])
    assert_type(await embed.explain("x"), Explanation[NDArray[np.float32]])
    assert_type((await count.explain("x")).result, int)
    await embed(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await model.embed(b"x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
