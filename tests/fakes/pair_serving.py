"""The server of the front over pairs of sockets, which need no address, so that it runs in virtual time."""

import socket

import trio

import nodeagent.front.ordinary  # noqa: F401 (its import takes real time)
from fakes.raw_server import Handler
from fakes.serving import Peer
from fakes.upstream import UpstreamServers
from nodeagent.llama_server import relay
from nodeagent.scheduling.seam import ServerState, ServerView


def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of one connection."""
    ours, theirs = (trio.socket.from_stdlib_socket(end) for end in socket.socketpair())
    return trio.SocketStream(ours), trio.SocketStream(theirs)


class PairListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts what `connect` makes."""

    def __init__(self) -> None:
        self._made, self._accepted = trio.open_memory_channel[trio.SocketStream](10)

    def connect(self) -> Peer:
        """A client's end of a new connection."""
        client, server = pair()
        # The front wants the addresses of both ends.
        setattr(server.socket, "getpeername", lambda: ("192.0.2.9", 50000))  # noqa: B010
        setattr(server.socket, "getsockname", lambda: ("192.0.2.1", 8081))  # noqa: B010
        self._made.send_nowait(server)
        return Peer(client)

    async def accept(self) -> trio.SocketStream:
        return await self._accepted.receive()

    async def aclose(self) -> None:
        self._made.close()
        self._accepted.close()


class PairUpstream(relay.Upstream):
    """A real relay to a server that is a function, as in `raw_server`."""

    def __init__(self, nursery: trio.Nursery, handler: Handler) -> None:
        super().__init__("192.0.2.2:1", "key")
        self._nursery = nursery
        self._handler = handler

    async def _connect(self) -> relay._Connection:
        ours, theirs = pair()
        self._nursery.start_soon(self._serve, theirs, name="server")
        return relay._Connection(self.address, ours)

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            await self._handler(stream)


class PairServers(UpstreamServers):
    """One device's servers; each is that upstream."""

    def __init__(self, nursery: trio.Nursery, upstream: relay.Upstream) -> None:
        super().__init__(nursery)
        self.upstream = upstream

    def _view(self, view: ServerView[str]) -> ServerView[relay.Upstream]:
        return ServerView(
            model_id=view.model_id,
            state=view.state,
            generation=view.generation,
            since=view.since,
            slots=view.slots,
            spawned_at=view.spawned_at,
            endpoint=self.upstream if view.state is ServerState.READY else None,
        )
