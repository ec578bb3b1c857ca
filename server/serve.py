"""The server process: uvicorn with our protocol, signals, draining, and the C library's memory.

By default glibc returns large buffers to the system as soon as they are free, and those of the next request
are new pages, which the kernel clears and maps one by one. For a row of 150,528 floats in JSON that was 1.1
of 4.1 ms (`python -m benchmarks.scaling --only row`).
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from cobatch.engines.errors import EngineError
from cobatch.server.app import build
from cobatch.server.edge.fast_path import make_protocol
from cobatch.server.inference.service import Inference
from cobatch.server.listeners import GRACE_S, CannotListenError, listen, take_backlog, tell_addresses
from cobatch.server.observability.logs import ProcessLog
from cobatch.server.observability.output import LogStream
from cobatch.server.settings.schema import Settings
from cobatch.server.settings.tls import replace_certificate
from cobatch.server.settings.values import SettingsError

log = logging.getLogger("cobatch.server")

_FAILED = 1
_REFUSED = 2
_TICK_S = 0.1
# malloc.h. Buffers up to _HEAP_BYTES, the largest that glibc accepts here, come from the heap; up to
# _KEPT_BYTES that are free stay at its end.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_HEAP_BYTES = 32 << 20
_KEPT_BYTES = 128 << 20
_MALLOC_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def run(settings: Settings) -> int:
    """Serve until a signal arrives; return the exit status.

    0: a clean end. 1: the address or a model cannot be used. 2: a file that a setting names cannot be used.
    A line on stderr says why.
    """
    http = settings.server
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server can act on it
    return run_server(settings, partial(Server, settings), partial(listen, http.host, http.port))


def run_server(
    settings: Settings, make: Callable[[LogStream], "Server"], sockets: Callable[[], list[socket.socket]]
) -> int:
    """Make a server and run it with these sockets, in a process of its own; return the exit status."""
    process_log = ProcessLog(settings.server.log_level.upper(), as_json=settings.server.logs_json)
    try:
        keep_freed_memory()
        server = make(process_log.stream)
        server.run(sockets())
    except SettingsError as error:  # from files of keys
        return _refuse(str(error), _REFUSED)
    except CannotListenError as error:
        return _refuse(str(error), _FAILED)
    except Exception:
        log.exception("the server failed")
        return _FAILED
    finally:
        process_log.close()
    if any(model.worker_alive for model in server.inference.models.values()):
        # The worker is inside a library, which would abort while the interpreter is finalized.
        os._exit(server.status)
    return server.status


def keep_freed_memory() -> None:
    """Let the C library keep up to 128 MiB of freed memory, unless the environment sets its options.

    Does nothing for other C libraries than glibc.
    """
    if any(name in os.environ for name in _MALLOC_VARIABLES):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _refuse(message: str, status: int) -> int:
    print(f"cobatch: {message}", file=sys.stderr, flush=True)
    return status


class Server(uvicorn.Server):
    """A uvicorn server that answers every accepted request before it ends.

    A signal makes it unready, and it serves on for `drain_delay_s`; in the second half of that, each response
    is the last of its connection. Then it refuses requests, answers those in the queue and ends.
    """

    grace_s = GRACE_S

    def __init__(self, settings: Settings, log_stream: LogStream | None = None) -> None:
        self.inference = inference = self.make_inference(settings, log_stream)
        self.status = 0
        self._hung_up = False
        self.leave_s: float | None = None  # the time of the first signal
        self._drain: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        inference.on_ready = self._on_ready
        inference.on_load_failed = self._on_load_failed
        http = settings.server
        super().__init__(
            uvicorn.Config(
                # The object, not a string: a string is imported again, with the working directory first.
                self.make_app(inference),
                host=http.host,
                port=http.port,
                http=self.make_http(inference),
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

    def make_inference(self, settings: Settings, log_stream: LogStream | None) -> Inference:
        """Return the models that this process serves."""
        return Inference(settings, log_stream)

    def make_app(self, inference: Inference) -> ASGIApp:
        """Return the application for requests that are not on the fast path."""
        return build(inference)

    def make_http(self, inference: Inference) -> Any:
        """Return the factory of connections, for uvicorn."""
        return make_protocol(inference)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        listeners = [listener for server in self.servers for listener in server.sockets]
        tell_addresses(listeners, "https" if self.config.is_ssl else "http")

    def _on_ready(self) -> None:
        # Objects that exist now are permanent: the collector need not visit them again.
        gc.collect()
        gc.freeze()
        # Requests leave no cycles behind (tests/server/edge/test_garbage.py), so collect rarely.
        gc.set_threshold(20_000, 20, 20)
        self.tell_ready()

    def tell_ready(self) -> None:
        """Tell that all models and pipelines accept requests."""
        names = dict.fromkeys([*self.inference.models, *self.inference.pipelines])
        print(f"cobatch: ready: {', '.join(names)}", flush=True)

    def _on_load_failed(self, name: str, error: EngineError) -> None:
        why = " ".join(str(error).split())
        kind = "model" if name in self.inference.models else "pipeline"
        print(f"cobatch: {kind} {name} cannot be loaded: {why}", file=sys.stderr, flush=True)
        self.status = _FAILED
        self.should_exit = True
        self._wake()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replace uvicorn's, which raises the signal again at the end: the status would not be 0."""
        handlers = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self.handle_hangup)
        try:
            yield
        finally:
            for sig, handler in handlers.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Leave on the first signal, refuse requests from now on at the next, and then exit at once."""
        inference = self.inference
        if inference.draining:
            os._exit(128 + sig)
        self.leave(at_once=inference.leaving)

    def leave(self, *, at_once: bool) -> None:
        """Be unready from now on; refuse requests after the delay, or at once."""
        inference = self.inference
        inference.draining = inference.closing = at_once or not inference.settings.server.drain_delay_s
        inference.leaving = True
        self._wake()

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        """Read files again at the next tick."""
        self._hung_up = True
        self._wake()

    def _wake(self) -> None:
        """Let the next tick come at once. May be called by a signal's handler, or another thread."""
        if self.inference.loop is not None:  # else the first tick comes
            self.inference.loop.call_soon_threadsafe(self._woken.set)

    async def main_loop(self) -> None:
        """Call `on_tick` ten times a second, and at once after `_wake`, until it returns True."""
        counter = 0
        while not await self.on_tick(counter):
            counter += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._woken.wait()
            self._woken.clear()

    async def on_tick(self, counter: int) -> bool:
        if self._hung_up:
            self._hung_up = False
            await self.reload()
        if self.inference.leaving:
            self._leave(time.monotonic())
        return await super().on_tick(counter)

    async def reload(self) -> None:
        """Read all files of credentials again; keep the old ones where the new are invalid."""
        auth = self.inference.auth
        reloads = auth.reloads() if auth is not None else {}
        if self.config.ssl is not None:
            reloads["certificate"] = self._reload_certificate
        for what, reload in reloads.items():
            try:
                await reload()
            except SettingsError as error:
                log.error("SIGHUP: kept the old %s: %s", what, "; ".join(error.messages))  # noqa: TRY400
            else:
                log.info("SIGHUP: read the %s again", what)
        if not reloads:
            log.info("SIGHUP: no file of keys and no certificate to read again")

    async def _reload_certificate(self) -> None:
        http, context = self.inference.settings.server, self.config.ssl
        assert context is not None
        assert http.tls_cert is not None
        replace_certificate(context, http.tls_cert, http.tls_key)

    def _leave(self, now_s: float) -> None:
        inference, delay_s = self.inference, self.inference.settings.server.drain_delay_s
        if self.leave_s is None:
            self.leave_s = now_s
            if not inference.draining:
                log.info("leaving: not ready, but serving for %g s", delay_s)
        if now_s >= self.leave_s + delay_s:
            inference.draining = True
        if now_s >= self.leave_s + delay_s / 2:
            # The next response on each connection is its last (RFC 9112, 9.6): its client goes elsewhere.
            inference.closing = True
        if inference.draining and self._drain is None:
            self._drain = asyncio.create_task(self._drain_all())
            for end in inference.on_draining:
                end()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        listeners = [listener.fileno() for server in self.servers for listener in server.sockets]
        await take_backlog(listeners, self.grace_s)
        if self.server_state.connections:
            await asyncio.sleep(self.grace_s)
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            # The client has not read its response in all this time; the loop cannot close around it.
            connection.transport.abort()
        await asyncio.sleep(0)

    async def before_drain(self, timeout_s: float) -> float:
        """Wait until the queues may be closed; return the time that is left."""
        return timeout_s

    async def drained(self) -> None:
        """Wait until connections may be ended, now that the queues are empty."""

    async def _drain_all(self) -> None:
        timeout_s = self.inference.settings.server.drain_timeout_s
        log.info("draining: no new requests, %g s at most", timeout_s)
        end_s = time.monotonic() + timeout_s
        try:
            left_s = await self.before_drain(timeout_s)
            # Pipelines first: their steps are requests to the models.
            for targets in (self.inference.pipelines, self.inference.served):
                batchers = [one.batcher for one in targets.values() if one.batcher is not None]
                await asyncio.gather(*[batcher.drain(left_s, timeout_s - left_s) for batcher in batchers])
                left_s = max(0.0, end_s - time.monotonic())
            await self.drained()
        except Exception:  # a defect must not keep the process from its end
            log.exception("draining failed")
        # Writing the responses has the rest of the time.
        self.config.timeout_graceful_shutdown = max(1, int(end_s - time.monotonic()))
        self.should_exit = True
        self._wake()
