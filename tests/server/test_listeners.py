"""Listening sockets of names with several addresses, and of names and addresses that cannot be used."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from cobatch.server.listeners import CannotListenError, listen


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[int, str]) -> None:
    """Let every name have these addresses."""

    def getaddrinfo(_host: str, port: int, **_: object) -> list[Any]:
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("lacking", [(socket.AF_INET, "192.0.2.1"), (12345, "127.0.0.1")])
def test_an_address_that_this_system_lacks_is_left_out(
    lacking: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, lacking, (socket.AF_INET, "127.0.0.1"))
    (listener,) = listen("localhost", 0)
    with listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_name_without_an_address_that_this_system_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, (socket.AF_INET, "192.0.2.1"))
    with pytest.raises(
        CannotListenError, match=r"^cannot listen on far, port 0: Cannot assign requested addr"
    ):
        listen("far", 0)


def test_a_port_that_is_taken_is_refused_whatever_other_addresses_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        resolve_to(monkeypatch, (socket.AF_INET, "127.0.0.2"), (socket.AF_INET, "127.0.0.1"))
        with pytest.raises(CannotListenError, match="Address already in use"):
            listen("localhost", taken.getsockname()[1])


@pytest.mark.parametrize("name", ["a..b", "x" * 64 + ".test"])
def test_a_text_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(CannotListenError, match="it is not a name"):
        listen(name, 0)
