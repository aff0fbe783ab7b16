"""One request that is served on its connection itself: what came of it, and how it is answered.

The fast road. An ordinary request goes through hypercorn's stream and Quart; that costs more than everything else that
is done for a request for inference.

    connection ──body, end_of_body──> Exchange ──receive──> its handler ──start, write──> connection
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
import trio

from nodeagent.front.half_close import HalfClose
from nodeagent.front.protocol import RequestHead
from nodeagent.front.response import Headers, ResponseWriter

logger = logging.getLogger(__name__)


class AbortResponse(Exception):
    """Raised in mid-answer: end the connection so that the client sees a truncated answer."""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A connection's client and its own address, as ASGI has them, and the client's address for logs."""

    client: tuple[str, int] | None
    server: tuple[str, int] | None
    name: str


class Line(Protocol):
    """What an exchange needs of its connection, or of its stream of HTTP/2."""

    peer: Peer
    half_closed: trio.Event

    @property
    def draining(self) -> bool:
        """Whether the connection is to end after this response."""

    async def write(self, data: bytes) -> None:
        """Write what the response has returned, all of it, or end the connection (of HTTP/2: the stream)."""

    def on_half_close(self, policy: HalfClose) -> None:
        """Set how long the request goes on after the end of the client's input."""


class Exchange:
    """A request, and the response to it.

    What changes: the body, in `body` and `end_of_body` (called by the connection), `whole_body` and `receive`; the
    response in `start` and `write` (called by the handler).
    """

    def __init__(
        self, head: RequestHead, path: bytes, handler: "Handler", line: Line, response: ResponseWriter
    ) -> None:
        self.request = head
        self.path = path
        self.handler = handler
        self.line = line
        self.response = response
        self._pieces: list[bytes] = []
        self._body_ended = False
        self._more: trio.Event | None = None

    # What the connection calls.

    def body(self, piece: bytes) -> None:
        """A part of the body has arrived."""
        self._pieces.append(piece)
        if self._more is not None:
            self._more.set()

    def end_of_body(self) -> None:
        """All of the body has arrived."""
        self._body_ended = True
        if self._more is not None:
            self._more.set()

    async def serve(self) -> None:
        """Run the handler. An answer that is incomplete after that must not look complete to the client."""
        try:
            await self.handler(self)
        except* AbortResponse as group:
            logger.debug("%s: answer aborted: %s", self.line.peer.name, group.exceptions)
        except* Exception:
            logger.exception("%s: %s %r failed", self.line.peer.name, self.request.method, self.request.target)

    # What the handler calls.

    def whole_body(self) -> bytes | None:
        """The body if all of it has arrived, as that of most requests has by the time that they are served."""
        if not self._body_ended:
            return None
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def receive(self) -> dict[str, Any]:
        """What has arrived of the body, as an ASGI message; waits for something new."""
        if not self._pieces and not self._body_ended:
            self._more = trio.Event()
            if self.request.expects_continue and not self.response.started:
                await self.line.write(self.response.proceed())
            await self._more.wait()
            self._more = None
        pieces, self._pieces = self._pieces, []
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return {"type": "http.request", "body": data, "more_body": not self._body_ended}

    async def start(self, status: int, headers: Headers, body: bytes = b"", *, more: bool) -> None:
        """Write the head, and the first or all bytes of the body with it."""
        head = self.response.head(status, headers, close=self.line.draining)
        await self.line.write(head + self._framed(body, more=more))

    async def write(self, body: bytes, *, more: bool) -> None:
        """Write the next bytes of the body; without `more` they are its last."""
        await self.line.write(self._framed(body, more=more))

    def _framed(self, body: bytes, *, more: bool) -> bytes:
        framed = self.response.body(body)
        return framed if more else framed + self.response.end()


ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

Handler = Callable[[Exchange], Awaitable[None]]

FindHandler = Callable[[str, bytes], Handler | None]
"""The handler for a method and a path (without the query), None if the request is an ordinary one."""
