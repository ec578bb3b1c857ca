"""The terminal of a command: where reports are printed, and tables without lines.

How a command ends where it cannot do what it was asked for. Loads nothing that `--help` does not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:  # a command that prints no table does not load rich
    from rich.console import Console
    from rich.table import Table


# A pipe has no width of its own, and names folded to 80 columns could not be searched for.
_PIPE_WIDTH = 200


def stdout() -> Console:
    """For reports, as wide as the terminal; in a pipe wide enough for whole lines."""
    from rich.console import Console  # noqa: PLC0415 - see above

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def plain_table(*columns: str, no_wrap: bool = False) -> Table:
    """A table without lines; the first column to the left, the others to the right."""
    from rich.table import Table  # noqa: PLC0415 - see above

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=no_wrap)
    return table


def end(message: str, status: int) -> typer.Exit:
    """Say why on stderr, in one line; the caller raises what comes back."""
    typer.echo(f"cobatch: {' '.join(message.split())}", err=True)
    return typer.Exit(status)
