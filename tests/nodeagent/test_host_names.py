"""The names of this host."""

import socket
import threading

import pytest
import trio

from nodeagent import host_names


def test_the_hosts_name_and_those_of_the_nodes_urls_are_known_without_a_lookup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Box.lan")
    names = host_names.known("http://models.example:8081", "http://127.0.0.1:8081")
    assert names == {"box.lan", "box", "box.local", "models.example", "127.0.0.1"}


@pytest.mark.real
async def test_a_resolver_that_fails_or_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise UnicodeError("label too long")

    monkeypatch.setattr(socket, "getfqdn", fails)
    assert await host_names.full_name() == ""
    over = threading.Event()
    monkeypatch.setattr(socket, "getfqdn", over.wait)
    monkeypatch.setattr(host_names, "_LOOKUP_TIMEOUT_S", 0.05)
    with trio.fail_after(10):
        assert await host_names.full_name() == ""
    over.set()


@pytest.mark.real
async def test_the_full_name_is_that_of_the_resolver() -> None:
    assert await host_names.full_name() == socket.getfqdn().lower()
