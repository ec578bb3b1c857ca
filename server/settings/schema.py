"""The settings of one server process, each declared once.

A setting is a field of a struct: its type, range, default and meaning stand here (and in auth.py) and
nowhere else. The flags of `cobatch serve` with their help, the environment variables, the
refusals, docs/configuration.md and the JSON schema are derived from it, so a new setting is one line.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from cobatch.server.settings.auth import AuthSettings
from cobatch.server.settings.cgroups import cores
from cobatch.server.settings.describe import File, Folder, Text, about, pattern, placeholder

ENV_PREFIX = "COBATCH_"
LARGEST = 2**31 - 1
_MOST_AUTOMATIC = 16

_NAME = "1 to 128 letters, digits, '.', '_', '-', the first a letter or digit"
Name = Annotated[str, Meta(max_length=128), pattern("[A-Za-z0-9][A-Za-z0-9._-]*", _NAME)]
ENGINES = ("auto", "onnxruntime", "tensorrt")
EngineName = Annotated[
    Name,
    Meta(extra={"expected": f"one of {', '.join(ENGINES)}, or an installed engine's name"}),
    placeholder("|".join((*ENGINES, "NAME"))),
]
BatchingMode = Literal["auto", "on", "off"]
RunIn = Literal["process", "thread"]
TensorRTKind = Literal["tensorrt", "tensorrt-lean", "tensorrt-rtx"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
AccessLog = Literal["off", "text", "json"]
AccessLogLevel = Literal["info", "warning", "error"]
PYTHON_SOURCE = r"[^:]+:[A-Za-z_]\w*"
_PYTHON = "FILE.py:NAME or MODULE:NAME"
PythonSource = Annotated[str, pattern(PYTHON_SOURCE, _PYTHON), placeholder("FILE.py:NAME")]
Seconds = Annotated[float, Meta(ge=0, le=86_400), placeholder("SECONDS")]
Timeout = Annotated[float, Meta(gt=0, le=86_400), placeholder("SECONDS")]
Milliseconds = Annotated[float, Meta(ge=0, le=60_000), placeholder("MS")]
TimeoutMs = Annotated[float, Meta(gt=0, le=86_400_000), placeholder("MS")]
Ratio = Annotated[float, Meta(ge=0, le=1), placeholder("0..1")]
Bytes = Annotated[int, Meta(ge=0, le=LARGEST), placeholder("BYTES")]
PositiveBytes = Annotated[int, Meta(ge=1, le=LARGEST), placeholder("BYTES")]
LargeBytes = Annotated[int, Meta(ge=1, le=2**48), placeholder("BYTES")]
PageBytes = Annotated[int, Meta(ge=4096, le=LARGEST), placeholder("BYTES")]
BatchRows = Annotated[int, Meta(ge=0, le=65_536), placeholder("ROWS")]
Rows = Annotated[int, Meta(ge=1, le=LARGEST), placeholder("ROWS")]
Count = Annotated[int, Meta(ge=1, le=LARGEST), placeholder("N")]
Items = Annotated[int, Meta(ge=1, le=65_536), placeholder("N")]
Threads = Annotated[int, Meta(ge=1, le=1024), placeholder("N")]
Instances = Annotated[int, Meta(ge=1, le=64), placeholder("N")]
Processes = Annotated[
    Annotated[int, Meta(ge=1, le=64)] | Literal["auto"],
    Meta(extra={"expected": "an integer from 1 to 64, or auto", "placeholder": "N|auto"}),
]
Calls = Annotated[int, Meta(ge=1, le=256), placeholder("N")]
Slots = Annotated[int, Meta(ge=2, le=8), placeholder("N")]
# Lists that may be written as text with commas, as flags and variables have them.
_COMMAS = Meta(min_length=1, extra={"separator": ","})
Devices = Annotated[tuple[Annotated[int, Meta(ge=0, le=9999)], ...], _COMMAS]
Sizes = Annotated[tuple[Annotated[int, Meta(ge=1, le=999_999)], ...], _COMMAS]

Providers = Annotated[tuple[Text, ...], _COMMAS]
ProviderOptions = Annotated[
    dict[str, dict[str, bool | int | float | str]], Meta(extra={"expected": "a table for each provider"})
]
Options = Annotated[dict[str, Any], Meta(extra={"expected": "a table"})]
# Tables, which only a file can have.
FILE_ONLY = ("provider_options", "engine_options", "pad")

Axis = Annotated[int, Meta(ge=0, le=31)]
Length = Annotated[int, Meta(ge=1, le=LARGEST)]
PadValue = bool | int | float | str


class PadSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[models.pad]]`: an axis of an input. Axes are those of a row: 0 is the first after the batch axis."""

    input: Annotated[Text, about("the input's name")]
    axis: Annotated[Axis, about("axis of its rows that may be padded")] = 0
    value: Annotated[PadValue | None, about("value to pad with", default="0, false or ''")] = None
    same_length_as: Annotated[
        Text | None, about("input of another table, whose length and buckets this one shares")
    ] = None
    mask: Annotated[Text | None, about("input that the server fills: 1 for elements, 0 for padding")] = None
    buckets: Annotated[
        tuple[Length, ...], about("lengths to pad to, in ascending order", default="powers of two")
    ] = ()
    max: Annotated[Length | None, about("longest length, if buckets are powers of two")] = None
    outputs: Annotated[
        dict[str, Axis | tuple[Axis, ...]],
        about("outputs that are as long as the input, each with the axes of its rows"),
    ] = {}


class ModelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[models]]`: one model. `name` and `max_queue_rows` are always set (see __post_init__)."""

    ONE_OF: ClassVar = ("path", "python")

    path: Annotated[File, about("the model's file, ONNX or a TensorRT plan; or else python")] = ""
    python: Annotated[
        PythonSource | None, about("a model in Python in place of `path`: FILE.py:NAME or MODULE:NAME")
    ] = None
    python_path: Annotated[
        Folder,
        about(
            "Python: folder that FILE.py and MODULE are in; modules are found on PYTHONPATH, too",
            default="the configuration file's, or the working directory",
        ),
    ] = "."
    reload: Annotated[
        bool, about("Python: load the model again when files in python_path change; needs cobatch[reload]")
    ] = False
    run_in: Annotated[RunIn, about("Python: a process for each engine, or a thread of the server")] = (
        "process"
    )
    name: Annotated[
        Name, about("name in URLs", "NAME", default="the file's without its suffix, or the NAME in it")
    ] = ""
    model_version: Annotated[Name, about("version in URLs", "VERSION")] = "1"
    engine: Annotated[
        EngineName, about("engine to run it; auto goes by the file's suffix; other packages may add engines")
    ] = "auto"
    max_batch_size: Annotated[BatchRows, about("largest batch, in rows; 0 turns batching off")] = 64
    batching: Annotated[
        BatchingMode, about("run requests together; auto tests at load that rows are independent")
    ] = "auto"
    max_delay_ms: Annotated[Milliseconds, about("longest wait of a row for others to join its batch")] = 0.0
    latency_target_ms: Annotated[
        TimeoutMs | None, about("limit batches to sizes with which a request takes about this long")
    ] = None
    deadline_ms: Annotated[TimeoutMs | None, about("time limit of requests that set none")] = None
    execution_timeout_ms: Annotated[
        TimeoutMs | None, about("longest run of a batch before its engine counts as hung")
    ] = None
    max_queue_rows: Annotated[
        Rows, about("most rows in the queue; more are refused", default="16 batches, at least 1024")
    ] = 0
    threads: Annotated[Threads | None, about("threads of the engine", default="CPU cores - 1")] = None
    instances: Annotated[Instances, about("engines that share the queue, on each device")] = 1
    providers: Annotated[
        Providers | None,
        about(
            "ONNX Runtime: execution providers, the preferred one first",
            "CUDAExecutionProvider,...",
            default="CPUExecutionProvider",
        ),
    ] = None
    devices: Annotated[Devices, about("TensorRT, Python: numbers of the GPUs, in CUDA's order", "0,1")] = (0,)
    slots: Annotated[Slots, about("TensorRT: batches in flight on each engine")] = 2
    batch_buckets: Annotated[
        Sizes | None, about("TensorRT: sizes to round batches up to", "1,4,16", default="powers of two")
    ] = None
    cuda_graphs: Annotated[bool, about("TensorRT: use CUDA graphs if cuda-bindings is installed")] = True
    plan_cache: Annotated[
        Folder | None, about("TensorRT: folder of built plans", default="~/.cache/cobatch/plans")
    ] = None
    plan_host_code: Annotated[bool, about("TensorRT: allow the CPU code of version-compatible plans")] = False
    tensorrt_runtime: Annotated[TensorRTKind, about("TensorRT: library that runs the plan")] = "tensorrt"
    provider_options: Annotated[
        ProviderOptions,
        about("ONNX Runtime: options of a provider, as `[models.provider_options.CUDAExecutionProvider]`"),
    ] = {}
    engine_options: Annotated[
        Options, about("options of an engine of another package, as `[models.engine_options]`")
    ] = {}
    pad: Annotated[tuple[PadSettings, ...], about("axes that may be padded, as `[[models.pad]]`")] = ()

    @property
    def source(self) -> str:
        """Its file, or FILE.py:NAME or MODULE:NAME."""
        return self.python or self.path

    def __post_init__(self) -> None:
        """Fill in what follows from other fields, so that no reader meets an unset one."""
        if not self.name:
            name = self.python.rpartition(":")[2] if self.python else Path(self.path).stem
            msgspec.structs.force_setattr(self, "name", name)
        if not self.max_batch_size:
            msgspec.structs.force_setattr(self, "batching", "off")
        if not self.max_queue_rows:
            msgspec.structs.force_setattr(self, "max_queue_rows", max(1024, 16 * self.max_batch_size))


class PipelineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[pipelines]]`: Python code with a method `handle`, in a pool of processes. `name` is always set."""

    python: Annotated[PythonSource, about("its class or function: FILE.py:NAME or MODULE:NAME")]
    python_path: Annotated[
        Folder,
        about(
            "folder that FILE.py and MODULE are in; modules are found on PYTHONPATH, too",
            default="the configuration file's, or the working directory",
        ),
    ] = "."
    name: Annotated[Name, about("name in URLs", "NAME", default="the NAME in python")] = ""
    processes: Annotated[Instances | None, about("processes of its pool", default="CPU cores")] = None
    concurrency: Annotated[
        Calls,
        about("calls at once in each process, if `handle` is a coroutine or an async generator; else 1"),
    ] = 16
    max_queue: Annotated[Rows, about("most calls that wait for a process; more are refused")] = 1024
    deadline_ms: Annotated[
        TimeoutMs | None, about("time limit of calls that set none, from start to end")
    ] = None
    execution_timeout_ms: Annotated[
        TimeoutMs | None, about("longest run of a call, after which it is cancelled, or its process ended")
    ] = None
    reload: Annotated[
        bool, about("start it again when files in python_path change; needs cobatch[reload]")
    ] = False

    def __post_init__(self) -> None:
        """Fill in the name."""
        if not self.name:
            msgspec.structs.force_setattr(self, "name", self.python.rpartition(":")[2])


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[server]`: the HTTP side, shared by all models."""

    host: Annotated[Text, about("address to listen on", "ADDRESS")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535), about("TCP port; 0 takes a free one", "PORT")] = 8000
    processes: Annotated[
        Processes,
        about("one for the engines, the others for HTTP; 1 does both; auto: CPU cores - 1, at most 16"),
    ] = 1
    drain_delay_s: Annotated[
        Seconds, about("time to serve on at shutdown, not ready, until load balancers have noticed")
    ] = 0.0
    drain_timeout_s: Annotated[Seconds, about("longest time to finish accepted requests at shutdown")] = 30.0
    max_body_bytes: Annotated[PositiveBytes, about("largest request body")] = 1 << 26
    max_json_bytes: Annotated[PositiveBytes, about("largest JSON in a request body")] = 1 << 24
    body_memory_bytes: Annotated[
        LargeBytes | None,
        about(
            "memory for all request bodies of more than 64 KiB, until they are answered",
            default="an eighth of the memory that the process may use, at most 2 GiB",
        ),
    ] = None
    keep_alive_s: Annotated[Seconds, about("time after which an idle connection is closed")] = 5.0
    receive_timeout_s: Annotated[Timeout, about("longest time for a request to arrive in full")] = 30.0
    compress_min_bytes: Annotated[Bytes, about("smallest response that is compressed")] = 1 << 16
    max_batch_items: Annotated[Items, about("most items in one POST /batch")] = 256
    kept_predictions: Annotated[Count, about("most predictions kept in memory")] = 1000
    kept_bytes: Annotated[PageBytes, about("memory for kept predictions")] = 1 << 28
    kept_s: Annotated[Timeout, about("time that a finished prediction is kept")] = 600.0
    max_wait_s: Annotated[Seconds, about("longest wait for a prediction that a client may ask for")] = 60.0
    tls_cert: Annotated[File | None, about("certificate chain in PEM; turns TLS on")] = None
    tls_key: Annotated[
        File | None, about("private key of the certificate, in PEM", default="in the certificate's file")
    ] = None
    trusted_proxies: Annotated[
        Text | None,
        about("addresses or networks, with commas, whose X-Forwarded-* headers are trusted", "ADDRESSES"),
    ] = None
    log_level: Annotated[LogLevel, about("least severe messages to log")] = "info"
    log_format: Annotated[
        LogFormat, about("form of all lines on stderr; JSON also if the access log is in JSON")
    ] = "text"
    access_log: Annotated[AccessLog, about("write a line to stderr for each request, in this form")] = "off"
    access_log_level: Annotated[
        AccessLogLevel,
        about("requests to log; info: all, warning: refused and failed ones, error: failed ones"),
    ] = "info"
    tracing: Annotated[bool, about("send OpenTelemetry traces; needs cobatch[otel]")] = False
    trace_sample: Annotated[Ratio, about("sampling ratio for requests without a traceparent")] = 1.0
    trace_endpoint: Annotated[
        Text | None,
        about("OTLP collector, as http://HOST:4318", "URL", default="$OTEL_EXPORTER_OTLP_ENDPOINT"),
    ] = None
    metrics_open: Annotated[bool, about("with [auth]: serve /metrics without a credential")] = False
    fast_path: Annotated[bool, about("serve inference below ASGI, which is faster")] = True
    allow_anonymous: Annotated[bool, about("without [auth]: allow a host that others can reach")] = False

    @property
    def process_count(self) -> int:
        """The number of processes, without the supervisor of several."""
        if self.processes != "auto":
            return self.processes
        return max(1, min(_MOST_AUTOMATIC, int(cores()) - 1))

    @property
    def logs_json(self) -> bool:
        """True if every line on stderr is JSON."""
        return "json" in (self.access_log, self.log_format)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings of a process. There is a model or a pipeline, and their names are unique."""

    server: ServerSettings = ServerSettings()
    models: tuple[ModelSettings, ...] = ()
    pipelines: tuple[PipelineSettings, ...] = ()
    auth: AuthSettings | None = None

    @property
    def names(self) -> list[str]:
        """The names in URLs."""
        return [model.name for model in self.models] + [pipeline.name for pipeline in self.pipelines]


SERVER_FIELDS = {field.name: field.type for field in msgspec.structs.fields(ServerSettings)}
MODEL_FIELDS = {
    field.name: field.type for field in msgspec.structs.fields(ModelSettings) if field.name not in FILE_ONLY
}

# Those of a pipeline that a flag or variable for models may set, too.
PIPELINE_FIELDS = tuple(
    field.name for field in msgspec.structs.fields(PipelineSettings) if field.name in MODEL_FIELDS
)


def env_name(setting: str) -> str:
    """Return a setting's environment variable: `max_batch_size` -> `COBATCH_MAX_BATCH_SIZE`."""
    return ENV_PREFIX + setting.upper()


def flag_name(setting: str) -> str:
    """Return a setting's flag: `max_batch_size` -> `--max-batch-size`; the MODEL argument for `model`."""
    return "MODEL" if setting == "model" else "--" + setting.replace("_", "-")
