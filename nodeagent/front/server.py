"""The HTTP server under the front: its listeners, and the graceful shutdown.

hypercorn speaks ASGI; the connections are our own (`front/connection.py`).
"""

import errno
import logging
import socket
from typing import Any

import trio

from nodeagent.containment import Containment
from nodeagent.errors import StartupError
from nodeagent.front.accepting import Acceptor
from nodeagent.front.connection import Connection, Shared
from nodeagent.front.exchange import AbortResponse, ASGIApp, FindHandler
from nodeagent.front.ordinary_road import OrdinaryRoad
from nodeagent.front.tls import FindContext, no_tls

__all__ = ["ASGIApp", "AbortResponse", "OpenConnections", "bind", "serve"]

logger = logging.getLogger(__name__)

_BACKLOG = 1024
# The least time between two looks for idle connections.
_IDLE_LOOK_S = 1.0


async def bind(host: str, port: int, *, port_key: str = "listen_port") -> tuple[list[trio.SocketListener], int]:
    """Listen on every address of `host`, all on one port, and return that port; 0 lets the system choose it.
    `port_key` is the key of the configuration that it comes from.

    Raises StartupError with one line. The caller closes the listeners unless `serve` gets them.
    """
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise StartupError(f"can't listen on {place}: {host!r} has no address ({error})") from None
    dual_stack = len({family for family, *_ in found}) == 1
    listeners: list[trio.SocketListener] = []
    try:
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            listeners.append(_listen(family, (address[0], port, *address[2:]), dual_stack=dual_stack))
            port = listeners[0].socket.getsockname()[1]
    except OSError as error:
        for listener in listeners:
            listener.socket.close()
        raise StartupError(f"can't listen on {place}: {_why(error, port_key)}") from None
    return listeners, port


def _listen(family: int, address: tuple[Any, ...], *, dual_stack: bool) -> trio.SocketListener:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # So that a restart need not wait until the kernel forgets the last run's connections. Never SO_REUSEPORT:
        # two agents would share the port unnoticed.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
        sock.bind(address)
        sock.listen(_BACKLOG)
        return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    except BaseException:
        sock.close()
        raise


def _why(error: OSError, port_key: str) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"another process already listens there (listen_host, {port_key})"
        case errno.EADDRNOTAVAIL:
            return "no interface of this host has that address (listen_host)"
        case errno.EACCES:
            return f"ports below 1024 need a privilege that this process does not have ({port_key})"
        case _:
            return str(error)


def _all_ordinary(_method: str, _path: bytes) -> None:
    """No request takes the fast road."""


async def serve(
    app: ASGIApp,
    listeners: list[trio.SocketListener],
    *,
    shutdown: trio.Event,
    find_handler: FindHandler = _all_ordinary,
    keep_alive_timeout_s: float = 75.0,
    graceful_timeout_s: float = 30.0,
    send_timeout_s: float = 60.0,
    find_tls: FindContext = no_tls,
    connections: "OpenConnections | None" = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` (ASGI 3, scope `http` only: no lifespan, no WebSockets) until `shutdown`, then drain.

    At `shutdown` the listeners and the idle connections close at once, so set it only after load balancers have had
    time to use other nodes. Requests in flight get `graceful_timeout_s`; those that take longer are cut off.

    A request for which `find_handler` has a handler does not get to `app`: the handler gets it as an `Exchange`.

    `keep_alive_timeout_s` is how long a connection may be without a complete request head, from its start or from its
    last answer. It must be longer than the idle timeout of load balancers in front, or they send requests on
    connections that have just closed. `send_timeout_s` is how long a client may take to read 64 KiB. `find_tls` has the
    TLS of each new connection. `connections` are those that are open, for others to count.

    Cancelling closes everything at once, uncleanly. The listeners are closed however this ends.
    """
    server = _Server(
        Shared(
            ordinary_road=OrdinaryRoad(app),
            find_handler=find_handler,
            keep_alive_timeout_s=keep_alive_timeout_s,
            send_timeout_s=send_timeout_s,
            find_tls=find_tls,
        ),
        connections or OpenConnections(),
    )
    async with trio.open_nursery() as serving:
        async with trio.open_nursery() as accepting:
            acceptor = Acceptor(server, serving)
            for listener in listeners:
                accepting.start_soon(acceptor.accept_from, listener, name="accept HTTP connections")
            accepting.start_soon(server.close_idle, name="close idle connections")
            task_status.started()
            await shutdown.wait()
            accepting.cancel_scope.cancel()
        server.drain()
        serving.cancel_scope.deadline = trio.current_time() + graceful_timeout_s


class OpenConnections:
    """The connections of clients to one server. What changes: `current`, by that server."""

    def __init__(self) -> None:
        self.current: set[Connection] = set()

    def counts(self) -> dict[str, int]:
        """How many serve a request ("busy") and how many wait for one ("idle")."""
        idle = sum(connection.idle for connection in self.current)
        return {"busy": len(self.current) - idle, "idle": idle}


class _Server:
    """Serves the connections. Only `drain` sets `draining`; only `handle` changes what is in `connections`."""

    def __init__(self, shared: Shared, connections: OpenConnections) -> None:
        self._shared = shared
        self._connections = connections.current
        self._containment = Containment("serving a connection")

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one connection from accept to close. Its errors end no other."""
        with self._containment:
            try:
                await self._serve(stream)
            finally:
                await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            connection = Connection(self._shared, stream)
        except OSError as error:
            logger.debug("a client left before its connection was set up: %s", error)
            return
        trio.lowlevel.current_task().name = f"connection {connection.peer.name}"
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.remove(connection)

    async def close_idle(self) -> None:
        """Close each connection that has been idle for the keep-alive timeout.

        One task does it for all: to move a deadline with each request takes 8 us, and here a connection notes a time.
        Since it looks at every connection, it does so once a second at most, and a connection may end that much later.
        """
        pause_s = min(_IDLE_LOOK_S, self._shared.keep_alive_timeout_s / 10)
        while True:
            now = trio.current_time()
            # None that is busy now or that comes from now on is due before this.
            next_at = now + self._shared.keep_alive_timeout_s
            for connection in self._connections:
                idle_until = connection.idle_until
                if idle_until <= now:
                    connection.end_if_idle()
                elif idle_until < next_at:
                    next_at = idle_until
            await trio.sleep_until(max(next_at, now + pause_s))

    def close_longest_idle(self, *, spare: int) -> None:
        """Close the connection that has been idle the longest, if one is, but not that with descriptor `spare`."""
        others = (it for it in self._connections if it.socket.fileno() != spare)
        longest = min(others, key=lambda it: it.idle_until, default=None)
        if longest is not None:
            longest.end_if_idle()

    def drain(self) -> None:
        """End the idle connections now, and each other one after its current answer."""
        self._shared.draining.set()
        for connection in self._connections:
            connection.drain()
