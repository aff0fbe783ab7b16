"""One request that the ASGI application answers, by hypercorn's stream.

hypercorn's `HTTPStream` speaks ASGI with the application; here are the task in which that runs, and the bytes of its
response. This module and all of hypercorn are imported with the first ordinary request: see `ordinary_road.py`.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, cast

import trio
from hypercorn.config import Config
from hypercorn.protocol.events import Body, EndBody, Event, Request, Response, StreamClosed
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup

from nodeagent.front.exchange import AbortResponse, ASGIApp, Line
from nodeagent.front.protocol import RequestHead
from nodeagent.front.response import ResponseWriter

logger = logging.getLogger(__name__)

_STREAM_ID = 1


class OrdinaryLine(Line, Protocol):
    """What an ordinary request needs of its connection besides."""

    secure: bool

    def answered(self, request: "OrdinaryRequest") -> None:
        """The answer is over, complete or not."""


class OrdinaryRequest:
    """A request that the ASGI application answers, in a task of its own."""

    def __init__(
        self,
        head: RequestHead,
        line: OrdinaryLine,
        response: ResponseWriter,
        nursery: trio.Nursery,
        app: ASGIApp,
        config: Config,
    ) -> None:
        self._closed = False
        self.response = response
        self._head = head
        self._line = line
        self._nursery = nursery
        self._stream = HTTPStream(
            cast(AppWrapper, app),
            config,
            WorkerContext(max_requests=None),
            cast(TaskGroup, self),
            line.secure,
            line.peer.client,
            line.peer.server,
            self._write,
            _STREAM_ID,
        )

    async def begin(self) -> None:
        """Start the application."""
        head = self._head
        if head.expects_continue:
            await self._line.write(self.response.proceed())
        await self._stream.handle(
            Request(
                stream_id=_STREAM_ID,
                headers=head.headers,
                http_version=head.http_version,
                method=head.method,
                raw_path=head.target,
                state=ConnectionState({}),
            )
        )

    async def body(self, piece: bytes) -> None:
        """Give the application a part of the body; waits while it has enough of it."""
        await self._stream.handle(Body(stream_id=_STREAM_ID, data=piece))

    async def end_of_body(self) -> None:
        """Tell the application that it has all of the body."""
        await self._stream.handle(EndBody(stream_id=_STREAM_ID))

    async def close(self) -> None:
        """Tell the application that its client has left, if it has not answered yet. Nothing more is written."""
        self._closed = True
        await self._stream.handle(StreamClosed(stream_id=_STREAM_ID))

    async def _write(self, event: Event) -> None:
        # An application may write without ever waiting, also after its client has left.
        await trio.lowlevel.checkpoint()
        if self._closed:
            return
        match event:
            case Response():
                close = self._line.draining
                await self._line.write(self.response.head(event.status_code, event.headers, close=close))
            case Body():
                await self._line.write(self.response.body(event.data))
            case EndBody():
                await self._line.write(self.response.end())
            case StreamClosed():
                await self.close()
                self._line.answered(self)

    async def spawn_app(
        self, app: Any, config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Any], Awaitable[None]]:
        """Start the application for a request; return what sends it ASGI events (as hypercorn's TaskGroup)."""
        to_app, from_client = trio.open_memory_channel[Any](config.max_app_queue_size)
        peer = self._line.peer.name

        async def put(event: Any) -> None:
            if event["type"] == "http.disconnect":
                # Not through the queue, which may be full: an application that answers without reading the body would
                # wait here for its own reading, and the connection would never end.
                to_app.close()
                return
            try:
                await to_app.send(event)
            except trio.ClosedResourceError:
                logger.debug("%s: discarding the rest of a body, its request has ended", peer)

        async def receive() -> Any:
            try:
                return await from_client.receive()
            except trio.EndOfChannel:
                return {"type": "http.disconnect"}

        scope["nodeagent.on_half_close"] = self._line.on_half_close
        scope["nodeagent.half_closed"] = self._line.half_closed
        name = f"{scope['method']} {scope['path']} {peer}"
        self._nursery.start_soon(self._run_app, app, scope, receive, send, name=name)
        return put

    async def _run_app(
        self, app: Any, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        peer = self._line.peer.name
        try:
            await app(scope, receive, send)
        except* AbortResponse as group:
            logger.debug("%s: answer aborted: %s", peer, group.exceptions)
        except* Exception:
            logger.exception("%s: the application failed on %s %s", peer, scope["method"], scope["path"])
        # An answer that is incomplete by now ends with the connection, without its last chunk.
        await send(None)


def settings() -> Config:
    """hypercorn's configuration."""
    return _hypercorn_config(
        accesslog=None,
        # hypercorn uses a given logger as it is. Otherwise it would add a handler of its own on stderr.
        errorlog=logging.getLogger("hypercorn.error"),
        include_server_header=False,
    )


def _hypercorn_config(**settings: object) -> Config:
    """Make hypercorn's configuration. hypercorn accepts misspelt settings silently, so check each name."""
    config = Config()
    for name, value in settings.items():
        if not hasattr(config, name):
            raise AttributeError(f"hypercorn has no setting {name!r}")
        setattr(config, name, value)
    return config
