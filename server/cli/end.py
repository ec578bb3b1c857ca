"""How a command ends where it cannot do what it was asked for. Loads nothing that `--help` does not need."""

from __future__ import annotations

import typer


def end(message: str, status: int) -> typer.Exit:
    """Say why on stderr, in one line; the caller raises what comes back."""
    typer.echo(f"cobatch: {' '.join(message.split())}", err=True)
    return typer.Exit(status)
