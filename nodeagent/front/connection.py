"""One client's connection: reading, writing, the tasks of its requests, and how it ends.

    reading ──(idle too long, answer over and not kept alive, client left, shutdown while idle)──> lingering ──> closed

A client that has closed its sending side may still read: see `half_close.py`.

hypercorn's own TCPServer is not used: every method through which a client can harm the daemon would have to be
overridden (README.md lists these traps). Here a connection ends in one way, whoever ends it: the cancel scope around
the reading is cancelled, then one place closes the socket. All decisions are synchronous, so that the cancellation of
a request can't lose a keep-alive timer or a close.
"""

import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, TaskGroup
from hypercorn.utils import parse_socket_addr, repr_socket_addr

from nodeagent.front.half_close import HalfClose, connection_reset, input_ended
from nodeagent.front.protocol import HttpProtocol

logger = logging.getLogger(__name__)

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

_RECEIVE_BYTES = 2**16
# A client must read this much within the send timeout, however long the answer is.
_SEND_BYTES = 2**16
# How long to read from a client that still sends after its last answer.
_LINGER_S = 2.0
# SO_LINGER with a time of zero: closing discards what is unsent and resets the connection.
_RESET = struct.pack("ii", 1, 0)


class AbortResponse(Exception):
    """Raised by the application in mid-answer: end the connection so that the client sees a truncated answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all connections of a server share. `context.terminated` is set when the server drains."""

    app: ASGIApp
    config: Config
    context: WorkerContext
    keep_alive_timeout_s: float
    send_timeout_s: float


class Connection:
    """One client's connection, and the tasks of its requests.

    Anyone may cancel `reading` to end the connection. Its deadline follows, in `_limit`, from `_idle`, `_half_closed`,
    `_policy` and `_wrote_after_end`. `run` closes the socket, and so does `_send` after an incomplete write.
    """

    def __init__(self, shared: Shared, stream: trio.SocketStream) -> None:
        family, remote = stream.socket.family, stream.socket.getpeername()
        self.reading = trio.CancelScope()
        self.socket = stream.socket
        self.peer = repr_socket_addr(family, remote)
        self._shared = shared
        self._stream = stream
        self._idle = True
        self._half_closed = trio.Event()
        self._policy = HalfClose.FINISH
        self._wrote_after_end = False
        self._send_lock = trio.Lock()
        self._protocol = HttpProtocol(
            cast(AppWrapper, shared.app),
            shared.config,
            shared.context,
            cast(TaskGroup, self),
            client=parse_socket_addr(family, remote),
            server=parse_socket_addr(family, stream.socket.getsockname()),
            send=self.protocol_send,
            can_read=_Turn(self),
        )
        self._nursery: trio.Nursery

    def __repr__(self) -> str:
        return f"<Connection {self.peer} {'idle' if self._idle else 'busy'}>"

    async def run(self) -> None:
        """Serve the connection until it ends, then close the socket. Raises nothing but Cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._become(idle=True)
                left = await self._read()
                await self._protocol.handle(Closed())
                if not left:
                    await self._linger()
                self._close()
        except* OSError as group:
            logger.debug("%s: %s", self.peer, group.exceptions)
        except* Exception:
            logger.exception("%s: unexpected error; this connection is closed, the others go on", self.peer)
        finally:
            self._close()

    def drain(self) -> None:
        """End the connection now if it is idle. Otherwise it ends after its answer."""
        if self._idle:
            self.reading.cancel()

    async def _read(self) -> bool:
        """Feed the protocol until the connection ends; return whether the client ended it."""
        with self.reading:
            while True:
                try:
                    data = await self._stream.receive_some(_RECEIVE_BYTES)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return True
                await self._protocol.handle(RawData(bytes(data)))
                if not data:
                    if self._protocol.stream is not None:
                        await self._outlast_the_input()
                    return True
        return False

    async def _outlast_the_input(self) -> None:
        """Return when the client has left. If it stays for its answer, the end of the answer cancels `reading`."""
        self._half_closed.set()
        self._limit()
        await connection_reset(self.socket)

    async def end_when_the_client_leaves(self) -> None:
        """As `_outlast_the_input`, while unread bytes are before the end of input."""
        await input_ended(self.socket)
        await self._outlast_the_input()
        self.reading.cancel()

    async def _linger(self) -> None:
        """Read on while the client sends: to close with unread bytes is a reset, and that can overtake the answer."""
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
        """Close so that the client can't mistake a truncated answer for a complete one."""
        # The socket may be closed already. On macOS, one that the client has reset rejects the option.
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.socket.close()

    async def protocol_send(self, event: Event) -> None:
        """Do what the protocol asks of the connection. Only writing has a checkpoint."""
        if isinstance(event, RawData):
            await self._send(event.data)
        elif isinstance(event, Closed):
            self.reading.cancel()
        elif isinstance(event, Updated):
            self._become(idle=event.idle)

    def _become(self, *, idle: bool) -> None:
        self._idle = idle
        self._policy = HalfClose.FINISH
        self._limit()

    def _on_half_close(self, policy: HalfClose) -> None:
        """Set the policy of the request that is being answered (`nodeagent.on_half_close` in its ASGI scope)."""
        self._policy = policy
        self._limit()

    def _limit(self) -> None:
        """Set how long the connection may go on from now."""
        if self._idle:
            left_s = self._shared.keep_alive_timeout_s
        elif not self._half_closed.is_set() or (self._wrote_after_end and self._policy is HalfClose.STREAM):
            left_s = float("inf")
        else:
            left_s = self._policy.bound_s
        self.reading.deadline = trio.current_time() + left_s

    async def _send(self, data: bytes) -> None:
        """Write all of it, or end the connection: nothing can follow an incomplete write.

        So it needs no shield, and a client that does not read delays neither the daemon nor its shutdown.
        """
        complete = False
        try:
            async with self._send_lock:
                for start in range(0, len(data), _SEND_BYTES):
                    with trio.fail_after(self._shared.send_timeout_s):
                        await self._stream.send_all(data[start : start + _SEND_BYTES])
            complete = True
            self._note_write()
        except trio.TooSlowError:
            logger.warning(
                "%s: client read too little for %g s; closing the connection", self.peer, self._shared.send_timeout_s
            )
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("%s: client left: %s", self.peer, error)
        finally:
            if not complete:
                self.reading.cancel()
                self._reset()

    def _note_write(self) -> None:
        if self._half_closed.is_set() and not self._wrote_after_end:
            self._wrote_after_end = True
            if self._policy is HalfClose.STREAM:
                self._limit()

    async def spawn_app(
        self, app: Any, config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Any], Awaitable[None]]:
        """Start the application for a request; return what sends it ASGI events (as hypercorn's TaskGroup)."""
        to_app, from_client = trio.open_memory_channel[Any](config.max_app_queue_size)

        async def put(event: Any) -> None:
            if event["type"] == "http.disconnect":
                # Not through the queue, which may be full: an application that answers without reading the body would
                # wait here for its own reading, and the connection would never end.
                to_app.close()
                return
            try:
                await to_app.send(event)
            except trio.ClosedResourceError:
                logger.debug("%s: discarding the rest of a body, its request has ended", self.peer)

        async def receive() -> Any:
            try:
                return await from_client.receive()
            except trio.EndOfChannel:
                return {"type": "http.disconnect"}

        scope["nodeagent.on_half_close"] = self._on_half_close
        scope["nodeagent.half_closed"] = self._half_closed
        name = f"{scope['method']} {scope['path']} {self.peer}"
        self._nursery.start_soon(self._run_app, app, scope, receive, send, name=name)
        return put

    async def _run_app(
        self, app: Any, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        try:
            await app(scope, receive, send)
        except* AbortResponse as group:
            logger.debug("%s: answer aborted: %s", self.peer, group.exceptions)
        except* Exception:
            logger.exception("%s: the application failed on %s %s", self.peer, scope["method"], scope["path"])
        # An answer that is incomplete by now ends with the connection, without its last chunk.
        await send(None)


class _Turn:
    """What the reader waits for while a pipelined request is buffered behind the one that is being answered.

    Nothing reads the socket meanwhile, so a client that leaves would be noticed only after the answer.
    """

    def __init__(self, connection: Connection) -> None:
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
            watch = self._connection.end_when_the_client_leaves
            nursery.start_soon(watch, name=f"watch for hang-up {self._connection.peer}")
            await self._come.wait()
            nursery.cancel_scope.cancel()
