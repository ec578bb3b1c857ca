"""Run as a program on a GPU, once for each fault: what it does to a process must not reach the other tests.

`python -m tests.support.gpu.fault illegal|memory PLAN` does it and prints what came of it, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import random_rows, run
from cobatch.engines.base import Engine
from cobatch.engines.errors import EngineError
from cobatch.engines.loader import load_engine

# Writes to address 16, which is nobody's. PTX is text, ended by a zero; the driver compiles it, without nvcc.
# ptxas takes it for compute capabilities 7.5 to 12.0.
_ILLEGAL = b"""
.version 6.3
.target sm_75
.address_size 64
.visible .entry illegal()
{
    .reg .u64 %address;
    .reg .u32 %value;
    mov.u64 %address, 16;
    mov.u32 %value, 7;
    st.global.u32 [%address], %value;
    ret;
}
\0"""


@contextlib.contextmanager
def opened(plan: str) -> Iterator[Engine]:
    """The engine, open on this thread, where its context is current."""
    engine = load_engine("tensorrt", plan, 8)
    try:
        engine.open()
        yield engine
    finally:
        engine.close()


def attempt(engine: Engine) -> dict[str, str]:
    """A batch: `error` and `text`, both empty where it went well."""
    rows = [random_rows(spec, 4) for spec in engine.signature.inputs]
    try:
        run(engine, rows)
    except EngineError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"error": "", "text": ""}


def illegal(plan: str) -> dict[str, Any]:
    """A kernel of ours writes where nobody may, in the engine's context; then a new engine is opened."""
    import pycuda.driver as cuda  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 - GPUs only

    with opened(plan) as engine:
        before = attempt(engine)
        module = cuda.module_from_buffer(_ILLEGAL)
        module.get_function("illegal")(grid=(1, 1), block=(1, 1, 1))
        first, second = attempt(engine), attempt(engine)
        del module
    return {"before": before, "first": first, "second": second, "again": _again(plan)}


def _again(plan: str) -> dict[str, str]:
    try:
        with opened(plan) as engine:
            return attempt(engine)
    except EngineError as error:
        return {"error": type(error).__name__, "text": str(error)}


def memory(plan: str) -> dict[str, Any]:
    """Nearly all of the GPU's memory is taken before the engine is opened, and given back after."""
    import pycuda.driver as cuda  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 - GPUs only

    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    taken: list[Any] = []
    step = 1 << 30
    while step >= 1 << 20:
        try:
            taken.append(cuda.mem_alloc(step))
        except cuda.MemoryError:
            step >>= 1
    full = _again(plan)
    taken.clear()
    after = _again(plan)
    context.pop()
    return {"full": full, "after": after}


def main(arguments: list[str]) -> int:
    """Print what came of it."""
    fault, plan = arguments
    sys.stdout.write(json.dumps({"illegal": illegal, "memory": memory}[fault](plan)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
