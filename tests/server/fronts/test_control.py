"""Settings and messages on their way between the supervisor and its children."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import msgspec
import pytest

from cobatch.engines.link import slab
from cobatch.server.fronts.control import (
    FROM_CHILD,
    PAGE_BYTES,
    Connection,
    Control,
    DescriptorsLostError,
    Last,
    Leave,
    Parent,
    Reached,
    Start,
    map_words,
)
from cobatch.server.settings.load import load_settings
from tests.support.descriptors import nothing_stays_open

_TO_CHILD = msgspec.msgpack.Decoder(Start | Connection | Leave | Last)

_SETTINGS = """
[server]
processes = 3
drain_delay_s = 1.5
trusted_proxies = "10.0.0.0/8"

[[models]]
path = "a.onnx"
[[models.pad]]
input = "x"
value = 1.0
max = 8
outputs = { y = 0 }

[[models]]
path = "b.plan"
devices = [0, 1]
deadline_ms = 20

[auth]
audience = "https://a.example"
rate_limit_headers = true
[[auth.issuers]]
issuer = "https://i.example"
permissions = { staff = ["admin"] }
[[auth.tenants]]
weight = 2.5
requests_per_s = 3
"""


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_a_child_gets_all_settings(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.plan"):
        (tmp_path / name).touch()
    (tmp_path / "cobatch.toml").write_text(_SETTINGS)
    settings = load_settings(tmp_path / "cobatch.toml", {}, {})
    memory = os.memfd_create("settings")
    os.write(memory, pickle.dumps(settings))
    page = slab.create("page", PAGE_BYTES)
    ours, theirs = pair()
    supervisor = Control(ours)
    supervisor.send(Start("front", 2, 3), [memory, page])
    parent = Parent(theirs)
    assert parent.settings == settings
    assert parent.start == Start("front", 2, 3)
    seen = map_words(page)
    parent.beat(7)
    assert seen[:3].tolist() == [1, 7, 0]
    parent.beat(8)
    assert seen[:3].tolist() == [2, 8, 0]
    parent.send(Reached("up"))
    assert supervisor.receive(FROM_CHILD) == (Reached("up"), [])
    parent.close()
    assert supervisor.receive(FROM_CHILD) is None
    assert not supervisor.send(Last())
    supervisor.close()
    for fd in (memory, page):
        os.close(fd)


def test_messages_wait_in_order_for_a_child_that_does_not_receive() -> None:
    ours, theirs = pair()
    with theirs, Path(os.devnull).open("rb") as file:
        supervisor, child = Control(ours), Control(theirs)
        sent = 0
        while not supervisor.backlogged:
            supervisor.send(Connection(sent), [file.fileno()])
            sent += 1
        supervisor.send(Leave(1.0, at_once=True))
        supervisor.send(Last())
        connections, rest = 0, list[object]()
        while len(rest) < 2:
            try:
                received = child.receive(_TO_CHILD)
            except BlockingIOError:
                supervisor.flush()
                continue
            assert received is not None
            message, fds = received
            if isinstance(message, Connection):
                connections += 1
                os.close(fds[0])
            else:
                rest.append(message)
        assert connections == sent
        assert rest == [Leave(1.0, at_once=True), Last()]
        assert not supervisor.backlogged
        supervisor.close()


def test_lost_descriptors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the process may open no more files."""
    ours, theirs = pair()
    with ours, theirs, Path(os.devnull).open("rb") as file:
        Control(ours).send(Connection(7), [file.fileno()] * 2)
        monkeypatch.setattr("cobatch.server.fronts.control._MOST_FDS", 1)
        with nothing_stays_open(), pytest.raises(DescriptorsLostError) as lost:
            Control(theirs).receive(_TO_CHILD)
        assert lost.value.message == Connection(7)
