"""Settings of one server process: what may be set, and the way from outside to checked values.

A setting is one field of a struct below: its type, range, default and help text stand there and
nowhere else. The command line's flags, the environment variables' names and the words of every
refusal are derived from it, so a new setting is one line.

Order, later ones win: defaults, the configuration file (TOML), environment variables, flags. What
is set for models by a variable or a flag holds for every model; a model path given there replaces
the file's list of models. Every value is checked where it was written, even one that a later
source overrides, so that a mistake is never hidden.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cobatch.server.settings.auth import AuthSettings, read_auth
from cobatch.server.settings.padding import PadSettings, read_pad
from cobatch.server.settings.values import (
    Given,
    SettingsError,
    Table,
    check,
    check_table,
    fields_of,
    read_toml,
    refused,
    suggestion,
    values_of,
)

ENV_PREFIX = "COBATCH_"
# For the commands that ask a server (`cobatch explain`); no setting of a server's.
TOKEN_VARIABLE = "COBATCH_TOKEN"  # noqa: S105 - the variable's name
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z"
LARGEST = 2**31 - 1

Text = Annotated[str, Meta(min_length=1)]
Name = Annotated[str, Meta(pattern=NAME_PATTERN, max_length=128)]
EngineKind = Literal["auto", "onnxruntime", "tensorrt"]
LogLevel = Literal["debug", "info", "warning", "error"]
AccessLog = Literal["off", "text", "json"]
AccessLogLevel = Literal["info", "warning", "error"]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Timeout = Annotated[float, Meta(gt=0, le=86_400)]
Milliseconds = Annotated[float, Meta(ge=0, le=60_000)]
TimeoutMs = Annotated[float, Meta(gt=0, le=86_400_000)]
Rows = Annotated[int, Meta(ge=1, le=LARGEST)]
Bytes = Annotated[int, Meta(ge=0, le=LARGEST)]
Threads = Annotated[int, Meta(ge=1, le=1024)]
TensorRTKind = Literal["tensorrt", "tensorrt-rtx"]


class ModelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model. `name` and `max_queue_rows` are always set once it is made (see __post_init__)."""

    path: Annotated[Text, Meta(description="the model's file")]
    name: Annotated[Name, Meta(description="its name in URLs (default: the file's)")] = ""
    model_version: Annotated[Name, Meta(description="its version in URLs")] = "1"
    engine: Annotated[EngineKind, Meta(description="what runs it")] = "auto"
    max_batch_size: Annotated[int, Meta(ge=1, le=65536, description="most rows in a batch")] = 64
    max_delay_ms: Annotated[Milliseconds, Meta(description="a row's longest wait for company")] = 0.0
    latency_target_ms: Annotated[
        TimeoutMs | None, Meta(description="keep batches so small that a request takes about so long")
    ] = None
    deadline_ms: Annotated[
        TimeoutMs | None, Meta(description="time limit of a request that has none of its own")
    ] = None
    execution_timeout_ms: Annotated[
        TimeoutMs | None, Meta(description="longest run before the engine counts as hung")
    ] = None
    max_queue_rows: Annotated[Rows, Meta(description="rows that may wait (default: 16 batches, >= 1024)")] = 0
    threads: Annotated[Threads | None, Meta(description="the engine's threads (default: cores - 1)")] = None
    instances: Annotated[
        int, Meta(ge=1, le=64, description="engines that share the queue, on each device")
    ] = 1
    devices: Annotated[
        Text, Meta(description="TensorRT: the GPUs, as CUDA counts them, that share the queue")
    ] = "0"
    slots: Annotated[
        int, Meta(ge=2, le=8, description="TensorRT: batches under way on an engine at once")
    ] = 2
    batch_buckets: Annotated[
        Text | None,
        Meta(description="TensorRT: sizes to round batches up to, 1,4,16 (default: powers of two)"),
    ] = None
    cuda_graphs: Annotated[
        bool, Meta(description="TensorRT: replay batches as CUDA graphs, where cuda-bindings is installed")
    ] = True
    plan_cache: Annotated[
        Text | None, Meta(description="TensorRT: folder of built plans (default: ~/.cache/cobatch/plans)")
    ] = None
    plan_host_code: Annotated[
        bool, Meta(description="TensorRT: let a plan bring code for the CPU; version-compatible ones do")
    ] = False
    tensorrt_runtime: Annotated[TensorRTKind, Meta(description="which TensorRT to use")] = "tensorrt"
    pad: tuple[PadSettings, ...] = ()

    def __post_init__(self) -> None:
        """Fill in what follows from other fields, so that readers never meet "not set"."""
        if not self.name:
            msgspec.structs.force_setattr(self, "name", Path(self.path).stem)
        if not self.max_queue_rows:
            msgspec.structs.force_setattr(self, "max_queue_rows", max(1024, 16 * self.max_batch_size))


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The HTTP side, shared by all models. Times are in seconds, sizes in bytes."""

    host: Annotated[Text, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="TCP port; 0 takes a free one")] = 8000
    drain_timeout_s: Annotated[Seconds, Meta(description="longest wait for accepted work at the end")] = 30.0
    max_body_bytes: Annotated[int, Meta(ge=1, le=LARGEST, description="largest request body")] = 1 << 26
    keep_alive_s: Annotated[Seconds, Meta(description="how long an idle connection stays open")] = 5.0
    receive_timeout_s: Annotated[Timeout, Meta(description="time for a request to arrive whole")] = 30.0
    compress_min_bytes: Annotated[int, Meta(ge=0, le=LARGEST, description="smallest answer to compress")] = (
        1 << 16
    )
    max_batch_items: Annotated[int, Meta(ge=1, le=65536, description="most items of a POST /batch")] = 256
    kept_predictions: Annotated[int, Meta(ge=1, le=LARGEST, description="most predictions to keep")] = 1000
    kept_bytes: Annotated[int, Meta(ge=4096, le=LARGEST, description="memory for kept predictions")] = 1 << 28
    kept_s: Annotated[Timeout, Meta(description="how long a finished prediction is kept")] = 600.0
    max_wait_s: Annotated[Seconds, Meta(description="longest wait that a client may ask for")] = 60.0
    tls_cert: Annotated[Text | None, Meta(description="certificate chain (PEM); turns TLS on")] = None
    tls_key: Annotated[Text | None, Meta(description="its private key (default: in the same file)")] = None
    trusted_proxies: Annotated[
        Text | None, Meta(description="addresses whose X-Forwarded-For/-Proto are believed, with commas")
    ] = None
    log_level: Annotated[LogLevel, Meta(description="least severe messages to log")] = "info"
    access_log: Annotated[AccessLog, Meta(description="a line on stderr for each request, and its form")] = (
        "off"
    )
    access_log_level: Annotated[
        AccessLogLevel,
        Meta(description="which: info all, warning those refused or failed, error those failed"),
    ] = "info"
    tracing: Annotated[bool, Meta(description="send OpenTelemetry traces (needs cobatch[otel])")] = False
    trace_sample: Annotated[
        float, Meta(ge=0, le=1, description="part of the requests to trace whose callers do not say")
    ] = 1.0
    trace_endpoint: Annotated[
        Text | None,
        Meta(description="collector, http://HOST:4318 (default: as OTEL_EXPORTER_OTLP_ENDPOINT says)"),
    ] = None
    metrics_open: Annotated[
        bool, Meta(description="with [auth]: let anybody read /metrics, without a credential")
    ] = False
    fast_path: Annotated[bool, Meta(description="serve the infer routes below ASGI")] = True
    allow_anonymous: Annotated[bool, Meta(description="permit a host that others can reach")] = False


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything one process needs to know; `models` is never empty and names in it are unique."""

    server: ServerSettings
    models: tuple[ModelSettings, ...]
    auth: AuthSettings | None = None


SERVER_FIELDS = fields_of(ServerSettings)
# Without `pad`, whose tables are for a file only.
MODEL_FIELDS = {name: kind for name, kind in fields_of(ModelSettings).items() if name != "pad"}
_TABLES = ("server", "models", "auth")
# `path` is the MODEL argument; as a variable it is called COBATCH_MODEL.
_FLAG_TYPES: dict[str, Any] = {
    "config": Path,
    "model": MODEL_FIELDS["path"],
    **SERVER_FIELDS,
    **{name: kind for name, kind in MODEL_FIELDS.items() if name != "path"},
}


def load_settings(config: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Settings:
    """Settings from a file, COBATCH_* variables and flags; raises SettingsError.

    `flags` maps settings' names (`max_batch_size`, and `model` for the path) to values, None where
    unset; text is parsed as a variable's text is. `config` wins over COBATCH_CONFIG. Relative model
    paths are relative to the file's folder where they stand in the file, else to the working directory.
    """
    over = _from_environ(environ) | _from_flags(flags)
    path, origin = config, "flag --config"
    if path is None and "config" in over:
        path, origin = Path(over["config"].value), over["config"].source
    server, models, auth = _from_file(path, origin) if path is not None else ({}, [], None)
    server |= {name: given for name, given in over.items() if name in SERVER_FIELDS}
    if "model" in over:
        models = [{"path": over["model"]}]
    for_models = {name: given for name, given in over.items() if name in MODEL_FIELDS}
    if "name" in for_models and len(models) > 1:
        given = for_models["name"]
        raise SettingsError(f"{given.key}: names one model, but there are {len(models)} ({given.source})")
    if auth is None:
        _check_host(server)
    elif "allow_anonymous" in server and server["allow_anonymous"].value:
        given = server["allow_anonymous"]
        raise SettingsError(f"{given.key}: not together with [auth] ({given.source})")
    _check_edge(server)
    built = _build_models([table | for_models for table in models])
    _check_rules(auth, [model.name for model in built], f"file {path}")
    return Settings(server=msgspec.convert(values_of(server), ServerSettings), models=built, auth=auth)


def is_loopback(host: str) -> bool:
    """Whether listening on `host` (an address or `localhost`) is reachable from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def env_name(setting: str) -> str:
    """The environment variable of a setting: `max_batch_size` -> `COBATCH_MAX_BATCH_SIZE`."""
    return ENV_PREFIX + setting.upper()


def flag_name(setting: str) -> str:
    """The flag of a setting: `max_batch_size` -> `--max-batch-size`."""
    return "MODEL" if setting == "model" else "--" + setting.replace("_", "-")


def _from_environ(environ: Mapping[str, str]) -> Table:
    table: Table = {}
    names = {env_name(setting): setting for setting in _FLAG_TYPES}
    ours = {name for name in environ if name.startswith(ENV_PREFIX)}
    for variable in sorted(ours - {TOKEN_VARIABLE}):
        # A Kubernetes Service named "cobatch" puts COBATCH_PORT=tcp://... and its like into every pod.
        linked = "_SERVICE_" in variable or "_TCP" in variable or environ[variable].startswith("tcp://")
        hint = "; Kubernetes sets it for a Service of this name: enableServiceLinks: false" if linked else ""
        if variable not in names:
            near = hint or suggestion(variable, names)
            raise SettingsError(f"{variable}: unknown environment variable{near}")
        source = f"environment variable {variable}{hint}"
        setting = names[variable]
        table[setting] = check(_key(setting), environ[variable], _FLAG_TYPES[setting], source, text=True)
    return table


def _from_flags(flags: Mapping[str, object]) -> Table:
    table: Table = {}
    for setting, value in flags.items():
        if value is None:
            continue
        if setting not in _FLAG_TYPES:
            raise SettingsError(f"{flag_name(setting)}: unknown flag{suggestion(setting, _FLAG_TYPES)}")
        source = "argument MODEL" if setting == "model" else f"flag {flag_name(setting)}"
        given = str(value) if isinstance(value, Path) else value
        table[setting] = check(
            _key(setting), given, _FLAG_TYPES[setting], source, text=isinstance(given, str)
        )
    return table


def _key(setting: str) -> str:
    """The key path that a variable or a flag stands for; models[*] because it holds for all."""
    if setting in SERVER_FIELDS:
        return f"server.{setting}"
    return {"config": "config", "model": "models[0].path"}.get(setting, f"models[*].{setting}")


def _from_file(path: Path, origin: str) -> tuple[Table, list[Table], AuthSettings | None]:
    document = read_toml(path, origin)
    source = f"file {path}"
    for key in document:
        if key not in _TABLES:
            raise SettingsError(f"{key}: unknown key{_belongs(key, _TABLES)} ({source})")
    server = check_table("server", document.get("server", {}), SERVER_FIELDS, source, _belongs)
    for name in ("tls_cert", "tls_key"):
        if name in server:
            server[name] = server[name]._replace(value=str(path.parent / server[name].value))
    listed = document.get("models", [])
    if not isinstance(listed, list):
        raise refused("models", "an array of tables, written [[models]]", listed, source)
    models = []
    for index, table in enumerate(listed):
        fields = MODEL_FIELDS | {"pad": Any}
        model = check_table(f"models[{index}]", _with_lists_as_text(table), fields, source, _belongs)
        if "pad" in model:
            given = model["pad"]
            model["pad"] = given._replace(value=read_pad(given.value, given.key, source))
        if "path" not in model:
            raise SettingsError(f"models[{index}].path: missing; expected the model's file ({source})")
        for name in ("path", "plan_cache"):
            if name in model:
                model[name] = model[name]._replace(value=str(path.parent / model[name].value))
        models.append(model)
    auth = read_auth(document["auth"], path.parent, source) if "auth" in document else None
    return server, models, auth


def _with_lists_as_text(table: Any) -> Any:
    """`devices = [0, 1]` is what a file says where a flag says 0,1."""
    if not isinstance(table, dict):
        return table
    lists = {
        name: ",".join(map(str, table[name]))
        for name in ("batch_buckets", "devices")
        if isinstance(table.get(name), list) and all(type(one) is int for one in table[name])
    }
    return table | lists


def _belongs(key: str, known: Iterable[str]) -> str:
    """How to go on after an unknown key: the nearest known one, or the table it is a key of."""
    near = suggestion(key, known)
    if near or key not in _FLAG_TYPES:
        return near
    return "; it belongs in [server]" if key in SERVER_FIELDS else "; it belongs in [[models]]"


def _check_host(server: Table) -> None:
    """Without authentication only this machine may call, unless the operator said otherwise."""
    host = server.get("host")
    allowed = server.get("allow_anonymous")
    if host is None or is_loopback(host.value) or (allowed is not None and allowed.value):
        return
    expected = "a loopback address (127.0.0.0/8, ::1 or localhost)"
    why = "anyone who reaches it could call the models; write [auth], or --allow-anonymous permits that"
    raise SettingsError(f"{refused(host.key, expected, host.value, host.source, text=True)}: {why}")


def _check_rules(auth: AuthSettings | None, names: list[str], source: str) -> None:
    """A rule for a model that is not served is a slip, and leaves the model that was meant without one."""
    for index, rule in enumerate(auth.models if auth is not None else ()):
        if rule.model not in names:
            near = suggestion(rule.model, names) or f"; served are {', '.join(names)}"
            key = f"auth.models[{index}].model"
            raise SettingsError(f"{key}: there is no model {rule.model!r}{near} ({source})")


def _check_edge(server: Table) -> None:
    """TLS and the proxies in front."""
    if "tls_key" in server and "tls_cert" not in server:
        given = server["tls_key"]
        raise SettingsError(f"{given.key}: needs tls_cert, the certificate ({given.source})")
    given_proxies = server.get("trusted_proxies")
    for address in given_proxies.value.split(",") if given_proxies is not None else ():
        try:
            ipaddress.ip_network(address.strip())
        except ValueError:
            expected = "addresses or networks (10.0.0.0/8), with commas between them"
            assert given_proxies is not None
            raise refused(given_proxies.key, expected, address, given_proxies.source, text=True) from None


_SIZES = (re.compile(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*"), "sizes with commas between them (1,4,16)")
_NUMBERS = (re.compile(r"\d{1,4}(,\d{1,4})*"), "numbers with commas between them (0,1)")


def _check_list(given: Given | None, kind: tuple[re.Pattern[str], str]) -> None:
    pattern, expected = kind
    if given is not None and not pattern.fullmatch(given.value):
        raise refused(given.key, expected, given.value, given.source, text=True)


def _build_models(tables: list[Table]) -> tuple[ModelSettings, ...]:
    if not tables:
        raise SettingsError("models: no model to serve; give MODEL, or [[models]] in a --config file")
    models: list[ModelSettings] = []
    for index, table in enumerate(tables):
        model = msgspec.convert(values_of(table), ModelSettings)
        path, name = table["path"], table.get("name", table["path"])
        if not Path(model.path).is_file():
            what = "a folder" if Path(model.path).is_dir() else "no file there"
            raise SettingsError(
                f"{path.key}: expected a model file, got {model.path!r}: {what} ({path.source})"
            )
        _check_list(table.get("batch_buckets"), _SIZES)
        _check_list(table.get("devices"), _NUMBERS)
        key = f"models[{index}].name"
        check(key, model.name, Name, name.source if "name" in table else "the file's name; set name")
        for other, earlier in enumerate(models):
            if earlier.name == model.name:
                raise SettingsError(
                    f"{key}: {model.name!r} is already models[{other}]'s name ({name.source})"
                )
        models.append(model)
    return tuple(models)
