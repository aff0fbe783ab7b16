"""When idle connections are closed, in virtual time and without sockets."""

from collections.abc import Iterable
from typing import cast

import trio
from trio.testing import MockClock

from nodeagent.front.connection import Connection
from nodeagent.front.server import OpenConnections, serve

NEVER = float("inf")


class Idle:
    """A connection that is idle until then."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.looks = 0
        self.ended_at = NEVER

    @property
    def idle_until(self) -> float:
        self.looks += 1
        return self.until if self.ended_at == NEVER else NEVER

    def end_if_idle(self) -> None:
        self.ended_at = min(self.ended_at, trio.current_time())


async def serve_for(seconds: float, connections: Iterable[Idle], keep_alive_timeout_s: float) -> None:
    """Run a server without listeners that has these connections."""
    current = OpenConnections()
    current.current = cast("set[Connection]", set(connections))
    with trio.move_on_after(seconds):
        await serve(no_app, [], shutdown=trio.Event(), keep_alive_timeout_s=keep_alive_timeout_s, connections=current)


async def no_app(_scope: object, _receive: object, _send: object) -> None:
    raise AssertionError("there are no requests")


async def test_idle_connections_end_in_the_second_after_their_timeout(autojump_clock: MockClock) -> None:
    began_at = trio.current_time()
    connections = [Idle(began_at + number / 100) for number in range(7500)]
    await serve_for(200, connections, 75)
    assert all(0 <= connection.ended_at - connection.until <= 1.001 for connection in connections)
    assert connections[-1].looks <= 80, "a look at each connection for each that ends takes the whole CPU"


async def test_a_connection_with_a_short_timeout_ends_soon_after_it(autojump_clock: MockClock) -> None:
    connection = Idle(trio.current_time() + 0.3)
    await serve_for(2, [connection], 0.3)
    assert 0 <= connection.ended_at - connection.until <= 0.031


async def test_nothing_is_looked_at_before_the_first_timeout(autojump_clock: MockClock) -> None:
    connection = Idle(trio.current_time() + 75)
    await serve_for(74, [connection], 75)
    assert (connection.looks, connection.ended_at) == (1, NEVER)
