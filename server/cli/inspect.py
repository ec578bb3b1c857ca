"""`cobatch inspect`: a model's inputs and outputs.

The model is opened by the engine that would serve it, so the output is true of serving too, and a model
that cannot be served fails here with the same message.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from cobatch.engines.base import TensorSpec
from cobatch.engines.errors import EngineError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.server.console import end, option, stdout, switch
from cobatch.server.settings.load import load_settings
from cobatch.server.settings.schema import ENGINES, ModelSettings
from cobatch.server.settings.values import SettingsError


def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file, or FILE.py:NAME.")],
    engine: Annotated[str, option("|".join((*ENGINES, "NAME")), "Engine that opens it.")] = "auto",
    as_json: Annotated[bool, switch("--json", "Print JSON instead of a table.")] = False,
) -> None:
    """Print a model's inputs and outputs: names, datatypes, shapes, and the batch axis."""
    try:
        # The checks of `serve`, without the environment: variables for a server do not change a file.
        settings = load_settings(None, {}, {"model": model, "engine": engine, "name": "model"}).models[0]
        description = _describe(settings)
    except (SettingsError, EngineError) as error:
        raise end(str(error), 1) from None
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(description)))
    else:
        _show(description)


def _describe(settings: ModelSettings) -> dict[str, Any]:
    """Open the model and describe it, as `--json` prints it. Raises EngineLoadError if it cannot be served.

    `batch_size` is None if it is free. Shapes have the batch axis first, if there is one, and -1 where a size
    is not fixed.
    """
    options = EngineOptions(folder=settings.python_path)
    with closing(load_engine(settings.engine, settings.source, settings.max_batch_size, options)) as engine:
        engine.open()
        signature = engine.signature

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        shape = spec.tensor_shape(signature.fixed_batch or -1, spec.shape)
        return {"name": spec.name, "datatype": spec.datatype, "dtype": spec.dtype.name, "shape": shape}

    return {
        "name": Path(settings.source).stem if settings.python is None else settings.python.rpartition(":")[2],
        "path": settings.source,
        "platform": engine.platform,
        "batch_axis": 0 if signature.batching.on else None,
        "batch_size": signature.fixed_batch,
        "batching": signature.batching.verdict,
        "batching_note": signature.batching_note,
        "inputs": [tensor(spec) for spec in signature.inputs],
        "outputs": [tensor(spec) for spec in signature.outputs],
    }


def shape_text(shape: Sequence[int], first: str = "batch") -> str:
    """Return `[batch, 16]`, or `[8, 16]` if the model fixes its batch; `?` is an axis of any size."""
    axes = ["?" if size < 0 else str(size) for size in shape]
    return f"[{', '.join([first, *axes[1:]] if -1 in shape[:1] else axes)}]"


def _show(model: dict[str, Any]) -> None:
    """Print a heading, how rows are batched, and the tensors, on stdout."""
    console = stdout()
    size, axis = model["batch_size"], model["batch_axis"]
    rows = (
        "any number of rows"
        if size is None
        else f"fixed at {size} {'row' if size == 1 else 'rows; fewer are padded'}"
    )
    batch = "no axis of the tensors" if axis is None else f"axis {axis} of every tensor, {rows}"
    first = "?" if axis is None else "batch"
    heading = Text.assemble((model["name"], "bold"), f"  {model['platform']}  {model['path']}")
    # Soft: the terminal breaks a long path, so that it is copied as one word.
    console.print(heading, soft_wrap=True)
    console.print(f"batch: {batch}", soft_wrap=True)
    # Text, not str: rich would read "[batch, 16]" as a style.
    console.print(Text(f"batching: {model['batching_note']}"), soft_wrap=True)
    table = Table("", "name", "datatype", "dtype", "shape", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for role, tensors in (("input", model["inputs"]), ("output", model["outputs"])):
        for tensor in tensors:
            shape = shape_text(tensor["shape"], first)
            cells = (role, tensor["name"], tensor["datatype"], tensor["dtype"], shape)
            table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
