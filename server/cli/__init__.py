"""The `cobatch` command.

Commands import what they run when they run: `--help` and a refused setting answer without loading
uvicorn or an engine. The flags of `serve` are the settings of server/settings/schema.py under their own
names; they are passed on as text, so that one parser and one wording serve file, environment and flags.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cobatch import __version__
from cobatch.server.cli.bench import bench
from cobatch.server.cli.build import build
from cobatch.server.cli.observe import explain, trace
from cobatch.server.cli.simulate import profile, simulate
from cobatch.server.cli.token import token_app
from cobatch.server.console import end
from cobatch.server.settings.schema import (
    MODEL_FIELDS,
    SERVER_FIELDS,
    ModelSettings,
    ServerSettings,
    Settings,
    flag_name,
    is_loopback,
    load_settings,
)
from cobatch.server.settings.values import SettingsError

app = typer.Typer(
    name="cobatch",
    help="Serve models to many callers at once: their requests leave as one batch.",
    no_args_is_help=True,
    add_completion=False,
    # Rich's boxes cut long flags short at 80 columns, and spread a usage error over many lines.
    rich_markup_mode=None,
    # A traceback decorated with local variables could print a user's data.
    pretty_exceptions_enable=False,
)
app.add_typer(token_app, name="token")
_DEFAULTS: dict[str, Any] = {
    field.name: field.default
    for struct in (ServerSettings, ModelSettings)
    for field in msgspec.structs.fields(struct)
}


def main() -> None:
    """The console script: exit status 2 for refused settings or usage, 1 for a model that fails."""
    app(prog_name="cobatch")


def _help(setting: str) -> str:
    """The setting's own description, with what holds where it is not given."""
    kind = (SERVER_FIELDS | MODEL_FIELDS)[setting]
    described = next(meta.description for meta in reversed(kind.__metadata__) if meta.description)
    default = {True: "on", False: "off"}.get(_DEFAULTS[setting], _DEFAULTS[setting])
    # Where nothing given means something computed, the description says what.
    shown = "" if "(default" in described else f" (default: {default})"
    return f"{described[0].upper()}{described[1:]}{shown}."


def _flag(setting: str, metavar: str) -> Any:
    """A flag whose value stays text until the settings are checked."""
    return typer.Option(flag_name(setting), metavar=metavar, help=_help(setting))


def _switch(setting: str) -> Any:
    """A flag that is on, off or not given."""
    name = flag_name(setting)
    both = f"{name}/--no-{name[2:]}"
    return typer.Option(both, help=_help(setting))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        typer.echo(f"cobatch {__version__}")
        raise typer.Exit


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model file; replaces the file's [[models]].")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings as TOML.")] = None,
    name: Annotated[str | None, _flag("name", "NAME")] = None,
    engine: Annotated[str | None, _flag("engine", "auto|onnxruntime|tensorrt")] = None,
    model_version: Annotated[str | None, _flag("model_version", "VERSION")] = None,
    max_batch_size: Annotated[str | None, _flag("max_batch_size", "ROWS")] = None,
    max_delay_ms: Annotated[str | None, _flag("max_delay_ms", "MS")] = None,
    latency_target_ms: Annotated[str | None, _flag("latency_target_ms", "MS")] = None,
    deadline_ms: Annotated[str | None, _flag("deadline_ms", "MS")] = None,
    execution_timeout_ms: Annotated[str | None, _flag("execution_timeout_ms", "MS")] = None,
    max_queue_rows: Annotated[str | None, _flag("max_queue_rows", "ROWS")] = None,
    threads: Annotated[str | None, _flag("threads", "N")] = None,
    instances: Annotated[str | None, _flag("instances", "N")] = None,
    slots: Annotated[str | None, _flag("slots", "N")] = None,
    devices: Annotated[str | None, _flag("devices", "0,1")] = None,
    batch_buckets: Annotated[str | None, _flag("batch_buckets", "SIZES")] = None,
    cuda_graphs: Annotated[bool | None, _switch("cuda_graphs")] = None,
    plan_cache: Annotated[str | None, _flag("plan_cache", "FOLDER")] = None,
    plan_host_code: Annotated[bool | None, _switch("plan_host_code")] = None,
    tensorrt_runtime: Annotated[str | None, _flag("tensorrt_runtime", "tensorrt|tensorrt-rtx")] = None,
    host: Annotated[str | None, _flag("host", "ADDRESS")] = None,
    port: Annotated[str | None, _flag("port", "PORT")] = None,
    drain_timeout_s: Annotated[str | None, _flag("drain_timeout_s", "SECONDS")] = None,
    max_body_bytes: Annotated[str | None, _flag("max_body_bytes", "BYTES")] = None,
    keep_alive_s: Annotated[str | None, _flag("keep_alive_s", "SECONDS")] = None,
    receive_timeout_s: Annotated[str | None, _flag("receive_timeout_s", "SECONDS")] = None,
    compress_min_bytes: Annotated[str | None, _flag("compress_min_bytes", "BYTES")] = None,
    max_batch_items: Annotated[str | None, _flag("max_batch_items", "N")] = None,
    kept_predictions: Annotated[str | None, _flag("kept_predictions", "N")] = None,
    kept_bytes: Annotated[str | None, _flag("kept_bytes", "BYTES")] = None,
    kept_s: Annotated[str | None, _flag("kept_s", "SECONDS")] = None,
    max_wait_s: Annotated[str | None, _flag("max_wait_s", "SECONDS")] = None,
    tls_cert: Annotated[str | None, _flag("tls_cert", "FILE")] = None,
    tls_key: Annotated[str | None, _flag("tls_key", "FILE")] = None,
    trusted_proxies: Annotated[str | None, _flag("trusted_proxies", "ADDRESSES")] = None,
    log_level: Annotated[str | None, _flag("log_level", "debug|info|warning|error")] = None,
    access_log: Annotated[str | None, _flag("access_log", "off|text|json")] = None,
    access_log_level: Annotated[str | None, _flag("access_log_level", "info|warning|error")] = None,
    tracing: Annotated[bool | None, _switch("tracing")] = None,
    trace_sample: Annotated[str | None, _flag("trace_sample", "0..1")] = None,
    trace_endpoint: Annotated[str | None, _flag("trace_endpoint", "URL")] = None,
    metrics_open: Annotated[bool | None, _switch("metrics_open")] = None,
    fast_path: Annotated[bool | None, _switch("fast_path")] = None,
    allow_anonymous: Annotated[bool | None, _switch("allow_anonymous")] = None,
) -> None:
    """Serve a model, or the models of a configuration file, until SIGTERM.

    Each flag has an environment variable (--max-batch-size: COBATCH_MAX_BATCH_SIZE; MODEL:
    COBATCH_MODEL) and a key in the file ([server] port, [[models]] max_batch_size). Flags win over
    variables, and those over the file. Flags and variables about a model hold for every model.
    """
    flags = {key: value for key, value in context.params.items() if key != "config"}
    try:
        settings = load_settings(config, os.environ, flags)
    except SettingsError as error:
        raise end(str(error), 2) from None
    _warn_if_open(settings)
    from cobatch.server.serve import run

    raise typer.Exit(run(settings))


@app.command("inspect")
def inspect_model(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file.")],
    engine: Annotated[
        str, typer.Option(metavar="auto|onnxruntime|tensorrt", help="What opens it.", show_default=True)
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print a model's signature: names, datatypes, shapes, and which axis batches."""
    try:
        # The same checks, and the same words, as `serve` would have for this file; no environment,
        # since what is set for a server must not change what a file is said to hold.
        settings = load_settings(None, {}, {"model": model, "engine": engine, "name": "model"}).models[0]
    except SettingsError as error:
        raise end(str(error), 1) from None
    from cobatch.engines.errors import EngineError
    from cobatch.server.cli.inspect import describe, show

    try:
        described = describe(model, settings.engine, settings.max_batch_size)
    except EngineError as error:
        raise end(str(error), 1) from None
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(described)))
    else:
        show(described)


app.command()(build)
app.command()(simulate)
app.command()(profile)
app.command()(explain)
app.command()(trace)
app.command()(bench)


def _warn_if_open(settings: Settings) -> None:
    host = settings.server.host
    behind_tls = settings.server.tls_cert is not None or settings.server.trusted_proxies is not None
    if settings.auth is not None and not is_loopback(host) and not behind_tls:
        why = "whoever can listen on the way can use them; give --tls-cert, or a proxy and --trusted-proxies"
        typer.echo(f"cobatch: warning: tokens travel to {host} without TLS: {why}", err=True)
    if not settings.server.allow_anonymous:
        return
    who = "anyone on this machine" if is_loopback(host) else f"whoever reaches {host}"
    typer.echo(
        f"cobatch: warning: --allow-anonymous: {who} may call the models, without authentication", err=True
    )
