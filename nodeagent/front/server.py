"""The HTTP/1.1 server under the front: its listeners, its settings of hypercorn, and how it ends.

hypercorn parses requests and speaks ASGI; the connections are our own (`front/connection.py`).
"""

import errno
import logging
import socket
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext

from nodeagent.errors import StartupError
from nodeagent.front.connection import AbortResponse, ASGIApp, Connection, Shared
from nodeagent.front.protocol import HEADERS_MAX_BYTES

__all__ = ["ASGIApp", "AbortResponse", "bind", "serve"]

logger = logging.getLogger(__name__)

_BACKLOG = 1024


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
    context = WorkerContext(max_requests=None)
    server = _Server(Shared(app, _settings(), context, keep_alive_timeout_s, send_timeout_s))
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            await accepting.start(partial(trio.serve_listeners, server.handle, listeners, handler_nursery=connections))
            task_status.started()
            await shutdown.wait()
            accepting.cancel_scope.cancel()
        await server.drain()
        connections.cancel_scope.deadline = trio.current_time() + graceful_timeout_s


class _Server:
    """The connections. `drain` alone sets `terminated`; `handle` alone changes `connections`."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._connections: set[Connection] = set()

    async def handle(self, stream: trio.SocketStream) -> None:
        """One connection from accept to close. Its own errors end it alone."""
        try:
            connection = Connection(self._shared, stream)
        except OSError as error:
            logger.debug("a client left before it was heard: %s", error)
            return
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.remove(connection)

    async def drain(self) -> None:
        """Let each connection end with the answer that it is at; the idle ones end now."""
        await self._shared.context.terminated.set()
        for connection in self._connections:
            connection.drain()


def _settings() -> Config:
    return _hypercorn_config(
        accesslog=None,
        # A logger that is handed over is used as it is; else hypercorn would put a handler of its own on stderr.
        errorlog=logging.getLogger("hypercorn.error"),
        h11_max_incomplete_size=HEADERS_MAX_BYTES,
        include_server_header=False,
    )


def _hypercorn_config(**settings: object) -> Config:
    """Make hypercorn's configuration; it takes a misspelt setting silently, so each name is checked here."""
    config = Config()
    for name, value in settings.items():
        if not hasattr(config, name):
            raise AttributeError(f"hypercorn has no setting {name!r}")
        setattr(config, name, value)
    return config
