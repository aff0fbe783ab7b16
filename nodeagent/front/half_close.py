"""What becomes of a request whose client has closed its sending side.

Most clients that leave close their whole socket, and some (`nc -N`, monitoring plug-ins) close the sending side only
and wait for the answer. Both look the same, an end of input, until the server writes: only a client that has left
answers the write with a reset. So each request has a policy for how long it goes on after the end of input. A reset
ends it at once, whatever its policy.
"""

import select
import sys
from enum import StrEnum

import trio


class HalfClose(StrEnum):
    """How long a request goes on after the end of its client's input."""

    FINISH = "finish"
    """For 5 s: it needs no server, and its answer is cheap."""
    GRACE = "grace"
    """For 0.5 s: a quick answer reaches a client that stays, and little is generated for one that has left."""
    STREAM = "stream"
    """For 0.5 s; once something has been written after the end of input, until the client resets the connection."""

    @property
    def bound_s(self) -> float:
        return 5.0 if self is HalfClose.FINISH else 0.5


if sys.platform == "linux":

    async def input_ended(sock: trio.socket.SocketType) -> None:
        """Return when the client has closed its sending side, even if bytes from it are still unread."""
        await _event(sock, select.EPOLLRDHUP)

    async def connection_reset(sock: trio.socket.SocketType) -> None:
        """Return when the connection is gone in both directions."""
        await _event(sock, 0)  # EPOLLERR and EPOLLHUP are always reported

    async def _event(sock: trio.socket.SocketType, event: int) -> None:
        """Wait for this event alone: an epoll for it becomes readable itself then, and trio can wait for that."""
        if sock.fileno() == -1:  # an incomplete write has just closed it
            return
        with select.epoll() as epoll:
            epoll.register(sock.fileno(), event)
            await trio.lowlevel.wait_readable(epoll.fileno())
else:

    async def input_ended(sock: trio.socket.SocketType) -> None:
        """Never return: without epoll, the end can't be seen behind unread bytes."""
        await trio.sleep_forever()

    async def connection_reset(sock: trio.socket.SocketType) -> None:
        """Never return: without epoll, only the next write shows a reset."""
        await trio.sleep_forever()
