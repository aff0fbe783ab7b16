"""The server of the front over pairs of sockets, which need no address, so that it runs in virtual time."""

import socket
from typing import Any, cast

import trio

import nodeagent.front.ordinary  # noqa: F401 (its import takes real time)
from fakes.one_model_node import OneModelNode
from fakes.raw_server import Handler, read_request
from fakes.serving import Peer
from fakes.upstream import UpstreamServers
from nodeagent.front.server import serve
from nodeagent.llama_server import relay
from nodeagent.llama_server.stall_watch import Observation, Worker, observe, watch
from nodeagent.scheduling.seam import ServerState, ServerView


def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of one connection."""
    ours, theirs = (trio.socket.from_stdlib_socket(end) for end in socket.socketpair())
    return trio.SocketStream(ours), trio.SocketStream(theirs)


class PairListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts what `connect` makes."""

    def __init__(self) -> None:
        self._made, self._accepted = trio.open_memory_channel[trio.SocketStream](100)

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


class EventServer:
    """A server that answers each request with so many events, one each `every_s`, which say their number.

    What changes: `sent_bytes` (of events) and `serving`, the requests that it works on.
    """

    def __init__(self, events: int, every_s: float, *, event_bytes: int = 16) -> None:
        self.sent_bytes = 0
        self.serving = 0
        self._events = events
        self._every_s = every_s
        self._event_bytes = event_bytes

    async def __call__(self, stream: trio.SocketStream) -> None:
        while await read_request(stream):
            self.serving += 1
            try:
                await self._answer(stream)
            except trio.BrokenResourceError:
                return
            finally:
                self.serving -= 1

    async def _answer(self, stream: trio.SocketStream) -> None:
        await stream.send_all(_STREAM)
        for number in range(self._events):
            await trio.sleep(self._every_s)
            event = (b"data: %d " % number).ljust(self._event_bytes, b".") + b"\n\n"
            await stream.send_all(_chunk(event))
            self.sent_bytes += len(event)
        await stream.send_all(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def start_pair_serving(nursery: trio.Nursery, node: OneModelNode, **options: Any) -> PairListener:
    """Serve the node's front in the nursery, with the default time-outs but for these options."""
    listener = PairListener()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        shutdown = trio.Event()
        listeners = [cast(Any, listener)]
        await serve(node.front, listeners, shutdown=shutdown, task_status=task_status, **node.options, **options)

    await nursery.start(run, name="serve")
    return listener


def watch_for_stalls(nursery: trio.Nursery, upstream: relay.Upstream, stall_timeout_s: float) -> list[str]:
    """Watch this server in the nursery, seeing nothing of it but its answers; returns a list of what is found."""
    stalls: list[str] = []
    worker = Worker(
        child_id="cpu:0/a", generation=1, pid=1, upstream=upstream, stall_timeout_s=stall_timeout_s, counts_cpu=False
    )

    async def look(worker: Worker, *, with_counts: bool) -> Observation:
        return await observe(worker, with_counts=False)

    async def run() -> None:
        await watch(lambda: [worker], lambda _child, _generation, reason: stalls.append(reason), observe=look)

    nursery.start_soon(run, name="watch for stalls")
    return stalls
