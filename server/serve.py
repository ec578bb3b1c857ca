"""Running the application under uvicorn: start, signals, draining, the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn

from cobatch.engines.errors import EngineError
from cobatch.server.app import build
from cobatch.server.edge import uvicorn_parts
from cobatch.server.edge.connection import Connection
from cobatch.server.edge.fast_path import make_protocol
from cobatch.server.inference.service import Inference
from cobatch.server.memory import keep_freed_memory
from cobatch.server.observability.access_log import JsonFormatter
from cobatch.server.settings.schema import Settings
from cobatch.server.settings.values import SettingsError

log = logging.getLogger("cobatch.server")

_FAILED = 1
_REFUSED = 2
_BACKLOG = 2048


def run(settings: Settings) -> int:
    """Serve until a signal comes. The exit status: 0 after a clean end, 1 if there is nothing to serve.

    1: the address cannot be listened on, or a model cannot be loaded. 2: a file that a setting names cannot
    be used. A line on stderr says why.
    """
    logging.basicConfig(
        level=settings.server.log_level.upper(),
        format="%(asctime)s %(levelname)-8s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    http = settings.server
    if http.access_log == "json":
        for handler in logging.root.handlers:
            handler.setFormatter(JsonFormatter())
    keep_freed_memory()
    try:
        server = Server(settings)
    except SettingsError as error:
        # Found only when the files of keys and secrets are read.
        print(f"cobatch: {error}", file=sys.stderr, flush=True)
        return _REFUSED
    try:
        sockets = _listen(http.host, http.port)
    except OSError as error:
        # A name's error numbers are not the system's; for the others Python lengthens the text.
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        print(f"cobatch: cannot listen on {http.host}, port {http.port}: {why}", file=sys.stderr, flush=True)
        return _FAILED
    server.run(sockets)
    if any(model.worker_alive for model in server.core.models.values()):
        # Inside a library, which would abort if the interpreter were taken down around it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(server.status)
    return server.status


def _listen(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`. Ours, since uvicorn ends the process where it cannot bind."""
    sockets: list[socket.socket] = []
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            sockets.append(socket.create_server(address, family=family, backlog=_BACKLOG))
    except OSError:
        for opened in sockets:
            opened.close()
        raise
    return sockets


class Server(uvicorn.Server):
    """Uvicorn's server that answers what it accepted before it ends."""

    def __init__(self, settings: Settings) -> None:
        self.core = core = Inference(settings)
        self.status = 0
        self._drain: asyncio.Task[None] | None = None
        core.on_ready = self._on_ready
        core.on_load_failed = self._on_load_failed
        http = settings.server
        super().__init__(
            uvicorn.Config(
                # The object, not a string: a string is imported again, with the working directory first.
                build(core),
                host=http.host,
                port=http.port,
                http=_protocol(core),
                timeout_keep_alive=http.keep_alive_s,  # type: ignore[arg-type]  # it may be a fraction
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=http.trusted_proxies is not None,
                forwarded_allow_ips=http.trusted_proxies or "",
                ssl_certfile=http.tls_cert,
                ssl_keyfile=http.tls_key,
                ws="none",
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in [listener for server in self.servers for listener in server.sockets]:
            host, port = listener.getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            print(
                f"cobatch: listening on {scheme}://{f'[{host}]' if ':' in host else host}:{port}", flush=True
            )

    def _on_ready(self) -> None:
        # What is there now stays: the collector need not look at it again with each request.
        gc.collect()
        gc.freeze()
        # Requests leave no cycles behind (a test holds that), so there is little to look for.
        gc.set_threshold(20_000, 20, 20)
        print(f"cobatch: ready: {', '.join(self.core.models)}", flush=True)

    def _on_load_failed(self, name: str, error: EngineError) -> None:
        why = " ".join(str(error).split())
        print(f"cobatch: model {name} cannot be loaded: {why}", file=sys.stderr, flush=True)
        self.status = _FAILED
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own raises the signal again at the end, and the exit status would not be 0."""
        handlers = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in handlers.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: not ready from this moment, then drain. Second: the end, now."""
        if self.core.draining:
            os._exit(128 + sig)
        self.core.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.core.draining and self._drain is None:
            log.info("draining: no new requests, %g s at most", self.core.settings.server.drain_timeout_s)
            self._drain = asyncio.create_task(self._drain_all())
            for end in self.core.on_draining:
                end()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            # It has not taken its answer in all this time. The loop cannot be closed around it.
            connection.transport.abort()
        await asyncio.sleep(0)

    async def _drain_all(self) -> None:
        timeout_s = self.core.settings.server.drain_timeout_s
        end_s = time.monotonic() + timeout_s
        batchers = [model.batcher for model in self.core.models.values() if model.batcher is not None]
        await asyncio.gather(*[batcher.drain(timeout_s) for batcher in batchers])
        # What is left is writing answers out; it has the rest of the time.
        self.config.timeout_graceful_shutdown = max(1, int(end_s - time.monotonic()))
        self.should_exit = True


def _protocol(core: Inference) -> type[asyncio.Protocol] | str:
    """What uvicorn is to speak HTTP with."""
    missing = uvicorn_parts.missing()
    if missing is not None:
        log.warning("no fast path: uvicorn %s is not as expected (%s)", uvicorn.__version__, missing)
        return "auto"
    if not core.settings.server.fast_path:
        return type("CobatchConnection", (Connection,), {"core": core})
    return make_protocol(core)
