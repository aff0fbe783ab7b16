"""HTTP/1.1 to one llama-server: httptools on trio streams, with a small set of idle connections and no lock.

Upstream.open ──> UpstreamResponse: head and first bytes are here
                      ├──next_chunk...──> None: the connection is idle again
                      └──close──> the connection is closed at once, and the child sees that
"""

import json
import logging
import socket
from collections import deque
from typing import Final, NoReturn

import httptools
import trio

from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.headers import passed_on
from nodeagent.llama_server.sse import EventCutter

logger = logging.getLogger(__name__)

_READ_BYTES: Final = 256 * 1024
_HEAD_MAX_BYTES: Final = 64 * 1024
# llama-server closes a connection that was idle for 5 s.
_IDLE_MAX_S: Final = 4.0
_IDLE_MAX_COUNT: Final = 8
_CONNECT_TIMEOUT_S: Final = 5.0


class Upstream:
    """One generation of a server, at one address. `closed` is set when that generation is gone; `ends_as_asked` says
    that it was told to end, so that no request is to blame for it.

    `in_flight` counts the requests sent and not let go of; `bytes_received` all that came back in answers.
    """

    def __init__(self, address: str, api_key: str) -> None:
        self.address = address
        self.api_key = api_key
        self.closed = trio.Event()
        self.ends_as_asked = False
        self.in_flight = 0
        self.bytes_received = 0
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._idle: deque[tuple[float, _Connection]] = deque()

    async def open(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> "UpstreamResponse":
        """Send the request; return when the answer's head and its first bytes are here.

        Raises UpstreamLost. A connection that was idle may turn out closed: that is no loss, and the request is sent
        again on a new one. Cancelling closes the connection.
        """
        request = self._request(method, path, headers, body)
        connection = self._take_idle()
        if connection is not None:
            try:
                return await self._exchange(connection, request)
            except _Stale:
                logger.debug("%s had closed an idle connection", self.address)
        try:
            return await self._exchange(await self._connect(), request)
        except _Stale as error:
            raise UpstreamLost(self.address, "closed the connection without an answer") from error

    def close(self) -> None:
        """The server is gone: say so, and let go of the idle connections."""
        self.closed.set()
        while self._idle:
            self._idle.pop()[1].close()

    def _request(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
        lines = [f"{method} {path} HTTP/1.1".encode("ascii"), b"host: " + self.address.encode("ascii")]
        lines += [name + b": " + value for name, value in headers]
        lines += [b"authorization: Bearer " + self.api_key.encode("ascii"), b"content-length: %d" % len(body)]
        return b"\r\n".join([*lines, b"", body])

    def _take_idle(self) -> "_Connection | None":
        """The connection that was used last, if it can still be alive."""
        now = trio.current_time()
        while self._idle:
            since, connection = self._idle.pop()
            if now - since < _IDLE_MAX_S:
                return connection
            connection.close()
        return None

    def _keep(self, connection: "_Connection") -> None:
        self._idle.append((trio.current_time(), connection))
        if len(self._idle) > _IDLE_MAX_COUNT or self.closed.is_set():
            self._idle.popleft()[1].close()

    async def _connect(self) -> "_Connection":
        sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            with trio.fail_after(_CONNECT_TIMEOUT_S):
                await sock.connect((self._host, self._port))
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError | trio.TooSlowError):
                raise UpstreamLost(self.address, f"can't be connected to: {error!r}") from error
            raise
        return _Connection(trio.SocketStream(sock))  # which also sets TCP_NODELAY

    async def _exchange(self, connection: "_Connection", request: bytes) -> "UpstreamResponse":
        answer = UpstreamResponse(self, connection)
        self.in_flight += 1
        try:
            await answer._begin(request)
        except BaseException:
            answer.close()
            raise
        return answer


class _Stale(Exception):
    """The connection was closed before a byte of the answer came."""


class _Connection:
    """A stream that is closed without waiting."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    def close(self) -> None:
        self.stream.socket.close()


class UpstreamResponse:
    """A child's answer, from its head on. What changes: all of it, in `next_chunk` and `close`.

    `headers` are those that a client may be sent. `event_stream` says that the body is server-sent events; then each
    chunk ends where an event ends. A body that only the connection's end would end is not taken for whole:
    llama-server gives lengths or sends chunks.
    """

    def __init__(self, upstream: Upstream, connection: _Connection) -> None:
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.event_stream = False
        self._upstream = upstream
        self._connection: _Connection | None = connection
        self._parser = httptools.HttpResponseParser(self)
        self._raw_headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._head_done = False
        self._pieces: list[bytes] = []
        self._sent = False
        self._complete = False
        self._keeps_alive = False
        self._cutter: EventCutter | None = None
        self._first = b""

    @property
    def first_bytes(self) -> bytes:
        """The body's first bytes, as the first chunk will bring them."""
        return self._first

    async def next_chunk(self) -> bytes | None:
        """The next bytes of the body, all that piled up at once; None at its end.

        Raises UpstreamLost if the connection breaks before. Cancelling leaves the answer to `close`.
        """
        if self._first:
            first, self._first = self._first, b""
            return first
        return await self._chunk()

    def close(self) -> None:
        """Let go of the connection: kept for the next request if this answer is whole, closed at once if not."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._upstream.in_flight -= 1
        if self._sent and self._complete and self._keeps_alive:
            self._upstream._keep(connection)
        else:
            connection.close()

    async def _begin(self, request: bytes) -> None:
        """Send the request while listening: a server that refuses a long body answers before it has read it."""
        failure: UpstreamLost | _Stale | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, request)
            try:
                while not self._head_done:
                    await self._receive()
                self._first = await self._chunk() or b""
            except (UpstreamLost, _Stale) as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _send(self, request: bytes) -> None:
        assert self._connection is not None
        try:
            await self._connection.stream.send_all(request)
            self._sent = True
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            # What it answered, if anything, decides; the receiving side will know.
            logger.debug("%s stopped listening: %r", self._upstream.address, error)

    async def _chunk(self) -> bytes | None:
        while True:
            data = b"".join(self._pieces)
            self._pieces.clear()
            if self._cutter is not None:
                data = self._cutter.feed(data)
                if self._complete:
                    data += self._cutter.rest()
            if data:
                return data
            if self._complete:
                self.close()
                return None
            await self._receive()

    async def _receive(self) -> None:
        """Feed the parser with what has come; its callbacks below take it from there."""
        assert self._connection is not None, "the answer was closed"
        address = self._upstream.address
        try:
            data = await self._connection.stream.receive_some(_READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._lost(f"broke the connection: {error.__cause__ or error!r}")
        if not data:
            self._lost("closed the connection before its answer was whole")
        self._upstream.bytes_received += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as error:
            raise UpstreamLost(address, f"does not speak HTTP: {error}") from error
        self._head_bytes += 0 if self._head_done else len(data)
        if self._head_bytes > _HEAD_MAX_BYTES:
            raise UpstreamLost(address, f"sent more than {_HEAD_MAX_BYTES} bytes of headers")

    def _lost(self, reason: str) -> NoReturn:
        if self.status == 0 and not self._head_bytes:
            raise _Stale
        raise UpstreamLost(self._upstream.address, reason)

    # httptools' callbacks.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._raw_headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue and the like: another head follows
            self._raw_headers.clear()
            return
        self.status = status
        self.headers = passed_on(self._raw_headers)
        content_type = dict(self._raw_headers).get(b"content-type", b"")
        self.event_stream = content_type.startswith(b"text/event-stream")
        self._cutter = EventCutter() if self.event_stream else None
        self._head_done = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._complete = self._head_done
        # Here, and not when it is needed: the parser forgets it with the message.
        self._keeps_alive = self._parser.should_keep_alive()


def is_loading_answer(answer: UpstreamResponse) -> bool:
    """Whether this is llama-server's own word for "not yet", which it also says of a model that it wakes up."""
    if answer.status != 503:
        return False
    try:
        error = json.loads(answer.first_bytes)["error"]
        return bool(error["type"] == "unavailable_error")
    except (ValueError, KeyError, TypeError):
        return False
