"""The supervisor with fake children: real processes, signals and connections, without a server."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from cobatch.engines.link import slab
from cobatch.server.fronts.child_server import ChildServer
from cobatch.server.fronts.control import PAGE_BYTES, Connection, Control, Link, LinkEnds, Reached, map_words
from cobatch.server.serve import Server
from cobatch.server.settings.schema import ModelSettings, Settings
from cobatch.server.supervisor.acceptor import Acceptor
from cobatch.server.supervisor.children import STALLED_BEATS, Child
from cobatch.server.supervisor.supervisor import Supervisor, run
from tests.support.descriptors import nothing_stays_open
from tests.support.http.process import WAIT_S, Cobatch, eventually
from tests.support.paths import ROOT

SUPERVISED = ROOT / "tests" / "support" / "fronts" / "supervised.py"


@contextmanager
def supervised(folder: Path, processes: int = 3, *, delay_s: float = 0.0, **env: str) -> Iterator[Cobatch]:
    """Run the supervisor of fake children."""
    command = (sys.executable, "-P", SUPERVISED)
    with Cobatch(folder, str(processes), str(delay_s), command=command, env=env) as server:
        yield server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Cobatch]:
    """Start home and two fronts, and wait until they are ready."""
    with supervised(tmp_path) as server:
        server.line("cobatch: ready: fake")
        yield server


def started(server: Cobatch, name: str, count: int = 1) -> int:
    """Wait until a child has started `count` times; return the last process."""
    return int(server.lines(f"{name} started ", count)[-1])


class Call:
    """A connection that has sent a line to a fake front."""

    def __init__(self, server: Cobatch) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), WAIT_S)
        self._lines = self._socket.makefile("rb")
        self._socket.sendall(b"closed\n")

    def greeting(self) -> tuple[str, int]:
        """Wait for the answer; return the name and the process of its front."""
        *name, pid = self._lines.readline().decode().split()
        assert self._lines.readline()
        return " ".join(name), int(pid)

    def is_answered(self) -> bool:
        """Return True if a front has greeted."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def ask(self, line: str) -> str:
        """Send a line; return the answer, or "" at the end of the connection."""
        self._socket.sendall(f"{line}\n".encode())
        return self._lines.readline().decode().strip()

    def ended(self) -> bool:
        """Wait for the end of the connection."""
        return self._lines.readline() == b""

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Greeted(Call):
    """A connection of which a fake front has read."""

    def __init__(self, server: Cobatch) -> None:
        super().__init__(server)
        self.front, self.pid = self.greeting()


def gone(pid: int) -> None:
    """Wait until a process that is no child of this one has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], WAIT_S)[0], f"process {pid} still runs"
    finally:
        os.close(fd)


def files(pid: int) -> list[str]:
    """Return the names of a process's open files."""
    names = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(str(fd.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue
    return names


def open_files(pid: int) -> list[str]:
    """Return the kinds of a process's open files, without their numbers."""
    return sorted(name.partition("[")[0] for name in files(pid))


def kept(server: Cobatch) -> int:
    """Count the clients' connections that the supervisor keeps."""
    local, established = f":{server.port:04X}", "01"
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    names = {f"socket:[{one[9]}]" for one in sockets if one[1].endswith(local) and one[3] == established}
    return len(names.intersection(files(server.process.pid)))


def test_a_connection_goes_to_the_front_with_the_fewest(server: Cobatch) -> None:
    with ExitStack() as stack:
        calls = [stack.enter_context(Greeted(server)) for _ in range(6)]
        of_0, of_1 = ([call for call in calls if call.front == f"front {index}"] for index in range(2))
        assert len(of_0) == len(of_1) == 3
        of_0[0].close()
        of_0[1].close()
        eventually(lambda: of_0[2].ask("closed") == "2")
        late = [stack.enter_context(Greeted(server)) for _ in range(2)]
        assert [call.front for call in late] == ["front 0", "front 0"]
    assert server.stop() == 0


def test_a_killed_front_is_replaced_and_the_other_keeps_its_connections(server: Cobatch) -> None:
    with Greeted(server) as one, Greeted(server) as other:
        os.kill(one.pid, signal.SIGKILL)
        assert one.ended()
        assert started(server, one.front, 2) != one.pid
        # Home and the new front are linked anew; the other front is not.
        server.lines(f"home linked {one.front[-1]}", 2)
        server.lines(f"{one.front} linked", 2)
        server.lines(f"home linked {other.front[-1]}", 1)
        assert other.ask("closed") == "0"
        with Greeted(server) as new:
            assert (new.front, new.pid) == (one.front, started(server, one.front, 2))
    assert server.stop() == 0
    assert f"{one.front} ended (SIGKILL): starting another" in server.stderr


def test_no_connection_is_lost_to_a_front_that_has_ended(server: Cobatch) -> None:
    with Greeted(server) as one, Greeted(server) as other, ExitStack() as stack:
        server.signal(signal.SIGSTOP)  # it does not know of the end when it accepts
        os.kill(one.pid, signal.SIGKILL)
        assert one.ended()
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(3)
        ]
        server.signal(signal.SIGCONT)
        for client in clients:
            client.settimeout(WAIT_S)
            assert client.recv(64).startswith(b"front")
        assert other.ask("closed") == "0"


@pytest.mark.parametrize("processes", [2, 3])
def test_connections_that_a_killed_front_has_not_read_go_to_another(tmp_path: Path, processes: int) -> None:
    with supervised(tmp_path, processes) as server, ExitStack() as stack:
        server.line("cobatch: ready: fake")
        fronts = [stack.enter_context(Greeted(server)) for _ in range(processes - 1)]
        stopped = fronts[0].pid
        os.kill(stopped, signal.SIGSTOP)
        calls = [stack.enter_context(Call(server)) for _ in range(6)]
        of_stopped = 6 // (processes - 1)

        def handed_out() -> bool:
            answered = sum(call.is_answered() for call in calls)
            # All are answered if the supervisor has killed the stopped front by now.
            return answered == 6 or (answered == 6 - of_stopped and kept(server) == of_stopped)

        eventually(handed_out)
        with suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
        pids = {call.greeting()[1] for call in calls}
        assert stopped not in pids
        # That of which it has read is lost with it.
        assert fronts[0].ended()
        assert [one.ask("closed") for one in fronts[1:]] == ["0"] * (processes - 2)
        assert server.stop() == 0


def test_connections_that_a_front_has_no_descriptor_for_go_to_another(server: Cobatch) -> None:
    with ExitStack() as stack:
        full, other = (stack.enter_context(Greeted(server)) for _ in range(2))
        assert full.ask("full") == "0"
        calls = [stack.enter_context(Greeted(server)) for _ in range(4)]
        assert [call.pid for call in calls] == [other.pid] * 4
        assert full.ask("closed") != "0"
        assert server.stop() == 0
        assert f"{full.front} has too many open files for another connection" in server.stderr


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGABRT])
def test_home_is_replaced_and_linked_with_fronts_that_stay(server: Cobatch, sent: signal.Signals) -> None:
    with Greeted(server) as call:
        for index in range(2):
            server.lines(f"home linked {index}", 1)
        os.kill(started(server, "home"), sent)
        for index in range(2):
            server.lines(f"front {index} linked", 2)
            server.lines(f"home linked {index}", 2)
            server.lines(f"front {index} started", 1)
        assert call.ask("closed") == "0"
    assert server.stop() == 0


def test_a_front_that_broke_the_protocol_is_replaced(server: Cobatch) -> None:
    first = started(server, "front 0")
    os.kill(started(server, "home"), signal.SIGUSR1)
    assert started(server, "front 0", 2) != first
    assert server.stop() == 0
    assert "front 0 broke the protocol of its link" in server.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["home", "front 1"])
def test_a_child_that_stands_still_is_replaced(server: Cobatch, name: str) -> None:
    stopped = started(server, name)
    os.kill(stopped, signal.SIGSTOP)
    assert started(server, name, 2) != stopped
    assert server.stop() == 0
    assert f"{name} does not respond: killing it" in server.stderr


@pytest.mark.parametrize(
    ("sent", "to_all"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False), (signal.SIGINT, True)],
)
def test_a_signal_ends_all_in_order(server: Cobatch, sent: signal.Signals, to_all: bool) -> None:
    with Greeted(server):
        if to_all:  # as a terminal and some service managers send it
            os.killpg(server.process.pid, sent)
        else:
            server.signal(sent)
        assert server.wait() == 0
        for name in ("home", "front 0", "front 1"):
            assert server.line(f"{name} leave ") == "True"
            server.line(f"{name} ended")


def test_connections_are_handed_out_until_all_fronts_have_drained(server: Cobatch) -> None:
    with Greeted(server) as call:
        call.ask("hold")
        server.signal()
        server.line(f"{call.front} leave True")
        with Greeted(server) as late:
            assert late.front.startswith("front")
        server.signal()
        assert server.wait() == 128 + signal.SIGTERM


def test_a_second_signal_ends_the_delay_and_a_third_one_all(tmp_path: Path) -> None:
    with supervised(tmp_path, delay_s=3600.0) as server:
        server.line("cobatch: ready: fake")
        with Greeted(server) as call:
            call.ask("hold")
            server.signal()
            assert server.line(f"{call.front} leave ") == "False"
            # A front that is replaced now leaves too.
            other = f"front {1 - int(call.front[-1])}"
            assert server.line(f"{other} leave ") == "False"
            os.kill(started(server, other), signal.SIGKILL)
            started(server, other, 2)
            assert server.lines(f"{other} leave ", 2) == ["False", "False"]
            server.signal()
            assert server.lines(f"{call.front} leave ", 2) == ["False", "True"]
            server.signal(signal.SIGINT)
            assert server.wait() == 128 + signal.SIGINT


def test_the_end_waits_for_no_child_that_died_meanwhile(server: Cobatch) -> None:
    with Greeted(server) as call:
        call.ask("hold")
        server.signal()
        server.line(f"{call.front} leave True")
        os.kill(call.pid, signal.SIGKILL)
        assert server.wait() == 0


@pytest.mark.parametrize("name", ["home", "front 1"])
def test_a_child_that_fails_at_the_first_start_ends_all(tmp_path: Path, name: str) -> None:
    with supervised(tmp_path, FAILS=name) as server:
        assert server.wait() == 3
        assert server.stdout.count("cobatch: ready: fake") == 0


def test_no_child_survives_the_supervisor(server: Cobatch) -> None:
    pids = [started(server, name) for name in ("home", "front 0", "front 1")]
    server.process.kill()
    for pid in pids:
        gone(pid)


def test_all_are_told_to_reload(server: Cobatch) -> None:
    server.signal(signal.SIGHUP)
    for name in ("home", "front 0", "front 1"):
        server.line(f"{name} reload")
    assert server.stop() == 0


def test_replaced_children_leave_no_descriptor_behind(tmp_path: Path) -> None:
    fronts = 5
    with supervised(tmp_path, fronts + 1) as server:
        server.line("cobatch: ready: fake")
        home = started(server, "home")

        def all_linked(count: int) -> tuple[list[str], list[str]]:
            for index in range(fronts):
                server.lines(f"front {index} linked", count)
                server.lines(f"home linked {index}", count)
            return open_files(server.process.pid), open_files(home)

        before = all_linked(1)
        for turn in (2, 3):
            for index in range(fronts):
                os.kill(started(server, f"front {index}", turn - 1), signal.SIGKILL)
            after = all_linked(turn)
        assert after == before
        os.kill(home, signal.SIGKILL)
        home = started(server, "home", 2)
        assert all_linked(4) == before
        assert server.stop() == 0


def new_front() -> Child:
    child = Child("front", 0)
    child.page = slab.create("page", PAGE_BYTES)
    child._words = map_words(child.page)
    return child


@contextmanager
def front_that_takes_connections() -> Iterator[tuple[Child, Control]]:
    """Yield a front, and its end of the control socket."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child, theirs = new_front(), Control(ends[1])
    child.control = Control(ends[0])
    child.note(Reached("up"))
    yield child, theirs
    child.release()
    child.close()
    theirs.close()


@pytest.fixture
def linked_front() -> Iterator[tuple[Child, Control]]:
    with front_that_takes_connections() as ends:
        yield ends


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def client(listener: socket.socket) -> Iterator[socket.socket]:
    with socket.create_connection(listener.getsockname()) as client:
        assert select.select([listener], [], [], WAIT_S)[0]
        yield client


def was_handed(theirs: Control) -> bool:
    """Return True if a front has got a connection."""
    try:
        received = theirs.receive(msgspec.msgpack.Decoder(Connection))
    except BlockingIOError:
        return False
    assert received is not None
    for fd in received[1]:
        os.close(fd)
    return True


def test_bytes_that_come_meanwhile_count_as_unread(
    linked_front: tuple[Child, Control],
    listener: socket.socket,
    client: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child, _ = linked_front
    connection, _ = listener.accept()
    assert child.hand(connection)
    look = fcntl.ioctl

    def arrive(*arguments: object) -> object:
        monkeypatch.undo()
        client.sendall(b"GET")
        assert select.select([connection], [], [], WAIT_S)[0]
        return look(*arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(fcntl, "ioctl", arrive)
    assert list(child.take_back()) == [connection]
    connection.close()


async def test_nothing_is_accepted_while_all_fronts_refuse(
    linked_front: tuple[Child, Control], listener: socket.socket, client: socket.socket
) -> None:
    child, theirs = linked_front
    acceptor = Acceptor([listener], [child])
    child.refuses = True
    acceptor._accept(listener)
    acceptor.resume()
    assert not was_handed(theirs)
    assert not acceptor._accepts
    acceptor.resume()  # it has refused nothing meanwhile
    acceptor._accept(listener)
    assert was_handed(theirs)
    acceptor.close()


async def test_a_front_that_stands_still_gets_no_connections_while_another_runs(
    linked_front: tuple[Child, Control], listener: socket.socket
) -> None:
    still, theirs = linked_front
    with front_that_takes_connections() as (other, of_other), ExitStack() as stack:
        acceptor = Acceptor([], [still, other])

        def handed(beats: int) -> tuple[bool, bool]:
            """Hand a connection out, after heartbeats of the supervisor without one of `still`."""
            for _ in range(beats):
                assert not still.is_hung()
            stack.enter_context(socket.create_connection(listener.getsockname()))
            acceptor.hand(listener.accept()[0])
            return was_handed(theirs), was_handed(of_other)

        assert handed(STALLED_BEATS - 1) == (True, False)
        assert [handed(1) for _ in range(3)] == [(False, True)] * 3
        still._words[0] += 1
        assert handed(1) == (True, False)
        acceptor.close()


async def test_connections_that_wait_are_handed_out_before_the_end_and_none_after(
    linked_front: tuple[Child, Control], listener: socket.socket
) -> None:
    child, theirs = linked_front
    acceptor = Acceptor([], [child])
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        waiting, late = (listener.accept()[0] for _ in range(2))
        acceptor.keep(waiting)
        acceptor.close()
        assert was_handed(theirs)
        acceptor.hand(late)
        assert not was_handed(theirs)
        assert late.fileno() < 0


@pytest.mark.parametrize("lacking", [True, False])
def test_a_start_that_fails_leaves_no_descriptor_behind(
    monkeypatch: pytest.MonkeyPatch, lacking: bool
) -> None:
    if lacking:
        monkeypatch.setattr(slab, "create", lacks_descriptors)
    child = Child("home", 0)
    with (
        nothing_stays_open(),
        pytest.raises(OSError, match="open files" if lacking else "no-such-program"),
    ):
        child.start(["/no-such-program"], [1, 2])
    assert child.control is None


def test_a_first_start_that_fails_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor(Settings(models=(ModelSettings(path="fake.onnx"),)), [], [1, 2], ["/none"])
    assert asyncio.run(supervisor.run()) == 1
    assert "cannot start home: No such file or directory" in caplog.text
    os.close(supervisor._settings_fd)


@pytest.mark.parametrize("name", ["create", "for_reading"])
def test_the_server_says_at_start_that_memory_cannot_be_shared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(slab, name, lacks_descriptors)
    assert run(Settings(models=(ModelSettings(path="fake.onnx"),))) == 1
    assert "cannot share memory" in capsys.readouterr().err


def lacks_descriptors(*_: object) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class ChildWithoutDescriptors(ChildServer):
    """A child that cannot use a link."""

    def __init__(self) -> None:
        """Need no parent."""

    def add_link(self, front: int, ends: LinkEnds) -> None:
        ends.messages.close()
        ends.handover.close()
        lacks_descriptors()


def test_a_child_that_cannot_use_its_link_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)
    sockets = [socket.socket() for _ in range(2)]
    with pytest.raises(SystemExit) as ended:
        ChildWithoutDescriptors()._obey(Link(0), [one.detach() for one in sockets] + [0, 0, 0])
    assert ended.value.code == 1


async def test_a_child_ends_after_the_handshakes_of_its_last_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, gate = asyncio.Event(), asyncio.Event()

    async def shutdown(server: Server, sockets: object) -> None:
        ended.set()

    async def shake_hands() -> None:
        await gate.wait()
        assert not ended.is_set()

    monkeypatch.setattr(Server, "shutdown", shutdown)
    child = ChildWithoutDescriptors()
    child.grace_s = WAIT_S
    handshake = asyncio.create_task(shake_hands())
    child._handshakes = {handshake}
    ending = asyncio.create_task(child.shutdown())
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(ending, handshake)
    assert ended.is_set()


def test_only_children_that_end_soon_are_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    child = new_front()
    assert [child.delay_s() for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    child.note(Reached("up"))
    now_s = 0.99
    assert child.delay_s() == 5.0
    now_s = 1.0
    assert child.delay_s() == 0.0
    child.note(Reached("up"))
    assert child.delay_s() == 0.1
