"""The processes of the stress: fronts that submit and check rows, and a home that answers them.

A worker gets its links over the socket whose descriptor is its argument, and reports there. The answer to a
row is the row plus one, as unsigned integers of 64 bits. The first and the last are the request's number; the
others are random, of the slot that the request has in its front.
"""

from __future__ import annotations

import os
import random
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.link.ends import Answered, Descriptors, FrontEnd, HomeEnd, Row
from cobatch.engines.errors import LinkError

ROW_BYTES = 200_704
# Of each slab. Fewer blocks than slots, so that it is full at times.
SLAB_BYTES = 16 << 20
# Requests that a front keeps open, and rows of home's largest batch.
SLOTS, BATCH_ROWS = 72, 8
# A silence is this long without an answer while requests are open.
SILENCE_S = 0.05
_REPORT_S = 0.05
# Parts of the requests that are cancelled, of the answers that a slow reader keeps, of home's batches that
# take long, and the longest of such times.
_CANCELLED, _KEPT, _SLOW, _LONGEST_S = 0.01, 0.05, 0.002, 0.2


class Silence(msgspec.Struct):
    """A time without an answer, by CLOCK_MONOTONIC. `waited_s` of it the front or home waited for a CPU."""

    began_s: float
    ended_s: float
    waited_s: float


class Report(msgspec.Struct, tag=True):
    """Counts of a front since its last report."""

    answered: int = 0
    dropped: int = 0
    failed: int = 0
    full: int = 0
    wrong: int = 0
    silences: list[Silence] = msgspec.field(default_factory=list)


class Leftover(msgspec.Struct, tag=True):
    """Blocks that are in use at the end, and descriptors that are open beside those of the beginning."""

    blocks: int
    descriptors: int


encode = msgspec.msgpack.encode
decode: Callable[[bytes], Report | Leftover] = msgspec.msgpack.Decoder(Report | Leftover).decode


class Worker:
    """An event loop over the control socket and links. `stopping`: no new requests."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.stopping = False
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ)
        self.leaked_blocks = 0
        self._descriptors = _open_descriptors()

    def take_control(self) -> None:
        """Receive a link, or the word to stop. The end of the socket ends the process."""
        data, descriptors, _, _ = socket.recv_fds(self.control, 16, 3)
        if not data:
            sys.exit(1)
        if descriptors:
            self.use_link(Descriptors(*descriptors), int(data))
        else:
            self.stopping = True

    def use_link(self, descriptors: Descriptors, home: int) -> None:
        """Begin a link; `home` is its process."""
        raise NotImplementedError

    def watch(self, end: FrontEnd | HomeEnd) -> None:
        """Flush, and wait for room in the socket's buffer if that is full."""
        end.channel.flush()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if end.channel.backlogged else 0)
        if self.selector.get_key(end.channel.fileno()).events != events:
            self.selector.modify(end.channel.fileno(), events, end)

    def run(self) -> None:
        """Work until the word to stop has come, and nothing is left to do."""
        raise NotImplementedError

    def leave(self) -> None:
        """Tell the rest."""
        self.control.send(encode(Leftover(self.leaked_blocks, _open_descriptors() - self._descriptors)))


class Front(Worker):
    """Keeps SLOTS requests open and checks each answer; some it reads slowly, and checks again then."""

    def __init__(self, control: socket.socket) -> None:
        super().__init__(control)
        random_rows = np.random.default_rng(os.getpid())
        self.rows = random_rows.integers(0, 1 << 63, (SLOTS, ROW_BYTES // 8), dtype=np.uint64)
        self.answers = self.rows + np.uint64(1)
        self.free = list(range(SLOTS))
        self.slots: dict[int, int] = {}
        self.kept: deque[tuple[float, Answered, list[int]]] = deque()
        self.end: FrontEnd | None = None
        self.report = Report()
        self.number = 0
        self.processes: tuple[int, ...] = ()
        self.heard_s = self.reported_s = 0.0
        self.waits_s: dict[Path, float] = {}
        self.waited_s = 0.0  # in the silence

    def run(self) -> None:
        self.control.send(encode(Report()))
        while not (self.stopping and not self.slots and not self.kept):
            self.fill()
            if self.end is not None:
                self.watch(self.end)
            for key, _ in self.selector.select(_REPORT_S / 2):
                if key.fileobj is self.control:
                    self.take_control()
                elif self.end is not None and key.data is self.end:
                    self.receive(self.end)
            self.release_kept()
            self.send_report()
        while self.end is not None and self.end.channel.backlogged:
            self.selector.select()
            self.end.channel.flush()
        if self.end is not None:
            self.leaked_blocks = self.end.requests.arena.blocks
            self.lose(self.end)
        self.send_report(at_once=True)

    def use_link(self, descriptors: Descriptors, home: int) -> None:
        """Begin a link. The one before has ended, or ends now."""
        if self.end is not None:
            self.lose(self.end)
        self.end = descriptors.front()
        self.selector.register(self.end.channel.fileno(), selectors.EVENT_READ, self.end)
        self.processes = (os.getpid(), home)
        self.listen()

    def lose(self, end: FrontEnd) -> None:
        """Forget a link and its requests."""
        self.hear()
        self.selector.unregister(end.channel.fileno())
        end.close()
        self.end = None
        self.kept.clear()
        self.report.failed += len(self.slots)
        self.free += self.slots.values()
        self.slots.clear()

    def fill(self) -> None:
        """Submit requests in the free slots, until the slab is full."""
        while self.free and self.end is not None and not self.stopping:
            slot = self.free[-1]
            self.number += 1
            self.rows[slot, 0] = self.rows[slot, -1] = self.number
            if not self.end.submit(Row(self.number, self.rows[slot]), ROW_BYTES):
                self.report.full += 1
                return
            if not self.slots:
                self.listen()
            self.slots[self.number] = self.free.pop()
            if random.random() < _CANCELLED:
                self.end.cancel((self.number,))

    def receive(self, end: FrontEnd) -> None:
        """Check answers."""
        try:
            for message in end.receive():
                self.hear()
                if isinstance(message, Answered):
                    self.check(end, message)
                else:
                    self.report.dropped += len(message.ids)
                    self.free += [self.slots.pop(number) for number in message.ids]
        except LinkError:
            self.lose(end)

    def check(self, end: FrontEnd, answered: Answered) -> None:
        slots = [self.slots.pop(row.number) for row in answered.rows]
        self.free += slots
        self.report.answered += len(slots)
        self.compare(answered, slots)
        if random.random() < _KEPT:
            self.kept.append((time.monotonic() + random.uniform(0, _LONGEST_S), answered, slots))
        else:
            end.release(answered)

    def compare(self, answered: Answered, slots: list[int]) -> None:
        for row, slot in zip(answered.rows, slots, strict=True):
            data = np.frombuffer(row.data, np.uint64)
            right = data[0] == data[-1] == row.number + 1
            self.report.wrong += not (right and np.array_equal(data[1:-1], self.answers[slot, 1:-1]))

    def release_kept(self) -> None:
        """Give slowly read answers back, if they are unchanged."""
        while self.kept and self.end is not None and self.kept[0][0] <= time.monotonic():
            _, answered, slots = self.kept.popleft()
            self.compare(answered, slots)
            self.end.release(answered)

    def listen(self) -> None:
        """A silence would begin now."""
        self.heard_s = time.monotonic()
        self.look()
        self.waited_s = 0.0

    def hear(self) -> None:
        """Note a silence that ends now."""
        now_s = time.monotonic()
        if self.slots and now_s - self.heard_s > SILENCE_S:
            self.look()
            self.report.silences.append(Silence(self.heard_s, now_s, self.waited_s))
            self.waited_s = 0.0
        self.heard_s = now_s

    def look(self) -> None:
        """Add the waits since the last look, again and again: those of a process end with it."""
        before, self.waits_s = self.waits_s, {}
        for process in self.processes:
            self.waits_s |= thread_waits_s(process)
        self.waited_s += sum([wait_s - before.get(thread, 0.0) for thread, wait_s in self.waits_s.items()])

    def send_report(self, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self.reported_s >= _REPORT_S:
            with suppress(BlockingIOError):
                self.control.send(encode(self.report), 0 if at_once else socket.MSG_DONTWAIT)
                self.report = Report()
                self.look()
                if self.heard_s > self.reported_s:  # else a silence goes on
                    self.waited_s = 0.0
                self.reported_s = time.monotonic()


class Home(Worker):
    """Answers rows of all fronts in batches; some batches take long."""

    def __init__(self, control: socket.socket) -> None:
        super().__init__(control)
        self.ends: list[HomeEnd] = []
        self.batch = np.empty((BATCH_ROWS, ROW_BYTES // 8), np.uint64)
        self.outputs = np.empty_like(self.batch)

    def run(self) -> None:
        self.control.send(encode(Report()))
        while self.ends or not self.stopping:
            waits = not any(end.held for end in self.ends)
            for key, _ in self.selector.select(None if waits else 0):
                if key.data is None:
                    self.take_control()
                else:
                    self.receive(key.data)
            self.run_batch()
            for end in self.ends:
                self.watch(end)

    def use_link(self, descriptors: Descriptors, home: int) -> None:  # noqa: ARG002
        """Begin a link."""
        end = descriptors.home()
        self.ends.append(end)
        self.selector.register(end.channel.fileno(), selectors.EVENT_READ, end)

    def receive(self, end: HomeEnd) -> None:
        try:
            end.receive()
        except LinkError:
            self.selector.unregister(end.channel.fileno())
            self.ends.remove(end)
            if self.stopping:
                self.leaked_blocks += end.answers.arena.blocks
            end.close()

    def run_batch(self) -> None:
        """Run a batch of the rows that wait, of each front in turn."""
        random.shuffle(self.ends)
        rows: list[tuple[HomeEnd, int]] = []
        for end in self.ends:
            rows += [(end, number) for number in islice(end.held, BATCH_ROWS - len(rows))]
        for place, (end, number) in enumerate(rows):
            self.batch[place] = np.frombuffer(end.held[number], np.uint64)
        if random.random() < _SLOW:
            time.sleep(random.uniform(0, _LONGEST_S))
        np.add(self.batch, 1, out=self.outputs)
        for end in self.ends:
            own = [
                Row(number, self.outputs[place]) for place, (other, number) in enumerate(rows) if other is end
            ]
            if own:
                end.answer(own)


def thread_waits_s(process: int) -> dict[Path, float]:
    """Return for how long each thread of a process has waited for a CPU while it could run."""
    waits_s = {}
    for thread in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with suppress(OSError):
            waits_s[thread] = int(thread.read_text().split()[1]) / 1e9
    return waits_s


def _open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def main() -> None:
    """Run a worker."""
    kinds: dict[str, type[Worker]] = {"front": Front, "home": Home}
    worker = kinds[sys.argv[1]](socket.socket(fileno=int(sys.argv[2])))
    worker.run()
    worker.leave()


if __name__ == "__main__":
    main()
