"""Our server on a port of its own, and a client that speaks to it in bytes."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from nodeagent.front.server import ASGIApp, bind, serve


@dataclass(frozen=True, slots=True)
class Served:
    """A running server. `ended` is set when `serve` has returned."""

    port: int
    shutdown: trio.Event
    ended: trio.Event
    scope: trio.CancelScope

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def connect(self) -> "Peer":
        return Peer(await trio.open_tcp_stream("127.0.0.1", self.port))

    async def ask(self, request: bytes) -> bytes:
        """Send on a connection of its own; return all that comes until the server closes it."""
        async with await self.connect() as peer:
            await peer.send(request)
            return await peer.rest()


async def start_serving(
    nursery: trio.Nursery, app: ASGIApp, *, listeners: list[trio.SocketListener] | None = None, **options: Any
) -> Served:
    """Serve `app` in the nursery, on the loopback address unless other listeners are given."""
    if listeners is None:
        listeners, _ = await bind("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]
    served = Served(port, trio.Event(), trio.Event(), trio.CancelScope())

    async def run(task_status: trio.TaskStatus[None]) -> None:
        with served.scope:
            await serve(app, listeners, shutdown=served.shutdown, task_status=task_status, **options)
        served.ended.set()

    await nursery.start(partial(run))
    return served


class Peer:
    """One connection of a client."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def __aenter__(self) -> "Peer":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stream.aclose()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def until(self, end: bytes) -> bytes:
        """Read up to and with `end`."""
        while end not in self._buffer:
            data = await self.stream.receive_some()
            assert data, f"closed after {self._buffer!r}"
            self._buffer += data
        found, _, self._buffer = self._buffer.partition(end)
        return found + end

    async def rest(self) -> bytes:
        """Read until the server closes; raises trio.BrokenResourceError where it resets."""
        while data := await self.stream.receive_some():
            self._buffer += data
        found, self._buffer = self._buffer, b""
        return found
