"""Accepting connections, with a listener that fails and a scarcity of descriptors, in virtual time."""

import errno
import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from nodeagent import descriptors
from nodeagent.front.accepting import Acceptor

LIMIT, OTHERS = 12, 4  # a reserve of 3 leaves 5 for connections


class Listener:
    """Gives what the test puts: a descriptor's number, or an error."""

    def __init__(self) -> None:
        self.put, self._get = trio.open_memory_channel[int | OSError](100)

    async def __aenter__(self) -> "Listener":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        return None

    async def accept(self) -> Any:
        item = await self._get.receive()
        if isinstance(item, OSError):
            raise item
        return SimpleNamespace(socket=SimpleNamespace(fileno=lambda: item))


class Connections:
    """Counts what is accepted. `idle` are the descriptors of those that may be closed, the longest idle one first."""

    def __init__(self) -> None:
        self.accepted: list[int] = []
        self.idle: list[int] = []
        self.gone: list[int] = []
        self._ends: dict[int, trio.Event] = {}

    async def handle(self, stream: Any) -> None:
        number = stream.socket.fileno()
        self.accepted.append(number)
        self._ends[number] = trio.Event()
        await self._ends[number].wait()

    def close_longest_idle(self, *, spare: int) -> None:
        for number in self.idle:
            if number != spare:
                self.idle.remove(number)
                self.close(number)
                return

    def close(self, number: int) -> None:
        self.gone.append(number)
        self._ends[number].set()


class Accepting:
    def __init__(self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connections = Connections()
        self.listener = Listener()
        monkeypatch.setattr(descriptors, "limit", lambda: LIMIT)
        acceptor = Acceptor(self.connections, nursery)
        monkeypatch.setattr(descriptors, "in_use", lambda: OTHERS + acceptor._open)
        nursery.start_soon(acceptor.accept_from, cast(trio.SocketListener, self.listener))

    async def comes(self, *items: int | OSError) -> None:
        for item in items:
            self.listener.put.send_nowait(item)
        await wait_all_tasks_blocked()


@pytest.fixture
async def this(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Accepting:
    return Accepting(nursery, monkeypatch)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN])
async def test_a_shortage_pauses_the_accepting_and_is_told_once_as_what_it_is(
    code: int, this: Accepting, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await this.comes(*[OSError(code, "short")] * 5, 3)
    assert this.connections.accepted == []
    await trio.sleep(0.6)
    assert this.connections.accepted == [3]
    (record,) = caplog.records
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)
    assert record.getMessage().endswith("while accepting connections")


async def test_a_shortage_closes_an_idle_connection(this: Accepting, autojump_clock: MockClock) -> None:
    await this.comes(4, 5)
    this.connections.idle = [4, 5]
    await this.comes(OSError(errno.EMFILE, "short"))
    assert this.connections.gone == [4]


async def test_a_client_that_left_while_it_waited_is_nothing(
    this: Accepting, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await this.comes(ConnectionAbortedError(errno.ECONNABORTED, "left"), 3)
    assert this.connections.accepted == [3]
    assert caplog.records == []


async def test_each_connection_in_the_reserve_closes_the_one_that_was_idle_the_longest(
    this: Accepting, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    this.connections.idle = [4, 5, 6]
    await this.comes(4, 5, 6, 7, 8)
    assert this.connections.gone == []
    await this.comes(9)
    assert this.connections.gone == [4]
    await this.comes(1)  # so low a number says nothing: the next one is counted with it
    assert this.connections.gone == [4]
    await this.comes(10)
    assert this.connections.gone == [4, 5, 6]
    assert len(caplog.messages) == 1


async def test_accepting_waits_while_all_connections_serve_requests(this: Accepting, autojump_clock: MockClock) -> None:
    await this.comes(4, 5, 6, 7, 8, 9, 10)
    await trio.sleep(100)
    assert this.connections.accepted == [4, 5, 6, 7, 8, 9]
    this.connections.close(5)
    await wait_all_tasks_blocked()
    assert this.connections.accepted == [4, 5, 6, 7, 8, 9, 10]
    await this.comes(11)
    this.connections.idle = [6]  # it has ended its request
    await trio.sleep(0.1)
    assert this.connections.gone == [5, 6]
    assert this.connections.accepted[-1] == 11


async def test_a_new_connection_has_a_second_for_its_first_request(this: Accepting, autojump_clock: MockClock) -> None:
    this.connections.idle = [9]
    await this.comes(4, 5, 6, 7, 8, 9)
    await trio.sleep(0.9)
    assert this.connections.gone == []
    await trio.sleep(0.2)
    assert this.connections.gone == [9]
