"""What `cobatch inspect` tells about a model: read by opening it, as data and as a table.

The model is opened by the same engine that would serve it, so what is shown is what is served, and
a model that could not be served fails here with the same message.
"""

from pathlib import Path
from typing import TypedDict

from rich.table import Table
from rich.text import Text

from cobatch.engines.base import Signature, TensorSpec
from cobatch.engines.loader import load_engine
from cobatch.server.console import stdout
from cobatch.server.settings.schema import EngineKind


class Tensor(TypedDict):
    """One input or output; `shape` has the batch axis first, -1 where a size is not fixed."""

    name: str
    datatype: str
    dtype: str
    shape: list[int]


class Description(TypedDict):
    """A model as `--json` prints it; `batch_size` is None where any number of rows is taken."""

    name: str
    path: str
    platform: str
    batch_axis: int
    batch_size: int | None
    inputs: list[Tensor]
    outputs: list[Tensor]


def describe(path: Path, kind: EngineKind, max_batch_size: int) -> Description:
    """Open the model and describe it; raises EngineLoadError where it cannot be served."""
    engine = load_engine(kind, str(path), max_batch_size)
    try:
        engine.open()
        return _description(path, engine.platform, engine.signature)
    finally:
        engine.close()


def _description(path: Path, platform: str, signature: Signature) -> Description:
    batch = -1 if signature.fixed_batch is None else signature.fixed_batch
    return {
        "name": path.stem,
        "path": str(path),
        "platform": platform,
        "batch_axis": 0,
        "batch_size": signature.fixed_batch,
        "inputs": [_tensor(spec, batch) for spec in signature.inputs],
        "outputs": [_tensor(spec, batch) for spec in signature.outputs],
    }


def _tensor(spec: TensorSpec, batch: int) -> Tensor:
    return {
        "name": spec.name,
        "datatype": spec.datatype,
        "dtype": spec.dtype.name,
        "shape": [batch, *spec.shape],
    }


def table(model: Description) -> Table:
    """The tensors, one a row."""
    rows = Table("", "name", "datatype", "dtype", "shape", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for role, tensors in (("input", model["inputs"]), ("output", model["outputs"])):
        for tensor in tensors:
            # Text, not str: rich would read "[batch, 16]" as a style.
            cells = (role, tensor["name"], tensor["datatype"], tensor["dtype"], shape_text(tensor["shape"]))
            rows.add_row(*(Text(cell) for cell in cells))
    return rows


def shape_text(shape: list[int]) -> str:
    """`[batch, 16]`, or `[8, 16]` where the model fixes its batch; `?` is an axis of any size."""
    first, *rest = shape
    axes = ["batch" if first < 0 else str(first), *("?" if size < 0 else str(size) for size in rest)]
    return f"[{', '.join(axes)}]"


def show(model: Description) -> None:
    """Print a heading, how rows are batched, and the tensors, on stdout."""
    console = stdout()
    size = model["batch_size"]
    rows = "any number of rows" if size is None else f"fixed at {size} rows; fewer are padded"
    heading = Text.assemble((model["name"], "bold"), f"  {model['platform']}  {model['path']}")
    # Soft: the terminal breaks a long path, which stays one word for whoever copies it.
    console.print(heading, soft_wrap=True)
    console.print(f"batch: axis {model['batch_axis']} of every tensor, {rows}", soft_wrap=True)
    console.print(table(model))
