"""One client's connection: TLS, the protocol that is spoken on it, how long it may be idle, and how it ends.

    handshake ──> reading ──(idle too long, answer over and not kept alive, client left, shutdown while idle)──> closed

`http1.py` and `http2.py` have what differs between the protocols. A client chooses HTTP/2 in the handshake of TLS
(ALPN); without TLS there is HTTP/1.1 only.

hypercorn's own TCPServer is not used: every method through which a client can harm the daemon would have to be
overridden (README.md lists these traps). Here a connection ends in one way, whoever ends it: the cancel scope around
the reading is cancelled, then one place closes the socket.
"""

import ipaddress
import logging
import socket
import ssl
from importlib import import_module
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from nodeagent.front.exchange import FindHandler, Peer
from nodeagent.front.http1 import Http1, refusal
from nodeagent.front.ordinary_road import OrdinaryRoad
from nodeagent.front.protocol import BadRequest
from nodeagent.front.tls import FindContext, Tls, no_tls
from nodeagent.front.transport import PlainHttp, Transport

if TYPE_CHECKING:
    from nodeagent.front.http2 import Http2

logger = logging.getLogger(__name__)

_PLAIN_HTTP: Final = "This address speaks TLS: use https:// instead of http://."
_NO_CERTIFICATE: Final = "This node serves only clients that show a certificate of its authority (tls_client_ca)."


class Http2Road:
    """Makes what speaks HTTP/2. It is imported for the first client that does, in a thread: that takes a tenth of a
    second and 4 MiB. What changes: `_make`, once, in `speak`."""

    def __init__(self) -> None:
        self._opening = trio.Lock()
        self._make: type[Http2] | None = None

    async def speak(self, connection: "Connection", stranger: BadRequest | None) -> "Http2":
        """Begin to speak it on this connection."""
        if self._make is None:
            async with self._opening:  # another thread would find the module half imported
                module = await trio.to_thread.run_sync(import_module, "nodeagent.front.http2")
                self._make = module.Http2
        return self._make(connection, stranger)


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """What all connections of a server share. `draining` is set when the server drains."""

    ordinary_road: OrdinaryRoad
    find_handler: FindHandler
    keep_alive_timeout_s: float
    send_timeout_s: float
    find_tls: FindContext = no_tls
    http2_road: Http2Road = msgspec.field(default_factory=Http2Road)
    draining: trio.Event = msgspec.field(default_factory=trio.Event)


class Connection:
    """One client's connection.

    Anyone may cancel `reading` to end it; its deadline is the protocol's to set. `run` closes the socket. What changes:
    `idle` and `_idle_until`, in `become_idle` and `become_busy` (called by the protocol); `_protocol`, once, after the
    handshake.
    """

    def __init__(self, shared: Shared, stream: trio.SocketStream) -> None:
        family, remote = stream.socket.family, stream.socket.getpeername()
        context = shared.find_tls()
        host = f"[{remote[0]}]" if family == socket.AF_INET6 else remote[0]
        self.peer = Peer(client=remote[:2], server=stream.socket.getsockname()[:2], name=f"{host}:{remote[1]}")
        self.reading = trio.CancelScope()
        self.socket = stream.socket
        self.shared = shared
        self.secure = context is not None
        self.transport = Transport(stream, None if context is None else Tls(context), shared.send_timeout_s)
        self.nursery: trio.Nursery
        self._protocol: Http1 | Http2 | None = None
        self.become_idle()

    def __repr__(self) -> str:
        return f"<Connection {self.peer.name} {'idle' if self.idle else 'busy'}>"

    async def run(self) -> None:
        """Serve the connection until it ends, then close the socket. Raises nothing but Cancelled."""
        try:
            async with trio.open_nursery() as self.nursery:
                left = await self._read()
                if self._protocol is not None:
                    await self._protocol.end(left=left)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as group:
            logger.debug("%s: %s", self.peer.name, group.exceptions)
        except* Exception:
            logger.exception("%s: unexpected error; this connection is closed, the others go on", self.peer.name)
        finally:
            if self._protocol is None:
                self.transport.close()
            else:
                self._protocol.close()

    # What the server asks.

    def end_if_idle(self) -> None:
        """End the connection now, but not while it serves a request."""
        if self.idle:
            self.reading.cancel()

    def drain(self) -> None:
        """End the connection now if it is idle, else after the answers to the requests that it serves."""
        if self.idle:
            self.reading.cancel()
        elif self._protocol is not None:
            self._protocol.drain()

    @property
    def idle_until(self) -> float:
        """When the connection is to end if it stays idle; infinite if it is not idle, or ends already."""
        return float("inf") if self.reading.cancel_called else self._idle_until

    # What the protocol tells.

    def become_idle(self) -> None:
        """No request is served from now on: the server ends the connection unless one comes within the keep-alive
        timeout."""
        self.idle = True
        self._idle_until = trio.current_time() + self.shared.keep_alive_timeout_s

    def become_busy(self) -> None:
        """A request is served from now on, for as long as it takes."""
        self.idle = False
        self._idle_until = float("inf")

    # The beginning.

    async def _read(self) -> bool:
        """Read until the connection ends; return whether the client ended it."""
        with self.reading:
            tls = self.transport.tls
            if tls is None:
                self._protocol = Http1(self)
            elif not await self._shake_hands(tls):
                return True
            if self._protocol is not None:
                return await self._protocol.read()
        return False

    async def _shake_hands(self, tls: Tls) -> bool:
        """Begin TLS and the protocol that is spoken in it; return whether that worked."""
        try:
            if not await self.transport.shake_hands(tls):
                return False
        except PlainHttp:
            await self._refuse(BadRequest(status=400, complaint=_PLAIN_HTTP, answers_head=False))
            return False
        except ssl.SSLError as error:
            logger.debug("%s: TLS failed: %s", self.peer.name, error)
            return False
        stranger = None
        if tls.lacks_certificate and not _is_this_host(self.socket.getpeername()[0]):
            stranger = BadRequest(status=403, complaint=_NO_CERTIFICATE, answers_head=False)
        if tls.speaks_http2:
            self._protocol = await self.shared.http2_road.speak(self, stranger)
        elif stranger is not None:
            await self._refuse(stranger)
            return False
        else:
            self._protocol = Http1(self)
        return True

    async def _refuse(self, bad: BadRequest) -> None:
        self.transport.put(refusal(bad))
        await self.transport.linger()


def _is_this_host(address: str) -> bool:
    """Whether a client's address is one of loopback; an IPv4 client of a socket for both has one of IPv6 around it."""
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback
