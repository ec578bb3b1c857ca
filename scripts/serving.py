"""`cobatch serve` as a child process: start it, wait until it is ready, stop it."""

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
START_S = 120.0  # to load and warm up a large model on a busy machine
STOP_S = 45.0  # the server's drain timeout is 30 s


class ServingError(Exception):
    """The server did not start, or did not stop with status 0; the text has its last lines."""


class Server:
    """A running `cobatch serve`; the context manager stops the process in any case.

    `url` is the address that it printed, `http://127.0.0.1:PORT`. With `echo` its lines go to stderr as well.
    """

    def __init__(self, arguments: list[str], *, echo: bool = False) -> None:
        self.echo = echo
        self._tail: deque[str] = deque(maxlen=30)
        self._address = ""
        self._changed = threading.Condition()
        self._ended = False
        # In its own session it gets no Ctrl-C from the terminal, so that this process sends it exactly one
        # signal; a second one makes it drop the requests in flight.
        self._process = subprocess.Popen(
            [str(Path(sys.executable).with_name("cobatch")), "serve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # No settings from the user's environment.
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
        """Wait until the server is ready. Raises ServingError."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._address or self._ended, timeout_s)
        while self._address and self._process.poll() is None and time.monotonic() < deadline_s:
            try:
                with urllib.request.urlopen(f"{self._address}/v2/health/ready", timeout=5.0):  # noqa: S310 (http, from LISTENING)
                    return
            except (urllib.error.URLError, TimeoutError):  # 503 while models load
                time.sleep(0.05)
        ended = self._ended or self._process.poll() is not None
        why = "exited before it was ready" if ended else f"was not ready within {timeout_s:.0f} s"
        raise ServingError(self._with_tail(f"the server {why}"))

    def wait(self) -> int:
        """Wait until the server exits, and return its status."""
        return self._process.wait()

    def stop(self) -> None:
        """Send SIGTERM and wait. Raises ServingError unless the server exits in time with status 0."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._kill()
            raise ServingError(self._with_tail(f"the server did not stop within {STOP_S:.0f} s")) from None
        self._reader.join(STOP_S)
        if status != 0:
            raise ServingError(self._with_tail(f"the server exited with status {status}, not 0"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:  # an exception is propagating
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
                self._on_line(line.rstrip("\n"))
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _on_line(self, line: str) -> None:
        match = LISTENING.search(line)
        with self._changed:
            self._tail.append(line)
            if match:
                self._address = match[1].rstrip("/")
                self._changed.notify_all()
        if self.echo:
            print(line, file=sys.stderr, flush=True)

    def _with_tail(self, message: str) -> str:
        lines = "\n".join(f"    {line}" for line in self._tail) or "    (nothing)"
        return f"{message}; its last lines:\n{lines}"
