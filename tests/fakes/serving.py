"""Our server on a port of its own, and a client that sends it bytes."""

from dataclasses import dataclass
from typing import Any

import trio
from quart_trio import QuartTrio

import nodeagent.front.ordinary  # noqa: F401 (so that no request waits for this import)
from nodeagent.front.server import ASGIApp, bind, serve

GET = b"GET / HTTP/1.1\r\nHost: node\r\n\r\n"
GET_AND_CLOSE = b"GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"


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
        """Send on a new connection; return everything that arrives until the server closes it."""
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

    await nursery.start(run, name="serve")
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
        """Read until the server closes; raises trio.BrokenResourceError if it resets."""
        while data := await self.stream.receive_some():
            self._buffer += data
        found, self._buffer = self._buffer, b""
        return found


def quart_app() -> QuartTrio:
    """Answers `GET /` with "hello"."""
    app = QuartTrio(__name__, static_folder=None)
    app.config["RESPONSE_TIMEOUT"] = None

    @app.get("/")
    async def index() -> str:
        return "hello"

    return app


async def assert_serves(served: Served) -> None:
    answer = await served.ask(GET_AND_CLOSE)
    assert answer.startswith(b"HTTP/1.1 200")
