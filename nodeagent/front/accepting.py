"""Accepts connections, and keeps them below the limit of file descriptors.

A quarter of the descriptors is kept for what a node needs besides clients: connections to servers, probes, the pipes of
a server that starts, files. When connections reach it, the one that has been idle the longest is closed for each new
one; while all of them serve requests, new ones wait in the kernel's queue. So idle clients, however many, neither end a
request nor shut out a new one.
"""

import logging
from typing import Protocol

import trio

from nodeagent import descriptors
from nodeagent.containment import REPEAT_S, Containment

logger = logging.getLogger(__name__)

# After an error of accept(2), which mostly means that something is short. Trying at once would use a whole CPU.
_PAUSE_S = 0.1
# How long the count of the other descriptors is used.
_COUNT_S = 1.0
# While there is no room: how often to look whether a connection is idle by now.
_LOOK_S = 0.05
# How long a new connection may take for its first request before it counts as idle.
_FIRST_REQUEST_S = 1.0


class Connections(Protocol):
    """What the acceptor needs of the server."""

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one connection, and close it."""

    def close_longest_idle(self, *, spare: int) -> None:
        """Close the connection that has been idle the longest, if one is, but not that with descriptor `spare`."""


class Acceptor:
    """Accepts the connections of all listeners.

    What changes: `_open`, how many are open, and `_closed`, which is set when the next one has closed, in `_accept` and
    `_handle`; `_others`, the descriptors that are no connections, and `_counted_at`, in `_is_full`; `_told_at`, when
    the lack of room was last logged, in `_tell`.
    """

    def __init__(self, connections: Connections, nursery: trio.Nursery) -> None:
        self._connections = connections
        self._nursery = nursery
        self._open = 0
        self._closed = trio.Event()
        self._containment = Containment("accepting connections")
        self._others = 0
        self._counted_at = -_COUNT_S
        self._told_at = -REPEAT_S

    async def accept_from(self, listener: trio.SocketListener) -> None:
        """Accept until cancelled, then close the listener. An error is logged and pauses the accepting."""
        async with listener:
            while True:
                with self._containment:
                    await self._accept(listener)
                    continue
                self._connections.close_longest_idle(spare=-1)
                await trio.sleep(_PAUSE_S)

    async def _accept(self, listener: trio.SocketListener) -> None:
        try:
            stream = await listener.accept()
        except ConnectionAbortedError:  # the client left while it waited
            return
        newest = stream.socket.fileno()
        self._open += 1
        self._nursery.start_soon(self._handle, stream, name="connection")
        # The system gives the lowest free number: below this, most are free.
        if newest >= descriptors.limit() // 2:
            await self._make_room(newest)

    async def _handle(self, stream: trio.SocketStream) -> None:
        try:
            await self._connections.handle(stream)
        finally:
            self._open -= 1
            self._closed.set()
            self._closed = trio.Event()

    async def _make_room(self, newest: int) -> None:
        """Wait until the reserve is free, and close idle connections for that."""
        spared_until = trio.current_time() + _FIRST_REQUEST_S
        while self._is_full():
            self._tell()
            closed = self._closed
            self._connections.close_longest_idle(spare=newest if trio.current_time() < spared_until else -1)
            with trio.move_on_after(_LOOK_S):
                await closed.wait()

    def _is_full(self) -> bool:
        now = trio.current_time()
        if now - self._counted_at >= _COUNT_S:
            self._counted_at = now
            self._others = descriptors.in_use() - self._open
        limit = descriptors.limit()
        return self._others + self._open > limit - limit // 4

    def _tell(self) -> None:
        now = trio.current_time()
        if now - self._told_at >= REPEAT_S:
            self._told_at = now
            logger.warning(
                "clients have taken all descriptors but the reserve (limit %d): for each new one an idle one is closed",
                descriptors.limit(),
            )
