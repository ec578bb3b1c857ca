"""Cause a fault on a GPU, in a process of its own, since it would affect other tests in the same process.

`python -m tests.support.gpu.fault illegal|memory PLAN` prints the errors as JSON.
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

# Writes to the unmapped address 16. PTX is text that ends with a zero; the driver compiles it without nvcc.
# ptxas accepts it for compute capabilities 7.5 to 12.0.
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
    """Open the engine on this thread, where its context is current."""
    engine = load_engine("tensorrt", plan, 8)
    try:
        engine.open()
        yield engine
    finally:
        engine.close()


def attempt(engine: Engine) -> dict[str, str]:
    """Run a batch; return its `error` and `text`, both empty on success."""
    rows = [random_rows(spec, 4) for spec in engine.signature.inputs]
    try:
        run(engine, rows)
    except EngineError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"error": "", "text": ""}


def illegal(plan: str) -> dict[str, Any]:
    """Run a kernel with an illegal write in the engine's context, then open a new engine."""
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
    """Allocate nearly all of the GPU's memory before the engine is opened, and free it after."""
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
    """Print the errors as JSON."""
    fault, plan = arguments
    sys.stdout.write(json.dumps({"illegal": illegal, "memory": memory}[fault](plan)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
