"""The process that the user started, if there are several: it listens, starts the others and ends them.

    client ── supervisor ┬─ front 0 ─┬─ home
                         └─ front 1 ─┘

Home has the scheduler, the engines and all routes; fronts serve the clients' connections. The supervisor
accepts each connection and hands it to the front that has the fewest. It has no model and reads no request.

A child that ends is replaced, and one whose loop stands still is killed. Signals come to the supervisor
alone, which passes them on as messages.
"""

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from cobatch.server.fronts.control import (
    FROM_CHILD,
    HEARTBEAT_S,
    EndFront,
    FromChild,
    Last,
    Leave,
    Reached,
    Refused,
    Reload,
    Start,
    Taken,
)
from cobatch.server.listeners import CannotListenError, listen, take_backlog, tell_addresses
from cobatch.server.observability.logs import ProcessLog
from cobatch.server.settings.schema import Settings
from cobatch.server.supervisor.acceptor import Acceptor
from cobatch.server.supervisor.children import COMMAND, Child, check_memory, link

log = logging.getLogger("cobatch.server")

_FAILED = 1
_NO_MEMORY = (
    "cobatch: cannot share memory between processes: {}; memfd_create and /proc were expected. "
    "Let the container have them, or use --processes 1"
)
_SLAB_BYTES = 256 << 20
_SLAB_BODIES = 4
# Children end by themselves within the limits of draining. After this time more they are killed.
_GRACE_S = 5.0


def run(settings: Settings, command: Sequence[str] = COMMAND) -> int:
    """Serve until a signal arrives; return the exit status, as `server.serve.run` does."""
    http = settings.server
    try:
        check_memory()
    except OSError as error:
        print(_NO_MEMORY.format(error.strerror), file=sys.stderr, flush=True)
        return _FAILED
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the supervisor can pass it on
    process_log = ProcessLog(http.log_level.upper(), as_json=http.logs_json)
    try:
        listeners = listen(http.host, http.port)
        return asyncio.run(Supervisor(settings, listeners, process_log.outputs, command).run())
    except CannotListenError as error:
        print(f"cobatch: {error}", file=sys.stderr, flush=True)
        return _FAILED
    except Exception:
        log.exception("the supervisor failed")
        return _FAILED
    finally:
        process_log.close()


class Supervisor:
    """Starts the children, and ends them. `outputs`: the descriptors of stdout and stderr."""

    def __init__(
        self,
        settings: Settings,
        listeners: Sequence[socket.socket],
        outputs: Sequence[int],
        command: Sequence[str],
    ) -> None:
        self._settings = settings
        self._outputs = outputs
        self._command = command
        self._settings_fd = os.memfd_create("cobatch-settings")
        os.write(self._settings_fd, pickle.dumps(settings))
        self._home = Child("home", 0)
        self._fronts = [Child("front", index) for index in range(settings.server.process_count - 1)]
        self._children = [self._home, *self._fronts]
        self._acceptor = Acceptor(listeners, self._fronts)
        self._told_addresses = self._told_ready = False
        self._leave_s: float | None = None  # the time of the first signal
        self._drain_s: float | None = None  # from then on requests are refused
        self._closing: asyncio.Task[None] | None = None
        self._exit_status = 0
        self._ended_all = asyncio.Event()

    async def run(self) -> int:
        """Run until the last child has ended; return the exit status."""
        self._loop = loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._on_signal, sig)
        loop.add_signal_handler(signal.SIGHUP, self._tell_all, Reload())
        loop.add_signal_handler(signal.SIGCHLD, self._on_ends)
        for child in self._children:
            self._start(child)
        self._tick()
        await self._ended_all.wait()
        self._acceptor.close()
        return self._exit_status

    def _tell_all(self, message: Leave | Last | Reload) -> None:
        for child in self._children:
            child.send(message)

    # Children

    def _start(self, child: Child) -> None:
        """Start a child's process and link it with the others."""
        if self._drain_s is not None:
            return
        try:
            child.start(self._command, self._outputs)
            assert child.control is not None
            self._loop.add_reader(child.control.socket, self._receive, child)
            child.send(Start(child.role, child.index, len(self._fronts)), [self._settings_fd, child.page])
            if self._leave_s is not None:
                child.send(Leave(self._leave_s, at_once=False))
            self._link(child)
        except OSError as error:
            log.error("cannot start %s: %s", child.name, error.strerror)  # noqa: TRY400
            if child.control is not None:
                child.kill()  # without its links
            elif self._told_ready:
                self._start_again(child)
            else:
                self._give_up(_FAILED)

    def _link(self, child: Child) -> None:
        if self._home.control is None:
            return  # the next one is linked with all
        size = max(_SLAB_BYTES, _SLAB_BODIES * self._settings.server.max_body_bytes)
        for front in self._fronts if child is self._home else [child]:
            if front.control is not None:
                link(self._home, front, size)

    def _start_again(self, child: Child) -> None:
        self._loop.call_later(child.delay_s(), self._start, child)

    def _receive(self, child: Child) -> None:
        """Receive all that a child has sent."""
        control = child.control
        with contextlib.suppress(BlockingIOError):
            while control is not None:
                received = control.receive(FROM_CHILD)
                if received is None:
                    self._loop.remove_reader(control.socket)
                    return  # SIGCHLD follows
                self._note(child, received[0])

    def _note(self, child: Child, message: FromChild) -> None:
        match message:
            case EndFront():
                front = self._fronts[message.front]
                log.error("%s broke the protocol of its link: killing it", front.name)
                front.kill()
            case Taken():
                child.taken(message.numbers)
            case Refused():
                if not child.refuses:
                    log.error("%s has too many open files for another connection", child.name)
                child.refuses = True
                for connection in child.take_back(message.number):
                    self._acceptor.keep(connection)
            case Reached():
                self._note_state(child, message)

    def _note_state(self, child: Child, message: Reached) -> None:
        child.note(message)
        if message.state == "up" and child is not self._home:
            self._acceptor.resume()
            if not self._told_addresses:
                self._told_addresses = True
                scheme = "http" if self._settings.server.tls_cert is None else "https"
                tell_addresses(self._acceptor.listeners, scheme)
        elif message.state == "ready" and not self._told_ready:
            if all("ready" in child.reached for child in self._children):
                self._told_ready = True
                names = ", ".join(self._settings.names)
                print(f"cobatch: ready: {names}", flush=True)
        elif message.state == "drained":
            self._proceed()

    def _on_ends(self) -> None:
        """Look for children that have ended."""
        for child in self._children:
            status = child.status()
            if status is not None:
                assert child.control is not None
                self._loop.remove_reader(child.control.socket)
                child.close()
                for connection in child.take_back():
                    self._acceptor.hand(connection)
                self._ended(child, status)

    def _ended(self, child: Child, status: int) -> None:
        cause = f"status {status}" if status >= 0 else signal.Signals(-status).name
        if self._drain_s is not None:
            log.info("%s ended (%s)", child.name, cause)
            self._proceed()
        elif not self._told_ready and (status > 0 or child is self._home):
            # As with one process: a service manager decides on the next step. The child explained a status.
            if status <= 0:
                log.error("%s ended (%s) before the server was ready", child.name, cause)
            self._give_up(max(status, _FAILED))
        else:
            log.warning("%s ended (%s): starting another", child.name, cause)
            self._start_again(child)

    def _give_up(self, exit_status: int) -> None:
        """End at once, since the server cannot be made ready."""
        self._exit_status = exit_status
        self._drain()
        self._kill_all()

    def _tick(self) -> None:
        for child in self._children:
            if child.control is not None:
                child.control.flush()
                if child.is_hung():
                    log.error("%s does not respond: killing it", child.name)
                    child.kill()
        self._acceptor.resume()
        http, now_s = self._settings.server, time.monotonic()
        if self._drain_s is not None:
            if now_s >= self._drain_s + http.drain_timeout_s + _GRACE_S:
                self._kill_all()
        elif self._leave_s is not None and now_s >= self._leave_s + http.drain_delay_s:
            self._drain()
        self._loop.call_later(HEARTBEAT_S, self._tick)

    # The end

    def _on_signal(self, sig: signal.Signals) -> None:
        """Leave on the first signal, refuse requests from now on at the next, and then end at once."""
        if self._drain_s is not None:
            self._kill_all()
            os._exit(128 + sig)
        delay_s = self._settings.server.drain_delay_s
        at_once = self._leave_s is not None or not delay_s
        if self._leave_s is None:
            self._leave_s = time.monotonic()
        self._tell_all(Leave(self._leave_s, at_once))
        if at_once:
            self._drain()

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel does not let it end
                child.wait()

    def _drain(self) -> None:
        """Wait until the children have answered all accepted requests; from now on none is replaced."""
        self._drain_s = time.monotonic()
        self._proceed()

    def _proceed(self) -> None:
        """Close the listeners once all fronts have drained; end once all children have."""
        if self._drain_s is None:
            return
        if all(child.control is None for child in self._children):
            self._ended_all.set()
        elif self._closing is None and all(
            front.control is None or "drained" in front.reached for front in self._fronts
        ):
            self._closing = self._loop.create_task(self._close())

    async def _close(self) -> None:
        if any(front.takes_connections for front in self._fronts):
            await take_backlog([listener.fileno() for listener in self._acceptor.listeners])
        self._acceptor.close()
        self._tell_all(Last())
