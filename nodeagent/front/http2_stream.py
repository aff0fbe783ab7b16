"""One stream of HTTP/2: a request, the task that serves it, and how its answer goes out as the client makes room.

Either road of `http1.py` leads on from here. The end of the client's stream is only that of the request's body: a
client that leaves resets the stream, or loses the connection.
"""

import logging
from typing import TYPE_CHECKING, Any, Final

import trio
from h2.errors import ErrorCodes

from nodeagent.front.exchange import Exchange, Handler
from nodeagent.front.half_close import HalfClose
from nodeagent.front.http2_head import MalformedRequest, content_length
from nodeagent.front.http2_response import Http2Response
from nodeagent.front.protocol import RequestHead
from nodeagent.front.transport import SEND_BYTES

if TYPE_CHECKING:
    from nodeagent.front.http2 import Http2
    from nodeagent.front.ordinary import OrdinaryRequest

logger = logging.getLogger(__name__)

# Of one answer at a time, so that those of other streams are not held up.
_FRAME_BYTES: Final = 2**14
# How long a client may go on with a body that nobody reads, until its stream is reset. Before that it has the answer.
_LINGER_S: Final = 2.0


class Http2Stream:
    """A request and its answer.

    `gone` is whether nothing more may be sent: the client has left, or the stream was reset. What changes: that, in
    `leave`; `_head_sent`, `_told` (that the body may come) and `_finished` (the end was sent), in `_send`;
    `_body_ended`, in `end_of_body`; `_received_bytes`, and `_unread_bytes` (of the windows), in `body` and `read`;
    `_scope`, in `run`.
    """

    draining = False  # the connection says goodbye, not its responses
    secure = True

    def __init__(self, connection: "Http2", number: int, head: RequestHead, handler: Handler | None) -> None:
        self.number = number
        self.peer = connection.peer
        self.half_closed = trio.Event()  # never set
        self.gone = False
        self.response = Http2Response(head)
        self._connection = connection
        self._handler = handler
        path = head.target.partition(b"?")[0]
        self._exchange = _Exchange(head, path, handler or self._pass_on, self, self.response)
        self._scope = trio.CancelScope()
        self._head_sent = False
        self._told = False
        self._finished = False
        self._body_ended = trio.Event()
        self._dropping = False
        self._declared_bytes = content_length(head.headers)
        self._received_bytes = 0
        self._unread_bytes = 0
        self._opened = trio.Event()  # for which the writing waits

    async def run(self) -> None:
        """Serve the request."""
        try:
            if self.gone:
                return
            if self._handler is None:
                await self._exchange.serve()  # which ends its application in its own time
            else:
                with self._scope:
                    await self._exchange.serve()
            if self._finished and not self._body_ended.is_set() and not self.gone:
                self._drop_body()
                with trio.move_on_after(_LINGER_S) as self._scope:
                    await self._body_ended.wait()
        finally:
            self._end()

    def _end(self) -> None:
        if not self._finished:
            self._connection.reset(self, ErrorCodes.INTERNAL_ERROR)
        elif not self._body_ended.is_set():
            self._connection.reset(self, ErrorCodes.NO_ERROR)
        self._drop_body()
        self._connection.stream_over(self)
        # Each refers to the other: what has arrived would stay until the garbage collector finds both.
        del self._exchange

    # What the connection calls.

    def body(self, data: bytes, window_bytes: int) -> None:
        """A part of the body has arrived, and has taken so much of the windows."""
        self._received_bytes += len(data)
        if self._dropping or self.gone or not data:
            self._connection.give_window(self, window_bytes)
            return
        self._unread_bytes += window_bytes
        self._exchange.body(data)

    def check_length(self) -> None:
        """All of the body has arrived: raises MalformedRequest if more was announced. (Of more, h2 complains.)"""
        if self._declared_bytes not in (None, self._received_bytes):
            raise MalformedRequest("the body is shorter than its Content-Length")

    def end_of_body(self) -> None:
        """All of the body has arrived."""
        self._body_ended.set()
        if not self.gone:
            self._exchange.end_of_body()

    def window_opened(self) -> None:
        """There may be room to send more."""
        self._opened.set()

    def leave(self) -> None:
        """The client has left, or the stream was reset: end the request."""
        self.gone = True
        self._opened.set()
        self._scope.cancel()

    # What the request calls.

    def on_half_close(self, policy: HalfClose) -> None:
        """Nothing: a stream that has ended may go on to be answered."""

    def answered(self, request: "OrdinaryRequest") -> None:
        """The application has answered, completely or not."""
        self._scope.cancel()

    def read(self) -> None:
        """What has arrived of the body has been taken: the client may send as much again."""
        if self._unread_bytes:
            given, self._unread_bytes = self._unread_bytes, 0
            self._connection.give_window(self, given)

    async def write(self, _nothing: bytes) -> None:
        """Send what waits in the response, as the client makes room. One that makes none in time has left."""
        connection = self._connection
        until = None
        progress = 0
        while not self.gone:
            if connection.is_full:
                await connection.has_room()
                continue
            sent = self._send()
            if not self.response.waiting:
                return
            progress += sent
            if progress >= SEND_BYTES:
                until, progress = None, 0
            if sent:
                await trio.lowlevel.checkpoint()
                continue
            if until is None:
                until = trio.current_time() + connection.send_timeout_s
            await self._wait_for_window(until)

    async def _wait_for_window(self, until: float) -> None:
        """Wait until it has grown; reset the stream if it has not by then."""
        if self._opened.is_set():
            self._opened = trio.Event()
        with trio.move_on_at(until):
            await self._opened.wait()
            return
        logger.warning(
            "%s: client opened too little of its window for %g s; resetting stream %d",
            self.peer.name,
            self._connection.send_timeout_s,
            self.number,
        )
        self._connection.reset(self, ErrorCodes.INTERNAL_ERROR)

    def _send(self) -> int:
        """Send what the windows allow, some frames at most; return how much of the body that was."""
        response, h2, number = self.response, self._connection.h2, self.number
        if response.proceeds and not self._told and not self._head_sent:
            self._told = True
            h2.send_headers(number, [(b":status", b"100")])
        if response.started and not self._head_sent:
            self._head_sent = True
            self._finished = response.complete and not response.waiting
            h2.send_headers(number, response.fields, end_stream=self._finished)
        sent = 0
        while response.waiting and sent < SEND_BYTES:
            most = min(h2.local_flow_control_window(number), h2.max_outbound_frame_size, _FRAME_BYTES)
            if most <= 0:
                break
            piece = response.take(most)
            self._finished = response.complete and not response.waiting
            h2.send_data(number, piece, end_stream=self._finished)
            self._connection.sent_frame()
            sent += len(piece)
        if response.complete and not response.waiting and not self._finished:
            self._finished = True
            h2.end_stream(number)
        self._connection.flush()
        return sent

    def _drop_body(self) -> None:
        """Nobody reads the rest of the body."""
        self._dropping = True
        self.read()

    async def _pass_on(self, exchange: Exchange) -> None:
        """Have the application answer the request."""
        async with trio.open_nursery() as nursery:
            road = self._connection.ordinary_road
            request = await road.request(exchange.request, self, self.response, nursery)
            with self._scope:
                await request.begin()
                more = True
                while more:
                    message = await exchange.receive()
                    if message["body"]:
                        await request.body(message["body"])
                    more = message["more_body"]
                await request.end_of_body()
                await trio.sleep_forever()  # `answered` or `leave` ends it
            await request.close()


class _Exchange(Exchange):
    """An exchange whose client may send more of the body as it is read."""

    def __init__(
        self, head: RequestHead, path: bytes, handler: Handler, stream: Http2Stream, response: Http2Response
    ) -> None:
        super().__init__(head, path, handler, stream, response)
        self._stream = stream

    def whole_body(self) -> bytes | None:
        body = super().whole_body()
        self._stream.read()
        return body

    async def receive(self) -> dict[str, Any]:
        message = await super().receive()
        self._stream.read()
        return message
