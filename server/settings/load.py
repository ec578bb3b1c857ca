"""Load settings from flags, environment variables and a file, and check them.

Later sources win: defaults, the file (TOML), environment variables, flags. A variable or flag about a model
holds for every model, and a model path given there replaces the file's list. Every value is checked where it
is written, even one that a later source overrides, and every refusal is reported.
"""

import ast
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from cobatch.engines.plugins import plugin_names
from cobatch.server.settings.auth import AuthSettings, build_auth
from cobatch.server.settings.describe import Text
from cobatch.server.settings.schema import (
    ENGINES,
    ENV_PREFIX,
    MODEL_FIELDS,
    PIPELINE_FIELDS,
    PYTHON_SOURCE,
    SERVER_FIELDS,
    ModelSettings,
    Name,
    PipelineSettings,
    ServerSettings,
    Settings,
    env_name,
    flag_name,
)
from cobatch.server.settings.tls import check_certificate
from cobatch.server.settings.values import (
    Errors,
    Given,
    Reader,
    SettingsError,
    Table,
    check,
    is_loopback,
    read_toml,
    suggestion,
    values_of,
)

# For commands that ask a server, such as `cobatch explain`; not a setting of the server.
TOKEN_VARIABLE = "COBATCH_TOKEN"  # noqa: S105 - the variable's name
# `path` and `python` are the MODEL argument; its variable is COBATCH_MODEL.
_FLAGS: dict[str, Any] = {
    "config": Text,
    "model": MODEL_FIELDS["path"],
    **SERVER_FIELDS,
    **{name: kind for name, kind in MODEL_FIELDS.items() if name not in ("path", "python")},
}


def load_settings(config: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Settings:
    """Return checked settings. Raises SettingsError with every refusal.

    `flags` maps names of settings (`max_batch_size`, and `model` for the path) to values, None if unset; text
    is parsed like a variable's. `config` wins over COBATCH_CONFIG. Relative paths in a file are relative to
    its folder, others to the working directory.
    """
    errors = Errors()
    settings = read_settings(config, environ, flags, errors)
    errors.raise_any()
    return settings


def read_settings(
    config: Path | None, environ: Mapping[str, str], flags: Mapping[str, object], errors: Errors
) -> Settings:
    """Return the settings as far as they are valid; refusals go to `errors`, and their values are missing."""
    given = _overrides(environ, {**flags, "config": config}, errors)
    document: dict[str, Any] = {}
    path = Path(given["config"].value if "config" in given else ".")
    if "config" in given:
        try:
            document = read_toml(path, "config", given["config"].source)
        except SettingsError as error:
            errors += error.messages
            # Settings that are missing elsewhere may be in that file.
            return Settings()
    source = f"file {path}"
    reader = Reader(source, path.parent, errors, _place)
    file = {name: one.value for name, one in reader.table("", document, Settings).items()}
    server = file.get("server", {}) | {name: one for name, one in given.items() if name in SERVER_FIELDS}
    auth = build_auth(file["auth"], source, errors) if "auth" in file else None
    errors += map(str, _server_conflicts(server, auth))
    folder = Given(str(path.parent), "models[*].python_path", source)
    tables = [{"python_path": folder} | table for table in file.get("models", [])]
    pipelines = [{"python_path": folder} | table for table in file.get("pipelines", [])]
    if "model" in given and _is_pipeline(given["model"].value):
        for_pipeline = {name: given[name] for name in PIPELINE_FIELDS if name in given}
        pipelines.append({"python": given["model"]._replace(key="pipelines[0].python"), **for_pipeline})
    elif "model" in given:
        tables = [_argument(given["model"])]
    if not tables and not pipelines and document.get("models", []) == document.get("pipelines", []):
        errors.append("models: no model to serve; give MODEL, or [[models]] in a --config file")
    for_models = {name: one for name, one in given.items() if name in MODEL_FIELDS}
    if "name" in for_models and len(tables) > 1:
        errors += for_models.pop("name").refused(f"names one model, but there are {len(tables)}").messages
    models = _build_models([table | for_models for table in tables], errors)
    built = _build_pipelines(pipelines, {model.name for model in models}, errors)
    if auth is not None and not errors.under("models") and not errors.under("pipelines"):
        names = [model.name for model in models] + [pipeline.name for pipeline in built]
        errors += _rule_conflicts(auth, names, source)
    return Settings(
        server=msgspec.convert(values_of(server), ServerSettings), models=models, pipelines=built, auth=auth
    )


def _argument(model: Given) -> Table:
    """Return the table of the MODEL argument: a file, or a model in Python."""
    if not Path(model.value).is_file() and re.fullmatch(PYTHON_SOURCE, model.value):
        return {"python": model._replace(key="models[0].python")}
    return {"path": model}


def _is_pipeline(model: str) -> bool:
    """Return whether the MODEL argument is FILE.py:NAME of a class with `handle`. The file is not run."""
    file, _, name = model.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        return False
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (SyntaxError, ValueError):  # a better place will tell
        return False
    of_class = {one.name: one.body for one in tree.body if isinstance(one, ast.ClassDef)}.get(name, [])
    methods = {one.name for one in of_class if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
    return "handle" in methods and "predict" not in methods


def _overrides(environ: Mapping[str, str], flags: Mapping[str, object], errors: Errors) -> Table:
    """Return the settings in variables and flags; flags win."""
    table: Table = {}

    def read(setting: str, value: object, source: str) -> None:
        with errors:
            table[setting] = check(_key(setting), value, _FLAGS[setting], source, text=isinstance(value, str))

    names = {env_name(setting): setting for setting in _FLAGS}
    ours = {name for name in environ if name.startswith(ENV_PREFIX)}
    for variable in sorted(ours - {TOKEN_VARIABLE}):
        value = environ[variable]
        # A Kubernetes Service named "cobatch" puts variables such as COBATCH_PORT=tcp://... into every pod.
        linked = "_SERVICE_" in variable or "_TCP" in variable or value.startswith("tcp://")
        hint = "; Kubernetes sets it for a Service of this name: enableServiceLinks: false" if linked else ""
        if variable in names:
            read(names[variable], value, f"environment variable {variable}{hint}")
        else:
            errors.append(f"{variable}: unknown environment variable{hint or suggestion(variable, names)}")
    for setting, given in flags.items():
        if setting not in _FLAGS:
            errors.append(f"{flag_name(setting)}: unknown flag{suggestion(setting, _FLAGS)}")
        elif given is not None:
            source = "argument MODEL" if setting == "model" else f"flag {flag_name(setting)}"
            read(setting, str(given) if isinstance(given, Path) else given, source)
    return table


def _key(setting: str) -> str:
    """Return the key path that a variable or flag stands for; models[*]: it holds for all."""
    if setting in SERVER_FIELDS:
        return f"server.{setting}"
    return {"config": "config", "model": "models[0].path"}.get(setting, f"models[*].{setting}")


def _place(key: str, known: Iterable[str]) -> str:
    """Suggest, for an unknown key, the nearest known one or the table that it belongs in."""
    near = suggestion(key, known)
    if near or key not in _FLAGS:
        return near
    return "; it belongs in [server]" if key in SERVER_FIELDS else "; it belongs in [[models]]"


def _server_conflicts(server: Table, auth: AuthSettings | None) -> Iterator[SettingsError]:
    """Yield the conflicts between settings of the server."""
    host, allowed = server.get("host"), server.get("allow_anonymous")
    if allowed is not None and allowed.value:
        if auth is not None:
            yield allowed.refused("not together with [auth]")
    elif auth is None and host is not None and not is_loopback(host.value):
        # Without authentication only this machine may call, unless the operator allows others.
        error = host.unexpected("a loopback address (127.0.0.0/8, ::1 or localhost)", text=True)
        why = "anyone who reaches it could call the models; write [auth], or --allow-anonymous permits that"
        yield SettingsError(f"{error}: {why}")
    cert, key = server.get("tls_cert"), server.get("tls_key")
    if cert is not None:
        try:
            check_certificate(cert.value, None if key is None else key.value)
        except SettingsError as error:
            yield cert.refused(str(error))
    elif key is not None:
        yield key.refused("needs tls_cert, the certificate")
    if (proxies := server.get("trusted_proxies")) is not None:
        for address in proxies.value.split(","):
            try:
                ipaddress.ip_network(address.strip())
            except ValueError:
                expected = "addresses or networks (10.0.0.0/8), with commas between them"
                yield proxies._replace(value=address).unexpected(expected, text=True)


def _build_models(tables: list[Table], errors: Errors) -> tuple[ModelSettings, ...]:
    models: dict[str, ModelSettings] = {}  # by key path
    for table in tables:
        with errors:
            if "pad" in table and not errors.under(table["pad"].key):
                _check_pads(table["pad"].value)
        with errors:
            _check_batching(table)
        with errors:
            _check_engine(table)
        path = table.get("path") or table["python"]
        with errors:
            _check_file(table)
        with errors:
            model = msgspec.convert(values_of(table), ModelSettings)
            _check_devices(model, table)
            _check_providers(model, table)
            key = path.key.rpartition(".")[0]
            source = table["name"].source if "name" in table else "the file's name; set name"
            check(f"{key}.name", model.name, Name, source)
            for other, earlier in models.items():
                if earlier.name == model.name:
                    source = table.get("name", path).source
                    raise SettingsError(f"{key}.name: {model.name!r} is already {other}'s name ({source})")
            models[key] = model
    return tuple(models.values())


def _build_pipelines(tables: list[Table], models: set[str], errors: Errors) -> tuple[PipelineSettings, ...]:
    pipelines: dict[str, PipelineSettings] = {}
    for table in tables:
        with errors:
            _check_python_file(table)
            pipeline = msgspec.convert(values_of(table), PipelineSettings)
            key, source = table["python"].key.rpartition(".")[0], table.get("name", table["python"]).source
            check(f"{key}.name", pipeline.name, Name, source)
            if pipeline.name in pipelines or pipeline.name in models:
                whose = "a model's" if pipeline.name in models else "another pipeline's"
                raise SettingsError(f"{key}.name: {pipeline.name!r} is already {whose} name ({source})")
            pipelines[pipeline.name] = pipeline
    return tuple(pipelines.values())


def _check_python_file(table: Table) -> None:
    python = table["python"]
    folder = table["python_path"].value if "python_path" in table else "."
    file = Path(folder, python.value.rpartition(":")[0])
    if file.suffix == ".py" and not file.is_file():
        raise python.refused(f"expected FILE.py:NAME, got {python.value!r}: no file {str(file)!r}")


def _check_engine(table: Table) -> None:
    """Refuse an engine that is neither built in nor in an installed package."""
    engine = table.get("engine")
    if engine is not None and engine.value not in ENGINES:
        known = [*ENGINES, *plugin_names()]
        if engine.value not in known:
            raise engine.unexpected(f"one of {', '.join(known)}", text=True)


def _check_file(table: Table) -> None:
    """Refuse a model without a file, and one with two."""
    path, python = table.get("path"), table.get("python")
    if python is not None:
        if path is not None:
            raise python.refused("not together with path")
        if (
            "run_in" in table
            and table["run_in"].value == "thread"
            and "reload" in table
            and table["reload"].value
        ):
            raise table["reload"].refused('not together with run_in = "thread"')
        if "engine" in table and table["engine"].value != "auto":
            raise table["engine"].refused("not together with python")
        _check_python_file(table)
    elif path is not None:
        if not Path(path.value).is_file():
            why = "a folder" if Path(path.value).is_dir() else "no file there"
            raise path.refused(f"expected a model file, got {path.value!r}: {why}")
        if Path(path.value).suffix == ".toml":
            raise path.refused(f"expected a model file, got {path.value!r}; did you mean --config?")


def _check_devices(model: ModelSettings, table: Table) -> None:
    """Refuse GPUs for a model that ONNX Runtime runs on the CPU."""
    if _is_onnxruntime(model) and model.devices != (0,):
        if model.providers:
            raise table["devices"].refused("not together with providers; set device_id in provider_options")
        why = f"ONNX Runtime runs {model.name!r} on the CPU; set engine = 'tensorrt' to use GPUs"
        raise table["devices"].refused(f"{why}, or instances for more engines")


def _is_onnxruntime(model: ModelSettings) -> bool:
    return model.engine == "onnxruntime" or (model.engine == "auto" and model.path.endswith(".onnx"))


def _check_providers(model: ModelSettings, table: Table) -> None:
    """Refuse execution providers of another engine than ONNX Runtime, and options of none of them."""
    if model.providers and not _is_onnxruntime(model):
        raise table["providers"].refused("only ONNX Runtime has execution providers")
    for name in model.provider_options:
        if name not in (model.providers or ()):
            raise table["provider_options"].refused(f"{name!r} is not among the providers")


def _check_batching(table: Table) -> None:
    """Refuse settings of a model that need batching where it is off."""
    batching, size, pad = (table.get(name) for name in ("batching", "max_batch_size", "pad"))
    off = batching if batching is not None and batching.value == "off" else None
    if size is not None and size.value == 0:
        if batching is not None and batching.value == "on":
            raise size.refused('0 turns batching off, but batching is "on"')
        off = size
    if off is not None and pad is not None:
        raise off.refused("not together with pad, which is for rows that share a batch")


def _check_pads(tables: list[Table]) -> None:
    """Check the tables of one model. `server.inference.padding` compares them with the model itself."""
    for table in tables:
        for name in ("mask", "buckets", "max"):
            if "same_length_as" in table and name in table:
                raise table[name].refused("belongs in the table of the input that has the length")
        if "buckets" in table and "max" in table:
            raise table["max"].refused("not together with buckets, whose last one is the longest")
        sizes = list(table["buckets"].value) if "buckets" in table else [1]
        if not sizes or sizes != sorted(set(sizes)):
            raise table["buckets"].refused("expected one or more lengths, each larger than the one before")
    leaders = [table["input"].value for table in tables if "same_length_as" not in table]
    masks: list[str] = []
    padded: set[tuple[str, int]] = set()
    for table in tables:
        name, axis = table["input"].value, table["axis"].value if "axis" in table else 0
        if (name, axis) in padded:
            _, key, source = table["input"]
            where = key.removesuffix(".input")
            raise SettingsError(f"{where}: axis {axis} of {name!r} is there twice ({source})")
        padded.add((name, axis))
        shared = table.get("same_length_as")
        if shared is not None and leaders.count(shared.value) != 1:
            count = "two" if shared.value in leaders else "no"
            raise shared.refused(f"{count} tables with a length of their own are for {shared.value!r}")
    for mask in [table["mask"] for table in tables if "mask" in table]:
        if mask.value in masks or any(mask.value == name for name, _ in padded):
            raise mask.refused(f"{mask.value!r} is in another table already, or another length's mask")
        masks.append(mask.value)


def _rule_conflicts(auth: AuthSettings, names: list[str], source: str) -> Iterator[str]:
    """Refuse rules for models that are not served: a misspelt name would leave a model without its rule."""
    for index, rule in enumerate(auth.models):
        if rule.model not in names:
            near = suggestion(rule.model, names) or f"; served are {', '.join(names)}"
            yield f"auth.models[{index}].model: there is no model {rule.model!r}{near} ({source})"
