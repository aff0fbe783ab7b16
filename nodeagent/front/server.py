"""The HTTP/1.1 server under the front: hypercorn's protocol on connections of our own.

hypercorn parses requests and speaks ASGI (`H11Protocol`, `HTTPStream`). Its own `TCPServer` is not used: each way in
which a client can hurt the daemon through it sits in the method that would have to be overridden. A `_Connection` is:

    reading ──(idle too long, answer over and not kept alive, client left, shutdown while idle)──> leaving ──> closed

One cancel scope around the reading is the only thing that ends it, whoever decides; then one place closes the socket.
All deciding is synchronous, so that no cancelled application can lose a keep-alive timer or a close on the way.
"""

import errno
import logging
import select
import socket
import struct
import sys
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Request, Response
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup
from hypercorn.utils import parse_socket_addr, repr_socket_addr

from nodeagent.errors import StartupError
from nodeagent.front.refusals import error_response

logger = logging.getLogger(__name__)

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

_BACKLOG = 1024
_RECEIVE_BYTES = 2**16
# A client must read this much within the send time-out, whatever the size of the answer.
_SEND_BYTES = 2**16
# Headers, as most servers bound them.
_HEADERS_MAX_COUNT = 100
_HEADERS_MAX_BYTES = 2**15
# How long a client that still sends is listened to after the last answer.
_LINGER_S = 2.0
# SO_LINGER on, with no time: closing drops what is unsent and resets the connection.
_RESET = struct.pack("ii", 1, 0)


class AbortResponse(Exception):
    """Raised by the application in mid-answer to end the connection so that the client sees that it broke."""


async def bind(host: str, port: int) -> tuple[list[trio.SocketListener], int]:
    """Listen on every address that `host` means, all on one port, and say which; port 0 lets the system choose it.

    Raises StartupError with one line for a person. The caller closes the listeners, unless `serve` gets them.
    """
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise StartupError(f"can't listen on {place}: no address is known for {host!r} ({error})") from None
    dual_stack = len({family for family, *_ in found}) == 1
    listeners: list[trio.SocketListener] = []
    try:
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            listeners.append(_listen(family, (address[0], port, *address[2:]), dual_stack=dual_stack))
            port = listeners[0].socket.getsockname()[1]
    except OSError as error:
        for listener in listeners:
            listener.socket.close()
        raise StartupError(f"can't listen on {place}: {_why(error)}") from None
    return listeners, port


def _listen(family: int, address: tuple[Any, ...], *, dual_stack: bool) -> trio.SocketListener:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A restart must not wait for the connections of the last run to be forgotten. Never REUSEPORT: two agents
        # would share the port silently.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
        sock.bind(address)
        sock.listen(_BACKLOG)
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    except BaseException:
        sock.close()
        raise


def _why(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "another process listens there already (listen_host, listen_port)"
        case errno.EADDRNOTAVAIL:
            return "no interface of this host has that address (listen_host)"
        case errno.EACCES:
            return "ports below 1024 need a privilege that this process lacks (listen_port)"
        case _:
            return str(error)


async def serve(
    app: ASGIApp,
    listeners: list[trio.SocketListener],
    *,
    shutdown: trio.Event,
    keep_alive_timeout_s: float = 75.0,
    graceful_timeout_s: float = 30.0,
    send_timeout_s: float = 60.0,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` (ASGI 3, scope `http` only: no lifespan, no WebSockets) until `shutdown`, then let it drain.

    At `shutdown` the listeners and the idle connections close at once, so it is set only when balancers have had the
    time to look elsewhere. Requests in flight get `graceful_timeout_s`; what is left of them is cut.

    `keep_alive_timeout_s` is how long a connection may be without a whole request head, from its start or from its
    last answer: more than the idle time of the balancers in front, who else send on connections that just closed.
    `send_timeout_s` is how long a client may take to read 64 KiB.

    Cancelling closes everything at once, uncleanly. Takes the listeners over: they are closed however this ends.
    """
    server = _Server(app, keep_alive_timeout_s, send_timeout_s)
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            await accepting.start(partial(trio.serve_listeners, server.handle, listeners, handler_nursery=connections))
            task_status.started()
            await shutdown.wait()
            accepting.cancel_scope.cancel()
        await server.drain()
        connections.cancel_scope.deadline = trio.current_time() + graceful_timeout_s


class _Server:
    """What the connections share. `drain` alone sets `context.terminated`; `handle` alone changes `connections`."""

    def __init__(self, app: ASGIApp, keep_alive_timeout_s: float, send_timeout_s: float) -> None:
        self.app = app
        self.keep_alive_timeout_s = keep_alive_timeout_s
        self.send_timeout_s = send_timeout_s
        self.config = _hypercorn_config(
            accesslog=None,
            # A logger that is handed over is used as it is; else hypercorn would put a handler of its own on stderr.
            errorlog=logging.getLogger("hypercorn.error"),
            h11_max_incomplete_size=_HEADERS_MAX_BYTES,
            include_server_header=False,
        )
        self.context = WorkerContext(max_requests=None)
        self.connections: set[_Connection] = set()

    async def handle(self, stream: trio.SocketStream) -> None:
        """One connection from accept to close. Its own errors end it alone."""
        try:
            connection = _Connection(self, stream)
        except OSError as error:
            logger.debug("a client left before it was heard: %s", error)
            return
        self.connections.add(connection)
        try:
            await connection.run()
        finally:
            self.connections.remove(connection)

    async def drain(self) -> None:
        """Let each connection end with the answer that it is at; the idle ones end now."""
        await self.context.terminated.set()
        for connection in self.connections:
            connection.drain()


def _hypercorn_config(**settings: object) -> Config:
    """Make hypercorn's configuration; it takes a misspelt setting silently, so each name is checked here."""
    config = Config()
    for name, value in settings.items():
        if not hasattr(config, name):
            raise AttributeError(f"hypercorn has no setting {name!r}")
        setattr(config, name, value)
    return config


class _Connection:
    """One client's connection, and the tasks of its applications.

    `reading` is cancelled to end the connection, by anyone. Its deadline and `_idle` change in `_become`. The socket is
    closed by `run`, and by `_send` where half a write has spoilt it.
    """

    def __init__(self, server: _Server, stream: trio.SocketStream) -> None:
        remote = stream.socket.getpeername()
        self.client = parse_socket_addr(stream.socket.family, remote)
        self.server_address = parse_socket_addr(stream.socket.family, stream.socket.getsockname())
        self.reading = trio.CancelScope()
        self.socket = stream.socket
        self._peer = repr_socket_addr(stream.socket.family, remote)
        self._server = server
        self._stream = stream
        self._idle = True
        self._send_lock = trio.Lock()
        self._protocol = _Protocol(self, server)
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Serve the connection until it is over. Raises nothing but Cancelled; the socket is closed then."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._become(idle=True)
                left = await self._read()
                await self._protocol.handle(Closed())
                if not left:
                    await self._linger()
                self._close()
        except* OSError as group:
            logger.debug("%s: %s", self._peer, group.exceptions)
        except* Exception:
            logger.exception("%s: this connection failed and is closed; the others go on", self._peer)
        finally:
            self._close()

    def drain(self) -> None:
        """End the connection now if nothing is going on there; else it ends with its answer."""
        if self._idle:
            self.reading.cancel()

    async def _read(self) -> bool:
        """Feed the protocol until the connection is over; return whether it was the client who ended it."""
        with self.reading:
            while True:
                try:
                    data = await self._stream.receive_some(_RECEIVE_BYTES)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return True
                await self._protocol.handle(RawData(bytes(data)))
                if not data:
                    return True
        return False

    async def _linger(self) -> None:
        """Hear a client out that still sends: to close on unread bytes resets, and that can overtake the answer."""
        if self._protocol.connection.their_state not in (h11.SEND_BODY, h11.ERROR):
            return
        with trio.move_on_after(_LINGER_S):
            try:
                async with self._send_lock:
                    await self._stream.send_eof()
                while await self._stream.receive_some(_RECEIVE_BYTES):
                    continue
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    def _close(self) -> None:
        if self._protocol.ends_by_closing():
            self._reset()
        self.socket.close()

    def _reset(self) -> None:
        """Close so that the client can't take what it has for whole."""
        # It may be closed already; on macOS one that the client has reset refuses the option.
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.socket.close()

    async def protocol_send(self, event: Event) -> None:
        """Do what the protocol wants done with the connection; but for writing, without a checkpoint."""
        if isinstance(event, RawData):
            await self._send(event.data)
        elif isinstance(event, Closed):
            self.reading.cancel()
        elif isinstance(event, Updated):
            self._become(idle=event.idle)

    def _become(self, *, idle: bool) -> None:
        self._idle = idle
        self.reading.deadline = trio.current_time() + self._server.keep_alive_timeout_s if idle else float("inf")

    async def _send(self, data: bytes) -> None:
        """Write all of it, or end the connection: nothing can follow half a write.

        So it needs no shield, and a client that does not read holds up neither the daemon nor its shutdown.
        """
        whole = False
        try:
            async with self._send_lock:
                for start in range(0, len(data), _SEND_BYTES):
                    with trio.fail_after(self._server.send_timeout_s):
                        await self._stream.send_all(data[start : start + _SEND_BYTES])
            whole = True
        except trio.TooSlowError:
            logger.warning("%s: read nothing for %g s and is cut off", self._peer, self._server.send_timeout_s)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("%s: left: %s", self._peer, error)
        finally:
            if not whole:
                self.reading.cancel()
                self._reset()

    async def spawn_app(
        self, app: Any, config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Any], Awaitable[None]]:
        """Start the application on a request; return what puts ASGI events before it (as hypercorn's TaskGroup)."""
        to_app, from_client = trio.open_memory_channel[Any](config.max_app_queue_size)

        async def put(event: Any) -> None:
            if event["type"] == "http.disconnect":
                # Past a full queue: an application that answers without having read the body would wait for its own
                # reading here, and the connection would stay for ever.
                to_app.close()
                return
            try:
                await to_app.send(event)
            except trio.ClosedResourceError:
                logger.debug("%s: the rest of a body is dropped, its request is over", self._peer)

        async def receive() -> Any:
            try:
                return await from_client.receive()
            except trio.EndOfChannel:
                return {"type": "http.disconnect"}

        self._nursery.start_soon(self._run_app, app, scope, receive, send)
        return put

    async def _run_app(
        self, app: Any, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        try:
            await app(scope, receive, send)
        except* AbortResponse as group:
            logger.debug("%s: an answer is cut off on purpose: %s", self._peer, group.exceptions)
        except* Exception:
            logger.exception("%s: the application failed on %s %s", self._peer, scope["method"], scope["path"])
        # An answer that is not whole by now ends with the connection, without its last chunk.
        await send(None)


class _Protocol(H11Protocol):
    """hypercorn's HTTP/1.1, strict about what a request is, and without its ways out of HTTP/1.1.

    An `Upgrade` (WebSocket, h2c) is ignored, as RFC 9110 allows: the request is answered as if it were not there.
    """

    connection: "_Parser"

    def __init__(self, owner: _Connection, server: _Server) -> None:
        super().__init__(
            cast(AppWrapper, server.app),
            server.config,
            server.context,
            cast(TaskGroup, owner),
            ConnectionState({}),
            ssl=False,
            client=owner.client,
            server=owner.server_address,
            send=owner.protocol_send,
        )
        self.connection = _Parser(h11.SERVER, max_incomplete_event_size=_HEADERS_MAX_BYTES)
        self.can_read = _Turn(owner)

    def ends_by_closing(self) -> bool:
        """Whether an answer is unfinished whose end is the connection's, so that only a reset can show the break."""
        return self.connection.our_state is h11.SEND_BODY and self.connection.their_http_version == b"1.0"

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response) and self.context.terminated.is_set():
            event.headers.append((b"connection", b"close"))
        await super().stream_send(event)

    async def _check_protocol(self, event: h11.Request) -> None:
        """Stay with HTTP/1.1: what looks like HTTP/2 is refused by the parser."""

    async def _create_stream(self, request: h11.Request) -> None:
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=_origin_form(request.target),
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1

    async def _send_error_response(self, status_code: int) -> None:
        status, headers, body = error_response(status_code, self.connection.complaint, uuid.uuid4().hex)
        head = [(name.encode(), value.encode()) for name, value in headers]
        head += [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        head += self.config.response_headers("h11")
        await self._send_h11_event(h11.Response(status_code=status, headers=head))
        if not self.connection.answers_head:
            await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


class _Parser(h11.Connection):
    """h11's parser, and the checks that it leaves to others.

    `complaint` is why the last request was refused, `answers_head` whether its answer has no body.
    """

    complaint = ""
    answers_head = False

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        # Bytes after a client's last request are no reason to refuse that request, as h11 would.
        if self.their_state is h11.MUST_CLOSE and self.trailing_data[0]:
            return h11.PAUSED
        if self.their_state is h11.IDLE:
            self.answers_head = False
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self.answers_head = event.method == b"HEAD"
                _check(event)
        except h11.RemoteProtocolError as error:
            self.complaint = f"This is not a request that the node can read: {error}."
            raise
        return event


def _check(request: h11.Request) -> None:
    names = [name for name, _ in request.headers]
    size = sum(len(name) + len(value) for name, value in request.headers)
    if len(names) > _HEADERS_MAX_COUNT or size + len(request.target) > _HEADERS_MAX_BYTES:
        limits = f"at most {_HEADERS_MAX_COUNT} headers and {_HEADERS_MAX_BYTES} bytes of them are taken"
        raise h11.RemoteProtocolError(limits, error_status_hint=431)
    # Two lengths are how a request is smuggled past a proxy that believes the other one (RFC 9112, 6.1).
    if b"content-length" in names and b"transfer-encoding" in names:
        raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding exclude each other")
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("only HTTP/1.1 and 1.0 are spoken here", error_status_hint=505)
    if not request.target.startswith((b"/", b"http://", b"https://")) and request.target != b"*":
        raise h11.RemoteProtocolError("the target must be a path")


def _origin_form(target: bytes) -> bytes:
    """Make `http://host/path?query`, which servers must accept too, into `/path?query`."""
    if target.startswith(b"/"):
        return target
    _, _, rest = target.partition(b"://")
    _, slash, path = rest.partition(b"/")
    return b"/" + path if slash else b"/"


class _Turn:
    """What the reader waits for while a request is buffered behind the one that is being answered.

    Nobody reads the socket meanwhile, so the end of a client that left would be seen only after the answer.
    """

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._come = trio.Event()

    async def clear(self) -> None:
        self._come = trio.Event()

    async def set(self) -> None:
        self._come.set()

    def is_set(self) -> bool:
        return self._come.is_set()

    async def wait(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_when_the_client_leaves)
            await self._come.wait()
            nursery.cancel_scope.cancel()

    async def _end_when_the_client_leaves(self) -> None:
        await _hung_up(self._connection.socket)
        self._connection.reading.cancel()


if sys.platform == "linux":

    async def _hung_up(sock: trio.socket.SocketType) -> None:
        """Return when the peer has closed its side, though bytes of it are still unread.

        An epoll that is asked about nothing else becomes readable itself then, and trio can wait for that.
        """
        if sock.fileno() == -1:  # a failed send has just closed it
            return
        with select.epoll() as epoll:
            epoll.register(sock.fileno(), select.EPOLLRDHUP)
            await trio.lowlevel.wait_readable(epoll.fileno())
else:

    async def _hung_up(sock: trio.socket.SocketType) -> None:
        """Never return: without epoll, nothing tells the end from the unread bytes before it."""
        await trio.sleep_forever()
