"""A model's process as home sees it: its start, messages, output and end.

The process has the socket of its messages, the regions of its slots, and a pipe for its output, which a
thread here logs. It ends with home: the kernel ends it with the thread that started it.
"""

import contextlib
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from cobatch.engines.errors import EngineEndedError, EngineLoadError
from cobatch.engines.python.messages import (
    MARK,
    MESSAGE_BYTES,
    TELL_SIGNAL,
    FromChild,
    Run,
    Start,
    decode_to_home,
    encode,
)

log = logging.getLogger("cobatch.python")

_END_S = 2.0  # for the process to end by itself
_CLOSED_S = 10.0  # from the end of its socket to its own
_MARK_S = 10.0  # for the output of a failed batch, which lies in the pipe
_TELL_S = 5.0  # to write where it is, and to end then
_KEPT_LINES = 40
_LINES_PER_S = 200
_LONGEST_LINE = 4 << 10
_READ_BYTES = 64 << 10
# After its end: what lies in the pipe. A process that it started may write to it still.
_LAST_READS = 64


class Output:
    """The lines that a process writes to stdout and stderr: logged, and the last ones kept."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.kept: deque[str] = deque(maxlen=_KEPT_LINES)
        # Of batches that failed: the number, as bytes, and the output before its mark.
        self.failed: queue.SimpleQueue[tuple[bytes, str]] = queue.SimpleQueue()
        self._name = name
        self._clock = clock
        self._rest = b""
        self._second, self._lines, self._dropped = 0, 0, 0

    @property
    def flooded(self) -> bool:
        """Return True if lines of this second are dropped."""
        return self._dropped > 0

    def feed(self, data: bytes) -> None:
        """Take output that was read; b"" at the end."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE or not data:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            if line.startswith(MARK):
                self.failed.put((line.removeprefix(MARK), self.text()))
                self.kept.clear()
            elif line:
                self._take(line[:_LONGEST_LINE].decode(errors="replace"))

    def _take(self, line: str) -> None:
        self.kept.append(line)
        second = int(self._clock())
        if second != self._second:
            if self._dropped:
                log.warning("model %s: %d more lines in a second", self._name, self._dropped)
            self._second, self._lines, self._dropped = second, 0, 0
        self._lines += 1
        if self._lines > _LINES_PER_S:
            self._dropped += 1
        else:
            log.info("model %s: %s", self._name, line)

    def text(self) -> str:
        """Return the kept lines, below a title; "" if there are none."""
        return "".join(f"\n  {line}" for line in ["its last output:", *self.kept]) if self.kept else ""


class ModelProcess:
    """A process, from its start. `kill` may be called by any thread; `on_end` is called by another one.

    `module`: that it runs. `sock` is home's end of the socket, for another way to send and receive. Raises
    EngineLoadError.
    """

    def __init__(
        self,
        name: str,
        descriptors: Sequence[int],
        env: Mapping[str, str],
        on_end: Callable[[EngineEndedError], None],
        module: str = "cobatch.engines.python.child",
    ) -> None:
        self.output = Output(name)
        self._on_end = on_end
        self._lock = threading.Lock()
        self._reaped = False
        self._killed = ""
        self._marks = True
        self._thread = threading.Thread(target=self._watch, name=f"cobatch-{name}-output", daemon=True)
        try:
            self._start([sys.executable, "-P", "-m", module, name, str(os.getpid())], descriptors, env)
        except (OSError, RuntimeError) as error:  # the latter of a thread that cannot be started
            raise EngineLoadError(f"the model's process cannot be started: {error}") from error

    def _start(self, command: Sequence[str], descriptors: Sequence[int], env: Mapping[str, str]) -> None:
        """Start the process and the thread, or leave nothing behind."""
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            self.sock, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.callback(end.close)
            ours.callback(self.sock.close)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
            self._reader, writer = os.pipe()
            theirs.callback(os.close, writer)
            ours.callback(os.close, self._reader)
            os.set_blocking(self._reader, False)
            inherited = [end.fileno(), *descriptors]
            self._process = subprocess.Popen(  # noqa: S603 - this Python, and our module
                [*command, *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                pass_fds=inherited,
                start_new_session=True,  # a terminal's signals are for home
                env={**os.environ, **env},
            )
            self.pid = self._process.pid
            ours.callback(self._process.wait)
            ours.callback(self._signal_group)
            self._pid = os.pidfd_open(self.pid)
            ours.callback(os.close, self._pid)
            self._thread.start()
            ours.pop_all()

    def send(self, message: Start | Run) -> None:
        """Send a message. Raises EngineEndedError."""
        try:
            self.sock.send(encode(message))
        except (BrokenPipeError, ConnectionResetError):
            raise self._ended() from None

    def receive(self) -> FromChild:
        """Wait for a message. Raises EngineEndedError."""
        try:
            data = self.sock.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            data = b""
        if not data:
            raise self._ended()
        try:
            message: FromChild = decode_to_home(data)
            return message
        except msgspec.MsgspecError as error:
            self.kill(f"sent a bad message and was ended: {error}")
            raise self._ended() from None

    def printed(self, number: int) -> str:
        """Return the process's output for the batch of this number, which failed."""
        while self._marks:
            try:
                marked, text = self.output.failed.get(timeout=_MARK_S)
            except queue.Empty:
                self._marks = False  # a process that writes its output elsewhere costs the wait only once
            else:
                if marked == b"%d" % number:
                    return text
        return self.output.text()

    def kill(self, why: str = "was ended by the server") -> None:
        """End the process and all that it started, at once."""
        with self._lock:
            if not self._reaped:
                self._killed = self._killed or why
                self._signal_group()

    def abandon(self) -> None:
        """Let the process write where it is and end, or end it."""
        with self._lock:
            if not self._reaped:
                self._killed = self._killed or "did not finish a batch and was ended"
                os.kill(self.pid, TELL_SIGNAL)
        timer = threading.Timer(_TELL_S, self.kill)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """End the process, if it does not end by itself; free everything."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self._thread.join(_END_S)
        if self._thread.is_alive():
            self.kill()
            self._thread.join()
        self.sock.close()

    def _ended(self) -> EngineEndedError:
        # Its end of the socket may be closed while it lives.
        self._thread.join(_CLOSED_S)
        self.kill("closed its socket and was ended")
        self._thread.join()
        return self._error()

    def _error(self) -> EngineEndedError:
        code = self._process.returncode
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"exited with status {code}"
        return EngineEndedError(f"the model's process {self._killed or how}{self.output.text()}")

    # In the thread

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        poll.register(self._pid, select.POLLIN)
        ended = False
        while not ended:
            for descriptor, _ in poll.poll():
                if descriptor == self._pid:
                    ended = True
                elif not self._read():
                    poll.unregister(self._reader)
            if self.output.flooded:
                time.sleep(0.001)  # else it would take all of this process's time
        with self._lock:
            self._signal_group()
            self._process.wait()
            self._reaped = True
        for _ in range(_LAST_READS):
            if not self._read():
                break
        self.output.feed(b"")
        os.close(self._reader)
        os.close(self._pid)
        # A process that it started may have its end of the socket still.
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._on_end(self._error())

    def _read(self) -> bool:
        """Read some output; return False if there is none, or will be none."""
        try:
            data = os.read(self._reader, _READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self.output.feed(data)
        return bool(data)

    def _signal_group(self) -> None:
        # Its number is no other's, since it is not reaped.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
