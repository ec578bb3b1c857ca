"""The terminal of a command: reports, tables without lines, and the message that a command ends with."""

from typing import Any

import typer
from rich.console import Console
from rich.table import Table

# A pipe has no width of its own, and names folded to 80 columns could not be searched for.
_PIPE_WIDTH = 200


def stdout() -> Console:
    """Return a console for reports, as wide as the terminal; in a pipe wide enough for whole lines."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def plain_table(*columns: str, no_wrap: bool = False) -> Table:
    """Return a table without lines; the first column is aligned to the left, the others to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=no_wrap)
    return table


def end(message: str, status: int) -> typer.Exit:
    """Print why the command failed, in one line on stderr; the caller raises the returned exit."""
    typer.echo(f"cobatch: {' '.join(message.split())}", err=True)
    return typer.Exit(status)


def option(metavar: str, text: str, *names: str, **attributes: Any) -> Any:
    """Return an option with a placeholder and a help text; typer's attributes apply."""
    return typer.Option(*names, metavar=metavar, help=text, **attributes)


def switch(name: str, text: str) -> Any:
    """Return a switch that has no `--no-...` form."""
    return typer.Option(name, help=text)
