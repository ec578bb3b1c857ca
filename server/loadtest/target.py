"""The server under load: its address, its model's metadata, and its counters before and after."""

import http.client
import json
import re
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import msgspec
from msgspec.structs import replace

from cobatch.server.loadtest.codec import error_message
from cobatch.server.loadtest.messages import Address
from cobatch.server.loadtest.options import BenchError, UsageError

_PATH = re.compile(r"^(.*?)(?:/v2(?:/models/([^/]+)(?:/versions/([^/]+))?(?:/infer)?)?)?/?$")
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError)
ServerCounters = Mapping[str, int]

_STATISTICS_TIMEOUT_S = 3.0  # short: a load that was stopped because the server hangs must end soon


class Reply(NamedTuple):
    """An answer to a single request. `head`: its header lines, each after a CRLF."""

    status: int
    head: bytes
    body: bytes

    @property
    def error(self) -> str:
        """The status with the server's message, for an error text."""
        return f"{self.status}: {error_message(self.body) or 'no message'}"


class Tensor(msgspec.Struct, frozen=True):
    """An input of the model's metadata; `shape` includes the batch axis, -1 marks a variable size.

    `batched`: a first axis of -1 is the batch axis.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    batched: bool = True


class Model(msgspec.Struct):
    """A model's metadata. `path`: of its endpoints; `server`: its name, version and number of processes, if
    it tells them."""

    name: str
    path: str = ""
    server: str = ""
    platform: str | None = ""
    inputs: tuple[Tensor, ...] | None = ()


class _Config(msgspec.Struct):
    max_batch_size: int | None = None


class _Server(msgspec.Struct):
    name: str | None = None
    version: str | None = None
    processes: int | None = None


def parse_url(text: str, ca_file: Path | None, insecure: bool) -> tuple[Address, str | None, str | None]:
    """Return the address, and the model and version if the path has them. Raises UsageError."""
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError(f"expected http://HOST[:PORT] or https://..., got {text!r}")
    if parts.username or parts.password or parts.query:
        # They would not be sent, and would appear in the report.
        raise UsageError("the URL has a user, a password or a query: use --token-file, --api-key or --header")
    match = _PATH.match(parts.path)
    assert match is not None
    base, model, version = match.groups()
    tls = parts.scheme == "https"
    address = Address(parts.hostname, port or (443 if tls else 80), tls, base or "", ca_file, insecure)
    return address, model, version


def fetch(
    address: Address,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes | None = None,
    timeout_s: float = 30.0,
) -> Reply:
    """Send one request on its own connection; `path` is below the address's base. Raises BenchError."""
    try:
        context = address.context()
        connection = (
            http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
            if context is None
            else http.client.HTTPSConnection(address.host, address.port, timeout=timeout_s, context=context)
        )
        with closing(connection):
            connection.request(method, address.base + path, body, dict(headers))
            response = connection.getresponse()
            head = "".join(f"\r\n{name}: {value}" for name, value in response.getheaders())
            return Reply(response.status, head.encode(), response.read())
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"{address.host}:{address.port}: {reason(error)}") from None


def describe(address: Address, name: str | None, version: str | None, headers: Mapping[str, str]) -> Model:
    """Fetch a model's metadata; without a name, of the server's only model. Raises BenchError."""
    server = fetch(address, "GET", "/v2", headers)
    name = name or _only_model(address, headers)
    path = f"/v2/models/{quote(name, safe='')}"
    if version:
        path += f"/versions/{quote(version, safe='')}"
    reply = fetch(address, "GET", path, headers)
    if reply.status != 200:
        raise BenchError(f"GET {path}: {reply.error}")
    try:
        model = msgspec.json.decode(reply.body, type=Model, strict=False)
    except _NOT_JSON as error:
        raise BenchError(f"GET {path}: the metadata does not follow the protocol: {error}") from None
    model.name, model.path = name, path
    # Metadata does not tell a batch axis from another one of variable size; Triton's configuration does.
    with suppress(BenchError, *_NOT_JSON):
        config = msgspec.json.decode(fetch(address, "GET", f"{path}/config", headers).body, type=_Config)
        if config.max_batch_size == 0:
            model.inputs = tuple(replace(tensor, batched=False) for tensor in model.inputs or ())
    with suppress(*_NOT_JSON):
        labels = msgspec.json.decode(server.body, type=_Server)
        model.server = " ".join(label for label in (labels.name, labels.version) if label)
        if labels.processes is not None:
            model.server += f", {labels.processes} processes"
    return model


def _only_model(address: Address, headers: Mapping[str, str]) -> str:
    reply = fetch(address, "POST", "/v2/repository/index", headers, b"{}")
    if reply.status == 403:
        raise BenchError(f"these credentials may not list the models: give --model ({reply.error})")
    if reply.status == 401:
        raise BenchError(f"the server asks for credentials, with --token-file or --api-key ({reply.error})")
    try:
        names = sorted({one.name for one in msgspec.json.decode(reply.body, type=list[Model])})
    except _NOT_JSON:
        raise UsageError("the server does not list its models: give --model") from None
    if len(names) != 1:
        raise UsageError(f"which model? The server has {', '.join(names) or 'none'}: give --model")
    return names[0]


def read_counters(address: Address, model: Model, headers: Mapping[str, str]) -> ServerCounters | None:
    """Fetch Triton's statistics of the model; None if the server has none or does not show them."""
    try:
        reply = fetch(address, "GET", f"{model.path}/stats", headers, timeout_s=_STATISTICS_TIMEOUT_S)
        statistics = json.loads(reply.body)["model_stats"][0]
        durations = statistics["inference_stats"]
        return {
            "inferences": int(statistics["inference_count"]),
            "executions": int(statistics["execution_count"]),
            "succeeded": int(durations["success"]["count"]),
            "queue_ns": int(durations["queue"]["ns"]),
            "compute_ns": int(durations["compute_infer"]["ns"]),
        }
    except (BenchError, KeyError, IndexError, TypeError, ValueError):
        return None


def reason(error: Exception) -> str:
    """Return an exception's text, or its type if it has none."""
    return str(error) or type(error).__name__
