"""`cobatch serve` as a child process: started, waited for until ready, and stopped again.

Standard library only: scripts/smoke.py also uses it in an environment that holds nothing but the wheel.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

LISTENING = re.compile(r"cobatch: listening on (http://\S+)")
START_S = 120.0  # loading and warming up a large model on a busy machine
STOP_S = 45.0  # the server's own drain limit is 30 s


class ServingError(Exception):
    """The server did not start, or did not stop as it should; the message carries its last lines."""


class Server:
    """A running `cobatch serve`. As a context manager it never leaves the process behind.

    `url` is the address it printed, `http://127.0.0.1:PORT`. With `echo` its lines go to stderr as well.
    """

    def __init__(self, arguments: list[str], *, echo: bool = False) -> None:
        self.echo = echo
        self._tail: deque[str] = deque(maxlen=30)
        self._address = ""
        self._said_something = threading.Condition()
        self._ended = False
        # A session of its own: Ctrl-C then reaches this process alone, which asks the server to stop
        # exactly once (a second signal would tell it to drop what is in flight).
        self._process = subprocess.Popen(
            [str(Path(sys.executable).with_name("cobatch")), "serve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Settings of whoever runs this must not reach a server whose settings are the point.
            env={name: value for name, value in os.environ.items() if not name.startswith("COBATCH_")},
        )
        self._reader = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._reader.start()

    @property
    def url(self) -> str:
        return self._address

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Returns once the server listens and says that it is ready; ServingError where it doesn't."""
        deadline_s = time.monotonic() + timeout_s
        with self._said_something:
            self._said_something.wait_for(lambda: self._address or self._ended, timeout_s)
        while self._address and self._process.poll() is None and time.monotonic() < deadline_s:
            try:
                with urllib.request.urlopen(f"{self._address}/v2/health/ready", timeout=5.0):  # noqa: S310 (http, from LISTENING)
                    return
            except (urllib.error.URLError, TimeoutError):  # 503 while models load: ask again
                time.sleep(0.05)
        ended = self._ended or self._process.poll() is not None
        why = "ended before it was ready" if ended else f"was not ready within {timeout_s:.0f} s"
        raise ServingError(self._with_tail(f"the server {why}"))

    def wait(self) -> int:
        """Blocks until the server ends by itself; its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """SIGTERM, then the end: ServingError unless it ended by itself, in time, with status 0."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._kill()
            raise ServingError(self._with_tail(f"the server did not stop within {STOP_S:.0f} s")) from None
        self._reader.join(STOP_S)
        if status != 0:
            raise ServingError(self._with_tail(f"the server ended with status {status}, not 0"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:  # an error is on its way up, or a caller forgot to stop it
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._kill()
        self._reader.join(STOP_S)

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._heard(line.rstrip("\n"))
        with self._said_something:
            self._ended = True
            self._said_something.notify_all()

    def _heard(self, line: str) -> None:
        match = LISTENING.search(line)
        with self._said_something:
            self._tail.append(line)
            if match:
                self._address = match[1].rstrip("/")
                self._said_something.notify_all()
        if self.echo:
            print(line, file=sys.stderr, flush=True)

    def _with_tail(self, message: str) -> str:
        lines = "\n".join(f"    {line}" for line in self._tail) or "    (nothing)"
        return f"{message}; it last said:\n{lines}"
