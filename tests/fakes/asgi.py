"""ASGI without Quart: one request as messages, and applications that behave in one way each."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from nodeagent.front.asgi import Front
from nodeagent.front.half_close import HalfClose
from nodeagent.front.server import ASGIApp

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Exchange:
    """One request and its response as ASGI messages, without a server. `receive` returns what was fed, then blocks."""

    def __init__(
        self, *headers: tuple[bytes, bytes], kind: str = "http", method: str = "POST", path: str = "/"
    ) -> None:
        self.scope: dict[str, Any] = {
            "type": kind,
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "headers": list(headers),
            "scheme": "http",
            "http_version": "1.1",
            "query_string": b"",
            "root_path": "",
            "client": ("127.0.0.1", 1),
            "extensions": {},
        }
        self.sent: list[dict[str, Any]] = []
        self.feed, self._from_client = trio.open_memory_channel[dict[str, Any]](100)

    async def receive(self) -> dict[str, Any]:
        return await self._from_client.receive()

    async def send(self, message: Any) -> None:
        self.sent.append(dict(message))

    def body(self, data: bytes, *, more: bool = True) -> None:
        self.feed.send_nowait({"type": "http.request", "body": data, "more_body": more})

    async def through(self, app: ASGIApp, **options: Any) -> None:
        await Front(app, **{"max_request_bytes": 2**30, **options})(self.scope, self.receive, self.send)

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def content(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))
        return found

    def error(self) -> tuple[int, str]:
        return self.sent[0]["status"], self.content["error"]["code"]


async def hello(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers without reading the body."""
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello", "more_body": False})


async def read_all(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Reads the body, then sends an empty answer."""
    while (await receive())["more_body"]:
        continue
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Held:
    """Streams its first bytes, and ends when the test sets `finish` or its client disconnects (`left`)."""

    def __init__(self, policy: HalfClose = HalfClose.GRACE) -> None:
        self.policy = policy
        self.finish = trio.Event()
        self.left = trio.Event()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        scope["nodeagent.on_half_close"](self.policy)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._notice_leaving, receive, nursery.cancel_scope)
            await self.finish.wait()
            await send({"type": "http.response.body", "body": b"last", "more_body": False})
            nursery.cancel_scope.cancel()

    async def _notice_leaving(self, receive: Receive, scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        self.left.set()
        scope.cancel()


class Torrent:
    """Writes as fast as its client reads, without end."""

    def __init__(self) -> None:
        self.written_bytes = 0
        self.ended = trio.Event()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, send)
                while (await receive())["type"] != "http.disconnect":
                    continue
                nursery.cancel_scope.cancel()
        finally:
            self.ended.set()

    async def _write(self, send: Send) -> None:
        while True:
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
            self.written_bytes += 2**20
