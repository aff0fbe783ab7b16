"""Real sockets of real processes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import Mock

import psutil
import pytest
import trio

from supervisor.listening import _listeners_by_psutil, listeners_of

LISTEN = """
import socket, sys, time
held = [socket.create_server((host, 0)) for host in sys.argv[1:]]
print(*(one.getsockname()[1] for one in held), flush=True)
time.sleep(60)
"""


@contextmanager
def listening(*hosts: str) -> Iterator[tuple[int, list[int]]]:
    """A process that listens at these addresses: its pid and its ports."""
    argv = [sys.executable, "-S", "-c", LISTEN, *hosts]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.pid, [int(port) for port in process.stdout.readline().split()]
        finally:
            process.kill()


def kill_without_reaping(pid: int) -> None:
    os.kill(pid, 9)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def found(*pids: int) -> list[str]:
    with trio.fail_after(5):
        return [str(listener) for listener in await listeners_of(pids)]


async def test_each_process_has_its_own_listeners_the_lowest_port_first() -> None:
    with listening("127.0.0.1", "127.0.0.1") as (pid, ports), listening("0.0.0.0") as (other, [wildcard]):
        assert await found(pid) == [f"127.0.0.1:{port}" for port in sorted(ports)]
        assert await found(other) == [f"0.0.0.0:{wildcard}"]
        assert len(await found(pid, other)) == 3
        assert await found() == []


async def test_a_process_that_has_ended_listens_nowhere() -> None:
    with listening("127.0.0.1") as (pid, _ports):
        kill_without_reaping(pid)
        assert await found(pid) == []  # a zombie
    assert await found(pid) == []


async def test_connections_are_no_listeners() -> None:
    with listening("127.0.0.1") as (pid, [port]), socket.create_connection(("127.0.0.1", port)):
        assert await found(os.getpid()) == []
        assert await found(pid) == [f"127.0.0.1:{port}"]


REFUSED = """
import os, sys, trio
from supervisor.listening import _listeners_by_psutil, listeners_of
if os.getuid() == 0:
    os.setuid(65534)
try:
    trio.run(listeners_of, [int(sys.argv[1])])
except PermissionError as error:
    print("refused", error.filename)
"""


def test_a_process_that_does_not_let_us_look_is_a_permission_error() -> None:
    """Without rights, a look at a process of root's."""
    pid = os.getpid() if os.getuid() == 0 else 1
    ran = subprocess.run([sys.executable, "-c", REFUSED, str(pid)], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == f"refused /proc/{pid}/fd", ran.stderr


async def test_looking_takes_little_time_beside_many_connections() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        held = [stack.enter_context(socket.create_connection(server.getsockname())) for _ in range(300)]
        assert len(held) == 300
        began = time.perf_counter()
        for _ in range(20):
            assert await found(os.getpid()) == [f"127.0.0.1:{server.getsockname()[1]}"]
        assert (time.perf_counter() - began) / 20 < 0.05


def test_psutil_sees_the_same_where_there_is_no_proc() -> None:
    with listening("127.0.0.1") as (pid, [port]):
        assert [str(listener) for listener in _listeners_by_psutil(pid)] == [f"127.0.0.1:{port}"]
    assert _listeners_by_psutil(pid) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "Process", Mock(side_effect=psutil.AccessDenied(pid)))
        with pytest.raises(PermissionError, match=f"the sockets of process {pid} can't be seen"):
            _listeners_by_psutil(pid)
