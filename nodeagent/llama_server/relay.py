"""HTTP/1.1 to one llama-server: httptools on trio's sockets, with idle connections and no lock.

Upstream.request ──> SentRequest.response ──> UpstreamResponse: the head and the first bytes have arrived
                                                  ├──next_chunk...──> None: the connection is idle again
                                                  └──close──> the connection is closed at once, and the child sees that
"""

import json
import logging
import os
import select
import socket
from collections import deque
from typing import Final, NoReturn

import httptools
import trio

from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.headers import returnable
from nodeagent.llama_server.sse import EventCutter

logger = logging.getLogger(__name__)

_READ_BYTES: Final = 64 * 1024
# Of all heads of a response (100 Continue and the like included), and of its trailers.
_HEAD_MAX_BYTES: Final = 64 * 1024
# llama-server closes a connection that was idle for 5 s; older ones are not used.
_IDLE_MAX_S: Final = 4.0
_CONNECT_TIMEOUT_S: Final = 5.0
# The second is no kind of the first: what an answer that switches to another protocol raises.
_INVALID: Final = (httptools.HttpParserError, httptools.HttpParserUpgrade)
# One event is kept until it is complete. The longest has a whole answer in it, and the logits of its tokens.
_EVENT_MAX_BYTES: Final = 16 * 2**20


class Upstream:
    """One generation of a server, at one address (IP:port).

    `closed` is set once that generation is gone. `ends_as_asked` means that it was asked to stop, so no request is to
    blame for its end. Nor is one if `blameless_end` is set: why it ended, where no request can be the cause (out of
    memory, say); it is known when `closed` is set. `in_flight` counts the requests that were sent and not closed,
    `awaited` those of them of which bytes are waited for, not those whose client does not read. `bytes_received` is the
    total of all responses. `slot_ctx_size` is the context of one slot in tokens, None until it was asked for. What
    changes: these, and `_idle`, the idle connections with the times since when, the oldest first. There are no more of
    them than there were requests in flight at once, so no more than the server has slots.
    """

    def __init__(self, address: str, api_key: str, *, idle_max_s: float = _IDLE_MAX_S) -> None:
        self.address = address
        self.api_key = api_key
        self._idle_max_s = idle_max_s
        self.closed = trio.Event()
        self.ends_as_asked = False
        self.blameless_end: str | None = None
        self.in_flight = 0
        self.awaited = 0
        self.bytes_received = 0
        self.slot_ctx_size: int | None = None
        host, key = address.encode("ascii"), api_key.encode("ascii")
        self._own_headers = b"host: %b\r\nauthorization: Bearer %b" % (host, key)
        self._ip, _, port = address.rpartition(":")
        self._port = int(port)
        self._idle: deque[tuple[float, _Connection]] = deque()

    def __repr__(self) -> str:
        closed = ", closed" if self.closed.is_set() else ""
        return f"<Upstream {self.address}: {self.in_flight} in flight, {len(self._idle)} idle connections{closed}>"

    def request(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> "SentRequest":
        """A request to this server; its `response` sends it."""
        lines = [f"{method} {path} HTTP/1.1".encode("ascii"), self._own_headers]
        lines += [name + b": " + value for name, value in headers]
        lines += (b"content-length: %d" % len(body), b"", body)
        return SentRequest(self, b"\r\n".join(lines))

    def close(self) -> None:
        """The server is gone: set `closed`, and close the idle connections."""
        self.closed.set()
        while self._idle:
            self._idle.pop()[1].close()

    def _take_idle(self) -> "_Connection | None":
        """The connection that was used last, if the server has neither closed it nor sent anything on it."""
        self._close_old(trio.current_time())
        while self._idle:
            _since, connection = self._idle.pop()
            if connection.is_quiet():
                return connection
            connection.close()
        return None

    def _keep(self, connection: "_Connection") -> None:
        now = trio.current_time()
        self._close_old(now)
        if self.closed.is_set():
            connection.close()
        else:
            self._idle.append((now, connection))

    def _close_old(self, now: float) -> None:
        while self._idle and self._idle[0][0] <= now - self._idle_max_s:
            self._idle.popleft()[1].close()

    async def _connect(self) -> "_Connection":
        sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            await sock.connect((self._ip, self._port))
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):
                raise UpstreamLost(self.address, f"connection failed: {error!r}") from error
            raise
        return _Connection(self.address, trio.SocketStream(sock))  # which also sets TCP_NODELAY


class SentRequest:
    """A request up to the first bytes of its response.

    What changes: `_response` (the one that is waited for) in `response` and `close`, `_given_up` in `close`, and in
    `response` also `_is_new` (whether an idle connection has proved closed) and `_connect_by`.
    """

    def __init__(self, upstream: Upstream, request: bytes) -> None:
        self._upstream = upstream
        self._request = request
        self._response: UpstreamResponse | None = None
        self._is_new = False
        self._given_up = False
        self._connect_by: float | None = None

    async def response(self) -> "UpstreamResponse":
        """Send the request; return once the head of the response and its first bytes have arrived.

        Raises UpstreamLost. An idle connection may turn out to be closed: then the request is sent again on a new one.
        Once cancelled, it may be called again, and goes on where it was: `close` gives the request up, and then this
        raises UpstreamLost, also where it waits already.
        """
        while True:
            try:
                if self._response is None:
                    self._response = self._sent_on(await self._connection())
                await self._response._begin()
                return self._response
            except _Stale as error:
                self._drop()
                if self._is_new or self._given_up:
                    address = self._upstream.address
                    raise UpstreamLost(address, "closed the connection without a response") from error
                logger.debug("%s: an idle connection was closed", self._upstream.address)
                self._is_new = True
            except Exception:
                self.close()
                raise

    def close(self) -> None:
        """Give up the response, as its own `close` does."""
        self._given_up = True
        self._drop()

    def _drop(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def _sent_on(self, connection: "_Connection") -> "UpstreamResponse":
        if self._given_up:
            connection.close()
            raise UpstreamLost(self._upstream.address, "the request was given up")
        self._upstream.in_flight += 1
        response = UpstreamResponse(self._upstream, connection)
        response._send_now(self._request)
        return response

    async def _connection(self) -> "_Connection":
        idle = None if self._is_new else self._upstream._take_idle()
        if idle is not None:
            return idle
        self._is_new = True
        if self._connect_by is None:
            self._connect_by = trio.current_time() + _CONNECT_TIMEOUT_S
        try:
            with trio.fail_at(self._connect_by):
                return await self._upstream._connect()
        except trio.TooSlowError as error:
            raise UpstreamLost(self._upstream.address, f"connection failed: {error!r}") from error


class _Stale(Exception):
    """The connection was closed before a byte of the response arrived."""


class _Surplus(Exception):
    """Another message follows the response."""


class _Connection:
    """A stream to that address that is closed without waiting."""

    def __init__(self, address: str, stream: trio.SocketStream) -> None:
        self._socket = stream.socket
        self._address = address
        self._arrivals = select.poll()
        self._arrivals.register(self._socket, select.POLLIN)

    def __repr__(self) -> str:
        state = "closed" if self._socket.fileno() < 0 else "open"
        return f"<Connection to {self._address}, {state}>"

    def is_quiet(self) -> bool:
        """Whether nothing has come on it since its last response: neither its end nor bytes that nobody asked for."""
        return not self._arrivals.poll(0)

    async def receive(self) -> bytes:
        """What has arrived, b"" at the end of the connection. Raises OSError and trio.ClosedResourceError."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return os.read(self._socket.fileno(), _READ_BYTES)
            except BlockingIOError:
                continue

    def send_now(self, data: bytes | memoryview) -> int:
        """Send what fits into the socket's buffer; return how many bytes that was. Raises OSError."""
        try:
            return os.write(self._socket.fileno(), data)
        except BlockingIOError:
            return 0

    async def send_some(self, data: memoryview) -> int:
        """As `send_now`, but wait first until the buffer has room. Raises OSError and trio.ClosedResourceError."""
        await trio.lowlevel.wait_writable(self._socket)
        return self.send_now(data)

    def close(self) -> None:
        self._socket.close()


class UpstreamResponse:
    """A child's response, from its head on.

    `headers` are those that may be sent to a client, with names in lower case. `event_stream` means that the body is
    server-sent events; then each chunk ends where an event ends. A body that only the end of the connection ends counts
    as incomplete: llama-server sends lengths or chunks. What changes: everything, in `next_chunk` and `close`.
    """

    def __init__(self, upstream: Upstream, connection: _Connection) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.event_stream = False
        self._upstream = upstream
        self._connection: _Connection | None = connection
        self._parser = httptools.HttpResponseParser(self)
        self._raw_headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._head_done = False
        self._unframed_bytes = 0  # since the last piece of the body: trailers
        self._pieces: list[bytes] = []
        self._sent = False
        self._unsent: memoryview | None = None
        self._complete = False
        self._keeps_alive = False
        self._cutter: EventCutter | None = None
        self._first = b""

    def __repr__(self) -> str:
        state = "open" if self._connection is not None else "complete" if self._complete else "closed"
        return f"<UpstreamResponse {self.status} from {self._upstream.address}, {state}>"

    @property
    def complete(self) -> bool:
        """Whether the chunks returned so far are the whole body."""
        return self._complete and not self._first and not self._pieces

    @property
    def first_bytes(self) -> bytes:
        """The first bytes of the body, which are also the first chunk."""
        return self._first

    async def next_chunk(self) -> bytes | None:
        """The next bytes of the body, everything that has arrived; None at its end.

        Raises UpstreamLost if the connection breaks before that. Cancelling leaves the response open: `close` it.
        """
        if self._first:
            first, self._first = self._first, b""
            return first
        return await self._chunk()

    def close(self) -> None:
        """Give up the connection: kept for the next request if this response is complete, else closed at once."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._upstream.in_flight -= 1
        if self._sent and self._complete and self._keeps_alive:
            self._upstream._keep(connection)
        else:
            connection.close()

    def _send_now(self, request: bytes) -> None:
        """Send what the socket's buffer takes; `_begin` sends the rest."""
        assert self._connection is not None
        try:
            sent_bytes = self._connection.send_now(request)
        except OSError as error:
            # What is received, a response or the end of the connection, decides.
            logger.debug("sending to %s failed: %r", self._upstream.address, error)
            return
        self._sent = sent_bytes == len(request)
        if not self._sent:
            self._unsent = memoryview(request)[sent_bytes:]

    async def _begin(self) -> None:
        """Receive up to the first bytes of the body. Once cancelled, it may be called again."""
        if self._unsent is None:
            await self._receive_beginning()
            return
        # A server that refuses a long body responds before it has read it.
        failure: UpstreamLost | _Stale | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_rest, name=f"send to {self._upstream.address}")
            try:
                await self._receive_beginning()
            except (UpstreamLost, _Stale) as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _send_rest(self) -> None:
        assert self._connection is not None
        try:
            while self._unsent:
                self._unsent = self._unsent[await self._connection.send_some(self._unsent) :]
            self._sent = True
        except (OSError, trio.ClosedResourceError) as error:
            logger.debug("sending to %s failed: %r", self._upstream.address, error)
        self._unsent = None

    async def _receive_beginning(self) -> None:
        while not self._head_done:
            await self._receive()
        self._first = await self._chunk() or b""

    async def _chunk(self) -> bytes | None:
        while True:
            if self._pieces or self._complete:
                data = self._arrived()
                if data:
                    return data
                if self._complete:
                    self.close()
                    return None
            await self._receive()

    def _arrived(self) -> bytes:
        """What has arrived of the body and was not returned yet; of an event stream, whole events."""
        pieces, self._pieces = self._pieces, []
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        cutter = self._cutter
        if cutter is not None:
            data = cutter.feed(data)
            if self._complete:
                data += cutter.rest()
            elif cutter.kept_bytes > _EVENT_MAX_BYTES:
                raise UpstreamLost(self._upstream.address, f"sent an event of more than {_EVENT_MAX_BYTES} bytes")
        return data

    async def _receive(self) -> None:
        """Feed the parser with what has arrived; it calls the methods below."""
        assert self._connection is not None, "the response is closed"
        address = self._upstream.address
        self._upstream.awaited += 1
        try:
            data = await self._connection.receive()
        except (OSError, trio.ClosedResourceError) as error:
            self._lost(f"the connection broke: {error!r}")
        finally:
            self._upstream.awaited -= 1
        if not data:
            self._lost("closed the connection before the response was complete")
        self._upstream.bytes_received += len(data)
        self._unframed_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except _INVALID as error:
            if not self._complete:
                raise UpstreamLost(address, f"sent invalid HTTP: {error}") from error
            self._keeps_alive = False  # what follows the response belongs to no request
        if not self._head_done:
            self._head_bytes += len(data)
        if self._head_bytes > _HEAD_MAX_BYTES or self._unframed_bytes > _HEAD_MAX_BYTES:
            raise UpstreamLost(address, f"sent more than {_HEAD_MAX_BYTES} bytes of headers or trailers")

    def _lost(self, reason: str) -> NoReturn:
        if self.status == 0 and not self._head_bytes:
            raise _Stale
        raise UpstreamLost(self._upstream.address, reason)

    # What httptools calls.

    def on_message_begin(self) -> None:
        if self._complete:
            raise _Surplus

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_done:  # else it is a trailer
            self._raw_headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue and the like: another head follows
            self._raw_headers.clear()
            return
        self.status = status
        self.headers = returnable(self._raw_headers)
        content_type = dict(self._raw_headers).get(b"content-type", b"")
        self.event_stream = content_type.startswith(b"text/event-stream")
        self._cutter = EventCutter() if self.event_stream else None
        self._head_done = True

    def on_body(self, body: bytes) -> None:
        self._unframed_bytes = 0
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._unframed_bytes = 0
        self._complete = self._head_done
        # Here, and not in `close`: the parser forgets it once the message is complete.
        self._keeps_alive = self._parser.should_keep_alive()


def is_loading_answer(response: UpstreamResponse) -> bool:
    """Whether this is llama-server's response while it loads its model, which it also sends while it wakes one up."""
    if response.status != 503:
        return False
    try:
        error = json.loads(response.first_bytes)["error"]
        return bool(error["type"] == "unavailable_error")
    except (ValueError, KeyError, TypeError):
        return False
