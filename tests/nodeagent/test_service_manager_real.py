"""What a service manager is told, at real sockets of the kinds that systemd gives."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nodeagent.service_manager import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket as systemd has it, and what is in NOTIFY_SOCKET."""
    name = f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name if request.param == "path" else f"\0{name}")
        sock.settimeout(5)
        yield sock, name if request.param == "path" else f"@{name}"


def received(sock: socket.socket) -> list[str]:
    sock.setblocking(False)
    messages = []
    while True:
        try:
            messages.append(sock.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_it_is_told_of_start_reload_and_stop(listener: tuple[socket.socket, str]) -> None:
    sock, address = listener
    before = time.monotonic_ns() // 1000
    with closing(ServiceManager({"NOTIFY_SOCKET": address})) as manager:
        with manager.reloading():  # not up yet
            pass
        manager.ready()
        manager.status("ready:\n2 requests")
        manager.status("ready:\n2 requests")
        with manager.reloading():
            pass
        manager.feed_watchdog()
        manager.extend(1.5)
        manager.stopping()
        with manager.reloading():
            pass
    ready, status, reloading, *rest = received(sock)
    assert (ready, status) == ("READY=1", "STATUS=ready: 2 requests")
    first, second = reloading.split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert rest == ["READY=1", "WATCHDOG=1", "EXTEND_TIMEOUT_USEC=1500000", "STOPPING=1"]


def test_the_variables_are_taken_out_of_the_environment(listener: tuple[socket.socket, str]) -> None:
    _sock, address = listener
    variables = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid()), "A": "b"}
    with closing(ServiceManager(variables)) as manager:
        assert manager.watchdog_s == 30
    assert variables == {"A": "b"}


@pytest.mark.parametrize(
    "variables",
    [
        {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": ""},
        {},
    ],
)
def test_no_watchdog_waits_for_a_process_that_it_does_not_name(
    listener: tuple[socket.socket, str], variables: dict[str, str]
) -> None:
    _sock, address = listener
    with closing(ServiceManager({"NOTIFY_SOCKET": address, **variables})) as manager:
        assert manager.watchdog_s is None


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative/notify"])
def test_without_an_address_of_a_unix_socket_nobody_is_told(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with closing(ServiceManager({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})) as manager:
        assert manager.watchdog_s is None
        manager.ready()
        manager.flush()
    assert [repr(address) in message for message in caplog.messages] == ([True] if address else [])


def test_a_service_manager_that_is_gone_is_named_once_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")})) as manager:
        manager.ready()
        manager.feed_watchdog()
    [message] = caplog.messages
    assert "NOTIFY_SOCKET" in message
    assert "No such file" in message


def test_what_a_full_queue_does_not_take_is_sent_later_in_order(listener: tuple[socket.socket, str]) -> None:
    sock, address = listener
    with closing(ServiceManager({"NOTIFY_SOCKET": address})) as manager:
        for number in range(30):  # more than the kernel's queue takes
            manager.status(str(number))
        got = received(sock)
        assert len(got) < 30
        until = time.monotonic() + 5
        while len(got) < 30 and time.monotonic() < until:
            manager.flush()
            got += received(sock)
    assert got == [f"STATUS={number}" for number in range(30)]
