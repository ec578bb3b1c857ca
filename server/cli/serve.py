"""`cobatch serve`. Its flags are the settings of server/settings/schema.py.

Values stay text until the settings are checked, so that one parser and one wording serve file, environment
and flags.
"""

import logging
import os
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from cobatch.engines.errors import EngineError
from cobatch.server.observability.logs import JsonFormatter
from cobatch.server.settings.describe import Setting, settings_of
from cobatch.server.settings.load import read_settings
from cobatch.server.settings.schema import (
    ENGINES,
    FILE_ONLY,
    ModelSettings,
    ServerSettings,
    Settings,
    env_name,
    flag_name,
)
from cobatch.server.settings.values import Errors, is_loopback


def serve(*, config: Path | None, check: bool, **flags: object) -> None:
    """Serve models until SIGTERM: one model, or those of a configuration file.

    Each flag has an environment variable (--max-batch-size: COBATCH_MAX_BATCH_SIZE; MODEL:
    COBATCH_MODEL) and a key in the file ([server] port, [[models]] max_batch_size). Flags win over
    variables, and variables over the file. Flags and variables about a model hold for every model.
    docs/configuration.md describes every setting.
    """
    errors = Errors()
    settings = read_settings(config, os.environ, flags, errors)
    several = settings.server.process_count > 1
    if check or several:  # several processes would each refuse the same files
        _check_start(settings, f"file {config or os.environ.get(env_name('config'))}", errors)
    if check and not errors.under("models"):
        _check_engines(settings, errors)
    if errors:
        for message in errors:
            typer.echo(f"cobatch: {message}", err=True)
        raise typer.Exit(2)
    _warn_if_open(settings)
    if check:
        names = ", ".join(settings.names)
        typer.echo(f"cobatch: the settings are valid; models: {names}")
        return
    if several:
        from cobatch.server.supervisor.supervisor import run as supervise  # noqa: PLC0415 - it imports no server

        raise typer.Exit(supervise(settings))
    from cobatch.server.serve import run  # noqa: PLC0415 - help and refusals need neither uvicorn nor an engine

    raise typer.Exit(run(settings))


def _check_start(settings: Settings, source: str, errors: Errors) -> None:
    """Read the files of keys, which `source` names, and make the application, as the server does."""
    if settings.auth is not None:
        from cobatch.server.auth.api_keys import ApiKeys  # noqa: PLC0415 - only if there are keys
        from cobatch.server.auth.keys import configured_keys  # noqa: PLC0415 - loads cryptography

        refused = Errors()
        for issuer in settings.auth.issuers:
            with refused:
                configured_keys(issuer)
        errors += [f"{message} ({source})" for message in refused]
        with errors:
            if settings.auth.api_keys_file:
                ApiKeys.read(Path(settings.auth.api_keys_file), source)
    if (settings.server.tracing or any(model.reload for model in settings.models)) and not errors:
        from cobatch.server.app import create_app  # noqa: PLC0415 - the whole server

        with errors:  # they need libraries
            create_app(settings)


def _check_engines(settings: Settings, errors: Errors) -> None:
    """Create engines of other packages, and those with options, which imports their libraries."""
    from cobatch.engines.loader import BY_SUFFIX, load_engine  # noqa: PLC0415 - loads NumPy
    from cobatch.server.inference.engines import engine_options, places  # noqa: PLC0415

    for index, model in enumerate(settings.models):
        by_file = model.python is not None or Path(model.path).suffix in BY_SUFFIX
        ours = model.engine in ENGINES[1:] or (model.engine == "auto" and by_file)
        if ours and not model.engine_options and not model.providers:
            continue
        options = engine_options(model, places(model)[0])
        try:
            load_engine(model.engine, model.source, model.max_batch_size, options).close()
        except EngineError as error:
            errors.append(f"models[{index}].engine: {error}")


def _warn_if_open(settings: Settings) -> None:
    warnings = []
    host = settings.server.host
    behind_tls = settings.server.tls_cert is not None or settings.server.trusted_proxies is not None
    if settings.auth is not None and not is_loopback(host) and not behind_tls:
        advice = "anyone on the network path can read and use them; set --tls-cert, or use a TLS proxy"
        warnings.append(f"tokens travel to {host} without TLS: {advice} and --trusted-proxies")
    if settings.server.allow_anonymous:
        callers = "anyone on this machine" if is_loopback(host) else f"anyone who reaches {host}"
        warnings.append(f"--allow-anonymous: {callers} may call the models, without authentication")
    for warning in warnings:
        record = logging.LogRecord("cobatch", logging.WARNING, "", 0, "%s", (warning,), None)
        as_json = settings.server.logs_json
        text = JsonFormatter().format(record) if as_json else f"cobatch: warning: {warning}"
        typer.echo(text, err=True)


def _parameter(setting: Setting, section: str) -> Parameter:
    flag = flag_name(setting.name)
    default = setting.computed or _shown(setting.default)
    text = f"{setting.help[0].upper()}{setting.help[1:]}{f' (default: {default})' if default else ''}."
    if setting.is_switch:
        switch = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, rich_help_panel=section)
        return _keyword(setting.name, Annotated[bool | None, switch])
    option = typer.Option(flag, metavar=setting.placeholder, help=text, rich_help_panel=section)
    return _keyword(setting.name, Annotated[str | None, option])


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else "" if default is None else str(default)


def _keyword(name: str, kind: Any, default: object = None) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)


_MODEL = typer.Argument(
    metavar="MODEL",
    help="A model file, or FILE.py:NAME; replaces the file's [[models]]. A pipeline joins them.",
)
_CONFIG = typer.Option(metavar="FILE", help="Configuration file (TOML).")
_CHECK = typer.Option("--check", help="Check the settings, print every error, and exit.")
serve.__signature__ = Signature(  # type: ignore[attr-defined]
    [
        _keyword("model", Annotated[str | None, _MODEL]),
        _keyword("config", Annotated[Path | None, _CONFIG]),
        _keyword("check", Annotated[bool, _CHECK], False),
        *(
            _parameter(setting, section)
            for struct, section in ((ModelSettings, "Model options"), (ServerSettings, "Server options"))
            for setting in settings_of(struct).values()
            if setting.name not in ("path", "python", *FILE_ONLY)
        ),
    ]
)
