"""The `cobatch` command. A command's module is imported when the command runs."""

import errno
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from cobatch import __version__

# Name: module, function or group of commands in it, and a line for `cobatch --help`.
_COMMANDS = {
    "serve": ("serve", "serve", "Serve models until SIGTERM."),
    "inspect": ("inspect", "inspect", "Print a model's inputs and outputs."),
    "build": ("build", "build", "Build a TensorRT plan from an ONNX model."),
    "simulate": ("simulate", "simulate", "Simulate the scheduler under load in virtual time."),
    "profile": ("simulate", "profile", "Measure a model's run times, for simulate."),
    "explain": ("observe", "explain", "Say where a recent request's time went."),
    "trace": ("observe", "trace", "Record a running server's scheduler, for Perfetto."),
    "bench": ("bench", "bench", "Put load on a server and measure it."),
    "token": ("token", "token_app", "Make keys, tokens and API keys for development."),
}
# Rich's boxes cut long flags at 80 columns, and spread a usage error over many lines. A traceback decorated
# with local variables could print a user's data.
_PLAIN: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}


class SectionedCommand(TyperCommand):
    """A command whose help lists options by `rich_help_panel`, which typer does only with rich."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            title = "Arguments" if param.param_type_name == "argument" else "Options"
            if record is not None:
                sections.setdefault(getattr(param, "rich_help_panel", None) or title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are run or asked for their help."""

    def __init__(self, **attributes: Any) -> None:
        names: Any = dict.fromkeys(_COMMANDS)
        super().__init__(**attributes | {"commands": names})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command = getattr(import_module(f"cobatch.server.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            return get_command(command)
        single = typer.Typer(add_completion=False, **_PLAIN)
        single.command(cmd_name, cls=SectionedCommand)(command)
        return get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in _COMMANDS.items()])


app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}, **_PLAIN
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Serve models over HTTP, and batch concurrent requests dynamically."""
    if version:
        typer.echo(f"cobatch {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the console script. Exit status 2: refused settings or usage; 1: the command failed."""
    try:
        app(prog_name="cobatch")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what stdout still holds is written at the end
        typer.echo(f"cobatch: cannot write the output: {error.strerror}", err=True)
        sys.exit(1)
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        typer.echo("cobatch: no thread can be started: the limit of processes (pids) is too low", err=True)
        sys.exit(1)
