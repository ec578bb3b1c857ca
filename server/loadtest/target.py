"""What a server says of itself and of its model, before and after the load."""

from __future__ import annotations

import http.client
import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from cobatch.server.loadtest.errors import BenchError, UsageError
from cobatch.server.loadtest.messages import Address

_IN_PATH = re.compile(r"^(.*?)(?:/v2(?:/models/([^/]+)(?:/versions/([^/]+))?(?:/infer)?)?)?/?$")
_SAID_MOST = 300
_STATISTICS_S = 3.0


class Reply(NamedTuple):
    """An answer to a single request."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def said(self) -> str:
        """The server's words for a person."""
        return words(self.body) or f"status {self.status}"


@dataclass(frozen=True)
class Tensor:
    """An input as metadata describes it; `shape` has the batch axis, and -1 where a size may vary."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Described:
    """A model. `path`: where it is inferred; `server`: its name and version, as far as it says."""

    name: str
    path: str
    server: str
    platform: str
    inputs: tuple[Tensor, ...]


def parse_url(text: str, ca_file: str | None, insecure: bool) -> tuple[Address, str | None, str | None]:
    """The address, and the model and version where the path has them. Raises UsageError."""
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError(f"expected http://HOST[:PORT] or https://..., got {text!r}")
    if parts.username or parts.password or parts.query:
        # They would not be sent, and would stand in the report.
        raise UsageError("the URL has a user, a password or a query: use --token-file, --api-key or --header")
    found = _IN_PATH.match(parts.path)
    assert found is not None
    base, model, version = found.groups()
    tls = parts.scheme == "https"
    address = Address(parts.hostname, port or (443 if tls else 80), tls, base or "", ca_file, insecure)
    return address, model, version


def ask(
    address: Address,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes | None = None,
    timeout_s: float = 30.0,
) -> Reply:
    """One request on a connection of its own; `path` is below the base. Raises BenchError."""
    try:
        context = address.context()
        connection: http.client.HTTPConnection
        if context is not None:
            connection = http.client.HTTPSConnection(
                address.host, address.port, timeout=timeout_s, context=context
            )
        else:
            connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
        try:
            connection.request(method, address.base + path, body, dict(headers))
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, names, answer.read())
        finally:
            connection.close()
    except (OSError, ssl.SSLError, http.client.HTTPException) as error:
        raise BenchError(f"{address.host}:{address.port}: {reason(error)}") from None


def describe(
    address: Address, model: str | None, version: str | None, headers: Mapping[str, str]
) -> Described:
    """Ask for the model's metadata; without a name, for the only model there is. Raises BenchError."""
    server = _object(ask(address, "GET", "/v2", headers))
    name = model or _only_model(address, headers)
    path = f"/v2/models/{quote(name, safe='')}"
    if version:
        path += f"/versions/{quote(version, safe='')}"
    reply = ask(address, "GET", path, headers)
    if reply.status != 200:
        raise BenchError(f"GET {path}: {reply.status}: {reply.said()}")
    metadata = _object(reply)
    try:
        inputs = tuple(_tensor(one) for one in metadata.get("inputs") or [])
    except (KeyError, TypeError, ValueError):
        raise BenchError(f"GET {path}: inputs are not as the protocol has them") from None
    known = [server[part] for part in ("name", "version") if isinstance(server.get(part), str)]
    return Described(name, path, " ".join(known), str(metadata.get("platform", "")), inputs)


def _tensor(found: Any) -> Tensor:
    return Tensor(str(found["name"]), str(found["datatype"]), tuple(int(size) for size in found["shape"]))


def _only_model(address: Address, headers: Mapping[str, str]) -> str:
    reply = ask(address, "POST", "/v2/repository/index", headers, b"{}")
    if reply.status in (401, 403):
        raise BenchError(f"POST /v2/repository/index: {reply.status}: {reply.said()}; or give --model")
    try:
        names = sorted({str(one["name"]) for one in json.loads(reply.body)})
    except (ValueError, KeyError, TypeError):
        raise UsageError("the server does not list its models: give --model") from None
    if len(names) != 1:
        has = ", ".join(names) or "none"
        raise UsageError(f"which model? The server has {has}: give --model")
    return names[0]


class Statistics(NamedTuple):
    """What a server counted; nanoseconds where it is time."""

    inferences: int
    executions: int
    succeeded: int
    queue_ns: int
    compute_ns: int

    def since(self, before: Statistics) -> Statistics:
        """What was counted between the two."""
        return Statistics(*(after - then for after, then in zip(self, before, strict=True)))


def statistics(address: Address, model: Described, headers: Mapping[str, str]) -> Statistics | None:
    """Triton's statistics of the model; None where the server has none to show."""
    try:
        # Whoever stops a load because the server stands still does not want to wait for it.
        reply = ask(address, "GET", f"{model.path}/stats", headers, timeout_s=_STATISTICS_S)
        one = _object(reply)["model_stats"][0]
        spent = one["inference_stats"]
        return Statistics(
            int(one["inference_count"]),
            int(one["execution_count"]),
            int(spent["success"]["count"]),
            int(spent["queue"]["ns"]),
            int(spent["compute_infer"]["ns"]),
        )
    except (BenchError, KeyError, IndexError, TypeError, ValueError):
        return None


def _object(reply: Reply) -> dict[str, Any]:
    try:
        found = json.loads(reply.body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def reason(error: Exception) -> str:
    """What an error says, or what it is where it says nothing."""
    return str(error) or type(error).__name__


def words(body: bytes) -> str:
    """What a refusal's body says to a person, in one line; V2 has it as `error`, problems as `detail`."""
    try:
        found = json.loads(body)
    except ValueError:
        found = body.decode("utf-8", "replace")
    if isinstance(found, dict):
        found = found.get("error") or found.get("detail") or found.get("message") or found
    return " ".join(str(found).split())[:_SAID_MOST]
