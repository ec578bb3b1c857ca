"""Clients of the stressed server: each sends rows of 200 kB on its own connections and checks the answers.

They cost little, as they share the cores with the server: a buffer each, filled by the event loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import closing
from typing import cast

import numpy as np

from benchmarks.link.silences import Watcher
from benchmarks.link.workers import ROW_BYTES

FLOATS = ROW_BYTES // 4
_LATE, _LATEST_S = 0.01, 0.3
# Much shorter than Retry-After says: the first answer after a restart is to be noticed soon.
_PAUSE_S = 0.05
# Requests of a connection: those of a front that was killed spread again over all fronts.
_REQUESTS = 20
_HANG_S = 60.0
_LOOK_S = 0.05
_TELL_S = 30.0
_HEAD_BYTES = 4096


class Connection(asyncio.BufferedProtocol):
    """Receives one answer at a time. `surplus`: bytes that came beside the answers."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.head = b""  # in lower case, once it is complete
        self.surplus = 0
        self._memory = memoryview(bytearray(_HEAD_BYTES + ROW_BYTES))
        self._received = self._body = self._end = 0
        self._answered: asyncio.Future[memoryview] = asyncio.get_running_loop().create_future()
        self._answered.cancel()  # nothing is asked

    async def ask(self, request: bytearray, late_s: float) -> memoryview:
        """Send a request and return the body of its answer, which is read after `late_s`.

        Raises ConnectionError at the end of the connection.
        """
        if self.transport.is_closing():
            raise ConnectionResetError
        self.head, self._received = b"", 0
        self._answered = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        if late_s:
            self.transport.pause_reading()
            await asyncio.sleep(late_s)
            self.transport.resume_reading()
        return await self._answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._memory[self._received :]

    def buffer_updated(self, nbytes: int) -> None:
        self._received += nbytes
        if self._answered.done():
            self.surplus += nbytes
        elif self.head or self._has_head():
            self.surplus += max(0, self._received - self._end)
            if self._received >= self._end:
                self._answered.set_result(self._memory[self._body : self._end])

    def _has_head(self) -> bool:
        head, end, _ = bytes(self._memory[: min(self._received, _HEAD_BYTES)]).partition(b"\r\n\r\n")
        if end:
            self.head = head.lower() + end
            self._body = len(self.head)
            self._end = self._body + int(self.head.partition(b"\r\ncontent-length: ")[2].split(b"\r\n", 1)[0])
        return bool(end)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if not self._answered.done():
            self._answered.set_exception(ConnectionResetError())


class Slot:
    """A client's request, with random whole numbers; the first and the last are the number of the request."""

    def __init__(self) -> None:
        text = (
            f'{{"inputs":[{{"name":"x","datatype":"FP32","shape":[1,{FLOATS}],'
            f'"parameters":{{"binary_data_size":{ROW_BYTES}}}}}],"parameters":{{"binary_data_output":true}}}}'
        ).encode()
        head = (
            "POST /v2/models/plus_one/infer HTTP/1.1\r\nHost: stress\r\n"
            f"Content-Length: {len(text) + ROW_BYTES}\r\n"
            f"Inference-Header-Content-Length: {len(text)}\r\n\r\n"
        ).encode()
        self.request = bytearray(head + text + bytes(ROW_BYTES))
        self._row = np.frombuffer(self.request, "<f4", FLOATS, len(head) + len(text))
        self._row[:] = np.random.default_rng().integers(0, 1 << 20, FLOATS)
        self._answer = self._row + 1

    def next(self, number: int) -> None:
        """Make the next request."""
        self._row[0] = self._row[-1] = number % (1 << 20)
        self._answer[0] = self._answer[-1] = self._row[0] + 1

    def is_right(self, data: memoryview) -> bool:
        """Check an answer's data."""
        return np.array_equal(np.frombuffer(data, "<f4"), self._answer)


class Load:
    """The clients, which ask until this number of requests is answered."""

    def __init__(self, address: str, requests: int, watcher: Watcher) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._host, _, self._port = address.rpartition(":")
        self._requests = requests
        self._number = 0
        self._watcher = watcher

    @property
    def done(self) -> bool:
        """Are all requests answered?"""
        return self.counts["answered"] >= self._requests

    async def client(self) -> None:
        """Ask until all is done, on a new connection after the end of one."""
        slot = Slot()
        loop = asyncio.get_running_loop()
        while not self.done:
            try:
                transport, connection = await loop.create_connection(Connection, self._host, int(self._port))
            except OSError:
                self.faults["no connection"] += 1
                await asyncio.sleep(_PAUSE_S)
                continue
            with closing(transport):
                try:
                    for _ in range(_REQUESTS):
                        if self.done or not await self.ask(slot, connection):
                            break
                except ConnectionError:
                    self.counts["lost"] += 1
                self.faults["bytes beside the answers"] += connection.surplus

    async def ask(self, slot: Slot, connection: Connection) -> bool:
        """Ask once; return True if the connection can be used again."""
        self._number += 1
        slot.next(self._number)
        late_s = random.uniform(0, _LATEST_S) if random.random() < _LATE else 0.0
        body = await connection.ask(slot.request, late_s)
        status = connection.head.split(b" ", 2)[1]
        if status == b"200":
            self._watcher.hear()
            self.counts["answered"] += 1
            self.faults["wrong answers"] += not slot.is_right(body[-ROW_BYTES:])
        elif status == b"503" and b"\r\nretry-after: " in connection.head:
            self.counts["503"] += 1
            await asyncio.sleep(_PAUSE_S)
        else:
            self.faults[f"{status!r} {bytes(body[:200])!r}"] += 1
        return b"\r\nconnection: close" not in connection.head

    async def watch(self) -> None:
        """Look at the processes and print the progress. Raises TimeoutError if no answer comes."""
        told_s = time.monotonic()
        while not self.done:
            self._watcher.look()
            now_s = time.monotonic()
            if now_s - self._watcher.heard_s > _HANG_S:
                raise TimeoutError(f"no answer for {_HANG_S} s, after {self.counts['answered']}")
            if now_s - told_s >= _TELL_S:
                told_s = now_s
                print(f"{self.counts['answered']:,} answered, {self.faults.total()} faults", flush=True)
            await asyncio.sleep(_LOOK_S)
