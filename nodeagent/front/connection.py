"""One client's connection: reading, writing, its requests one after another, and how it ends.

    reading ──(idle too long, answer over and not kept alive, client left, shutdown while idle)──> lingering ──> closed

A request takes one of two roads: it is an `Exchange` if the server has a handler for its path, else hypercorn's stream
takes it to the ASGI application. A client that has closed its sending side may still read: see `half_close.py`.

hypercorn's own TCPServer is not used: every method through which a client can harm the daemon would have to be
overridden (README.md lists these traps). Here a connection ends in one way, whoever ends it: the cancel scope around
the reading is cancelled, then one place closes the socket. All decisions are synchronous, so that the cancellation of
a request can't lose a keep-alive timer or a close.
"""

import ipaddress
import logging
import os
import socket
import ssl
import struct
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from nodeagent.front.exchange import AbortResponse, Exchange, FindHandler, Peer
from nodeagent.front.half_close import HalfClose, connection_reset, input_ended
from nodeagent.front.ordinary_road import OrdinaryRoad
from nodeagent.front.protocol import BadRequest, EndOfBody, RequestEvent, RequestHead, RequestParser
from nodeagent.front.refusals import error_response
from nodeagent.front.response import ResponseWriter
from nodeagent.front.tls import FindContext, Tls, no_tls

if TYPE_CHECKING:
    from nodeagent.front.ordinary import OrdinaryRequest

    Request = Exchange | OrdinaryRequest

logger = logging.getLogger(__name__)

_RECEIVE_BYTES = 2**16
# A client must read this much within the send timeout, however long the answer is.
_SEND_BYTES = 2**16
# How long to read from a client that still sends after its last answer.
_LINGER_S = 2.0
# SO_LINGER with a time of zero: closing discards what is unsent and resets the connection.
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all connections of a server share. `draining` is set when the server drains."""

    ordinary_road: OrdinaryRoad
    find_handler: FindHandler
    keep_alive_timeout_s: float
    send_timeout_s: float
    find_tls: FindContext = no_tls
    draining: trio.Event = field(default_factory=trio.Event)


class Connection:
    """One client's connection, and the tasks of its requests.

    Anyone may cancel `reading` to end the connection. Its deadline follows, in `_limit`, from `_idle`, `half_closed`,
    `_policy` and `_wrote_after_end`. `run` closes the socket, and so does `write` after an incomplete write.

    `_answering` is the request that is being answered: `_begin` sets it, `answered` and `_end_request` clear it.
    `_last` is the latest one that was. `_body_ended` is whether all of that request has arrived.
    """

    def __init__(self, shared: Shared, stream: trio.SocketStream) -> None:
        family, remote = stream.socket.family, stream.socket.getpeername()
        self.reading = trio.CancelScope()
        self.socket = stream.socket
        host = f"[{remote[0]}]" if family == socket.AF_INET6 else remote[0]
        self.peer = Peer(client=remote[:2], server=stream.socket.getsockname()[:2], name=f"{host}:{remote[1]}")
        self.half_closed = trio.Event()
        self._shared = shared
        self._stream = stream
        self._parser = RequestParser()
        self._idle = True
        self._policy = HalfClose.FINISH
        self._wrote_after_end = False
        self._send_lock = trio.Lock()
        self._answering: Request | None = None
        self._last: Request | None = None
        self._body_ended = True
        self._refused = False
        self._turn: trio.Event | None = None  # for which the reading waits
        self._input_ended = False
        self._working = trio.CancelScope()
        self._work: trio.Event | None = None  # for which the worker waits
        context = shared.find_tls()
        self._tls = None if context is None else Tls(context)
        self.secure = self._tls is not None
        self._early = b""  # what came with the end of the handshake
        self._nursery: trio.Nursery

    def __repr__(self) -> str:
        return f"<Connection {self.peer.name} {'idle' if self._idle else 'busy'}>"

    async def run(self) -> None:
        """Serve the connection until it ends, then close the socket. Raises nothing but Cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._become(idle=True)
                left = await self._read()
                await self._end_request()
                if not left:
                    await self._linger()
                self._close()
                # An ordinary request's application has been told that its client has left, and ends in its own time.
                self._working.cancel()
        except* OSError as group:
            logger.debug("%s: %s", self.peer.name, group.exceptions)
        except* Exception:
            logger.exception("%s: unexpected error; this connection is closed, the others go on", self.peer.name)
        finally:
            self._close()

    def drain(self) -> None:
        """End the connection now if it is idle. Otherwise it ends after its answer."""
        if self._idle:
            self.reading.cancel()

    @property
    def idle_until(self) -> float:
        """When the connection ends if it stays idle; infinite if it is not idle."""
        return self.reading.deadline if self._idle and not self.reading.cancel_called else float("inf")

    # Reading.

    async def _read(self) -> bool:
        """Read requests until the connection ends; return whether the client ended it."""
        with self.reading:
            if self._tls is not None and not await self._shake_hands(self._tls):
                return True
            while True:
                data = await self._receive()
                if data is None:
                    return True
                if not data:
                    await self._input_has_ended()
                    return True
                for event in self._parser.feed(data):
                    await self._take(event)
        return False

    async def _receive(self) -> bytes | None:
        """What the client has sent, b"" at the end of its input, None if the connection is broken."""
        if self._early:
            data, self._early = self._early, b""
            return data
        tls = self._tls
        while True:
            if tls is not None and tls.ended:
                return b""
            try:
                await trio.lowlevel.wait_readable(self.socket)
                data = os.read(self.socket.fileno(), _RECEIVE_BYTES)
                if tls is None or not data:
                    return data
                if data := tls.decode(data):
                    return data
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                return None

    async def _shake_hands(self, tls: Tls) -> bool:
        """Begin TLS; return whether that worked. A client that speaks plain HTTP is told so."""
        done = False
        while not done:
            received = await self._stream.receive_some()
            try:
                done, reply = tls.shake_hands(received)
                if not received:
                    return False
                await self._stream.send_all(reply)
            except ssl.SSLError as error:
                await self._refuse_tls(tls, error)
                return False
        self._early = tls.decode(b"")
        if tls.lacks_certificate and not _is_this_host(self.socket.getpeername()[0]):
            complaint = "This node serves only clients that show a certificate of its authority (tls_client_ca)."
            await self._refuse(BadRequest(status=403, complaint=complaint, answers_head=False))
            return False
        return True

    async def _refuse_tls(self, tls: Tls, error: ssl.SSLError) -> None:
        logger.debug("%s: TLS failed: %s", self.peer.name, error)
        alert = tls.goodbye()
        if error.reason == "HTTP_REQUEST":
            self._tls = None
            complaint = "This address speaks TLS: use https:// instead of http://."
            await self._refuse(BadRequest(status=400, complaint=complaint, answers_head=False))
        else:
            await self._stream.send_all(alert)

    async def _take(self, event: RequestEvent) -> None:
        match event:
            case bytes():
                if isinstance(self._answering, Exchange):
                    self._answering.body(event)
                elif self._answering is not None:
                    await self._answering.body(event)
            case EndOfBody():
                self._body_ended = True
                if isinstance(self._answering, Exchange):
                    self._answering.end_of_body()
                elif self._answering is not None:
                    await self._answering.end_of_body()
            case RequestHead():
                await self._wait_for_its_turn()
                await self._begin(event)
            case BadRequest():
                if self._body_ended:
                    await self._wait_for_its_turn()
                await self._refuse(event)

    async def _wait_for_its_turn(self) -> None:
        """Wait until the request before is answered.

        Nothing reads the socket meanwhile, so a client that leaves would be noticed only after the answer.
        """
        if self._answering is None:
            return
        self._turn = trio.Event()
        async with trio.open_nursery() as nursery:
            name = f"watch for hang-up {self.peer.name}"
            nursery.start_soon(self._end_when_the_client_leaves, name=name)
            await self._turn.wait()
            nursery.cancel_scope.cancel()
        self._turn = None

    async def _begin(self, head: RequestHead) -> None:
        self._become(idle=False)
        self._body_ended = False
        shared = self._shared
        path = head.target.partition(b"?")[0]
        handler = shared.find_handler(head.method, path)
        if handler is not None:
            self._answering = self._last = Exchange(head, path, handler, self)
            self._start_work()
        else:
            ordinary = await shared.ordinary_road.request(head, self, self._nursery)
            self._answering = self._last = ordinary
            await ordinary.begin()

    async def _refuse(self, bad: BadRequest) -> None:
        """Answer what is no request, and end the connection. An answer that has begun stays truncated."""
        self._refused = True
        begun = self._answering is not None and self._answering.response.started
        await self._end_request()
        if begun:
            self.reading.cancel()
            return
        status, headers, body = error_response(bad.status, bad.complaint, uuid.uuid4().hex)
        fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        fields.append((b"content-length", b"%d" % len(body)))
        response = ResponseWriter(is_head=bad.answers_head)
        await self.write(response.head(status, fields, close=True) + response.body(body) + response.end())
        self.reading.cancel()

    async def _input_has_ended(self) -> None:
        """Return when the client has left. If it stays for its answer, the end of the answer cancels `reading`."""
        if not self._body_ended or self._parser.in_head:
            ended = "The request is malformed: the connection ended before it did."
            await self._refuse(BadRequest(status=400, complaint=ended, answers_head=False))
        elif self._answering is not None:
            self._input_ended = True
            await self._outlast_the_input()

    async def _outlast_the_input(self) -> None:
        self.half_closed.set()
        self._limit()
        await connection_reset(self.socket)

    async def _end_when_the_client_leaves(self) -> None:
        """End the reading when the client has left, while unread bytes may be before the end of its input."""
        await input_ended(self.socket)
        await self._outlast_the_input()
        self.reading.cancel()

    # Requests.

    @property
    def draining(self) -> bool:
        """Whether the server is shutting down, so that each connection ends after its answer."""
        return self._shared.draining.is_set()

    def on_half_close(self, policy: HalfClose) -> None:
        """Set the policy of the request that is being answered."""
        self._policy = policy
        if self.half_closed.is_set():
            self._limit()

    def answered(self, request: "Request") -> None:
        """This request's answer is over, complete or not. Does nothing if the connection has given it up."""
        if self._answering is not request:
            return
        self._answering = None
        reusable = request.response.complete and request.response.keep_alive and self._body_ended
        if not reusable or self._input_ended or self.draining:
            self.reading.cancel()
            return
        self._become(idle=True)
        if self._turn is not None:
            self._turn.set()

    async def _end_request(self) -> None:
        """Give up the request that is being answered, if there is one."""
        request, self._answering = self._answering, None
        if isinstance(request, Exchange):
            self._working.cancel()
        elif request is not None:
            await request.close()

    def _start_work(self) -> None:
        """Let the worker serve the exchange. One task serves all of a connection, so that none has to be started."""
        if self._work is None:
            self._nursery.start_soon(self._serve_exchanges, name=f"inference {self.peer.name}")
        else:
            self._work.set()

    async def _serve_exchanges(self) -> None:
        with self._working:
            while True:
                self._work = trio.Event()
                # It is gone already if what came with its head was malformed.
                if isinstance(self._answering, Exchange):
                    await self._serve(self._answering)
                await self._work.wait()

    async def _serve(self, exchange: Exchange) -> None:
        try:
            await exchange.handler(exchange)
        except* AbortResponse as group:
            logger.debug("%s: answer aborted: %s", self.peer.name, group.exceptions)
        except* Exception:
            request = exchange.request
            logger.exception("%s: %s %r failed", self.peer.name, request.method, request.target)
        # An answer that is incomplete by now ends with the connection, without its last chunk.
        self.answered(exchange)

    def _become(self, *, idle: bool) -> None:
        self._idle = idle
        self._policy = HalfClose.FINISH
        self._limit()

    def _limit(self) -> None:
        """Set how long the connection may go on from now."""
        if self._idle:
            left_s = self._shared.keep_alive_timeout_s
        elif not self.half_closed.is_set() or (self._wrote_after_end and self._policy is HalfClose.STREAM):
            left_s = float("inf")
        else:
            left_s = self._policy.bound_s
        self.reading.deadline = trio.current_time() + left_s

    # Writing.

    async def write(self, data: bytes) -> None:
        """Write all of it, or end the connection: nothing can follow an incomplete write.

        So it needs no shield, and a client that does not read delays neither the daemon nor its shutdown. Waits only if
        the client does not keep up.
        """
        if not data:
            return
        complete = False
        try:
            if self._tls is not None:
                data = self._tls.encode(data)
            written = 0 if self._send_lock.locked() else self._write_now(data)
            if written < len(data):
                await self._write_rest(memoryview(data)[written:])
            complete = True
            self._note_write()
        except trio.TooSlowError:
            logger.warning(
                "%s: client read too little for %g s; closing the connection",
                self.peer.name,
                self._shared.send_timeout_s,
            )
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("%s: client left: %s", self.peer.name, error)
        finally:
            if not complete:
                self.reading.cancel()
                self._reset()

    def _write_now(self, data: bytes) -> int:
        """Write what the socket takes at once; return how many bytes that was."""
        try:
            return os.write(self.socket.fileno(), data)
        except BlockingIOError:
            return 0

    async def _write_rest(self, data: memoryview) -> None:
        async with self._send_lock:
            for start in range(0, len(data), _SEND_BYTES):
                with trio.fail_after(self._shared.send_timeout_s):
                    await self._stream.send_all(data[start : start + _SEND_BYTES])

    def _note_write(self) -> None:
        if self.half_closed.is_set() and not self._wrote_after_end:
            self._wrote_after_end = True
            if self._policy is HalfClose.STREAM:
                self._limit()

    # The end.

    async def _linger(self) -> None:
        """Read on while the client sends: to close with unread bytes is a reset, and that can overtake the answer."""
        if self._body_ended and not self._refused:
            return
        with trio.move_on_after(_LINGER_S):
            try:
                self._say_goodbye()
                async with self._send_lock:
                    await self._stream.send_eof()
                while await self._receive():
                    continue
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    def _close(self) -> None:
        if self._last is not None and self._last.response.ends_by_closing:
            self._reset()
        self._say_goodbye()
        self.socket.close()

    def _say_goodbye(self) -> None:
        """Tell a client of TLS that the answer ends as it should; without that, it may take it for truncated."""
        if self._tls is not None and self.socket.fileno() != -1 and not self._send_lock.locked():
            with suppress(OSError):
                os.write(self.socket.fileno(), self._tls.goodbye())

    def _reset(self) -> None:
        """Close so that the client can't mistake a truncated answer for a complete one."""
        # The socket may be closed already. On macOS, one that the client has reset rejects the option.
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.socket.close()


def _is_this_host(address: str) -> bool:
    """Whether a client's address is one of loopback; an IPv4 client of a socket for both has one of IPv6 around it."""
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
