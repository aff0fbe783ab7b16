"""Servers without processes or sockets: their endpoints answer by a script, in virtual time."""

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, cast

import trio

from fakes.servers import FakeServers
from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.relay import SentRequest, Upstream, UpstreamResponse
from nodeagent.scheduling.seam import MakeRoom, Obstacle, ServerState, ServerView

# A killed server's sockets close this long before its exit is known.
EXIT_SHOWS_AFTER_S = 0.05

OUT_OF_MEMORY = "out of memory (limit 1073741824 bytes): it was killed by SIGKILL"


class Loss(Enum):
    """Why a connection breaks."""

    CRASH = auto()
    STOP = auto()  # someone asked the server to stop
    SERVER_LIVES = auto()
    OUT_OF_MEMORY = auto()


@dataclass(frozen=True, kw_only=True)
class Act:
    """What a server does with one request: it sends a chunk every `chunk_s`. With a `loss`, the connection breaks after
    `lost_after` chunks; 0 is before the first byte."""

    chunks: tuple[bytes, ...] = (b'{"choices": []}',)
    chunk_s: float = 0.0
    status: int = 200
    event_stream: bool = False
    loss: Loss | None = None
    lost_after: int = 0


@dataclass(frozen=True)
class Sent:
    """A request that reached a server."""

    generation: int
    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


class FakeUpstream(Upstream):
    """`on_request` returns the act for each request, `on_loss` is called when a connection breaks."""

    def __init__(self, on_request: Callable[[Sent], Act], on_loss: Callable[[Loss], None], generation: int) -> None:
        super().__init__(f"127.0.0.1:{generation}", "key")
        self.on_loss = on_loss
        self._on_request = on_request
        self._generation = generation

    def request(self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> SentRequest:
        return FakeSentRequest(self, Sent(self._generation, method, path, headers, body))

    def begin(self, sent: Sent) -> "FakeResponse":
        return FakeResponse(self, self._on_request(sent))


class FakeSentRequest(SentRequest):
    """Its `response` goes on where it was when it was cancelled, as a real one."""

    def __init__(self, upstream: FakeUpstream, sent: Sent) -> None:
        super().__init__(upstream, b"")
        self._fake = upstream
        self._what = sent
        self._playing: FakeResponse | None = None

    async def response(self) -> UpstreamResponse:
        if self._playing is None:
            self._playing = self._fake.begin(self._what)
        try:
            await self._playing.begin()
        except UpstreamLost:
            self.close()
            raise
        return self._playing

    def close(self) -> None:
        if self._playing is not None:
            self._playing.close()


class FakeResponse(UpstreamResponse):
    """Plays its act. It counts in the upstream's `in_flight` until it is closed, as a real one."""

    def __init__(self, upstream: FakeUpstream, act: Act) -> None:
        super().__init__(upstream, cast(Any, None))
        upstream.in_flight += 1
        self.status = act.status
        self.headers = [(b"content-type", b"text/event-stream" if act.event_stream else b"application/json")]
        self.event_stream = act.event_stream
        self._fake = upstream
        self._act = act
        self._played = 0
        self._next_at: float | None = None
        self._open = True
        self._closed = trio.Event()

    async def begin(self) -> None:
        self._first = await self._chunk() or b""

    def close(self) -> None:
        if self._open:
            self._open = False
            self._fake.in_flight -= 1
            self._closed.set()

    async def _chunk(self) -> bytes | None:
        if self._next_at is None:
            self._next_at = trio.current_time() + self._act.chunk_s
        with trio.move_on_at(self._next_at):  # whoever waits is told that the response was closed, as of a real one
            await self._closed.wait()
            raise UpstreamLost(self._fake.address, "the connection broke")
        self._next_at = None
        if self._act.loss is not None and self._played == self._act.lost_after:
            self._fake.on_loss(self._act.loss)
            raise UpstreamLost(self._fake.address, "closed the connection before its answer was complete")
        if self._played == len(self._act.chunks):
            self.close()
            return None
        self._played += 1
        return self._act.chunks[self._played - 1]


class UpstreamServers:
    """One device's `FakeServers`, whose endpoints are `FakeUpstream`s. `acts` are played in order, then the default.

    `sent` lists what the servers got. The nursery runs what happens to a server after its connections broke.
    """

    def __init__(self, nursery: trio.Nursery, *acts: Act) -> None:
        self.fake = FakeServers()
        self.acts = deque(acts)
        self.sent: list[Sent] = []
        self.upstreams: dict[int, FakeUpstream] = {}
        self._nursery = nursery

    @property
    def in_flight(self) -> int:
        """The requests that servers work on, those of dead servers included."""
        return sum(upstream.in_flight for upstream in self.upstreams.values())

    def views(self) -> list[ServerView[Upstream]]:
        return [self._view(view) for view in self.fake.views()]

    def view(self, model_id: str) -> ServerView[Upstream] | None:
        view = self.fake.view(model_id)
        return None if view is None else self._view(view)

    async def ensure(self, model_id: str, beside: Collection[str] = (), make_room: MakeRoom | None = None) -> None:
        await self.fake.ensure(model_id, beside, make_room)

    async def prepare(self, model_id: str) -> None:
        await self.fake.prepare(model_id)

    async def stop(self, model_id: str) -> None:
        await self.fake.stop(model_id)

    def obstacle(self, model_id: str) -> Obstacle | None:
        return self.fake.obstacle(model_id)

    async def settled(self) -> None:
        await self.fake.settled()

    def has_room(self, model_id: str, least_bytes: int = 0) -> bool:
        return self.fake.has_room(model_id, least_bytes)

    def memory_free_bytes(self) -> int | None:
        return self.fake.memory_free_bytes()

    def bytes_of(self, model_id: str) -> int:
        return self.fake.bytes_of(model_id)

    def _view(self, view: ServerView[str]) -> ServerView[Upstream]:
        return ServerView(
            model_id=view.model_id,
            state=view.state,
            generation=view.generation,
            since=view.since,
            slots=view.slots,
            spawned_at=view.spawned_at,
            endpoint=self._upstream(view.generation) if view.state is ServerState.READY else None,
        )

    def _upstream(self, generation: int) -> FakeUpstream:
        if generation not in self.upstreams:
            self.upstreams[generation] = FakeUpstream(self._play, self._lost, generation)
        return self.upstreams[generation]

    def _play(self, sent: Sent) -> Act:
        self.sent.append(sent)
        return self.acts.popleft() if self.acts else Act()

    def _lost(self, loss: Loss) -> None:
        if loss is Loss.SERVER_LIVES:
            return
        assert self.fake.current is not None
        upstream = self.upstreams[self.fake.current.generation]
        upstream.ends_as_asked = loss is Loss.STOP
        upstream.blameless_end = OUT_OF_MEMORY if loss is Loss.OUT_OF_MEMORY else None
        self._nursery.start_soon(self._show_exit, upstream, name=f"exit of {upstream.address}")

    async def _show_exit(self, upstream: FakeUpstream) -> None:
        await trio.sleep(EXIT_SHOWS_AFTER_S)
        upstream.close()
        self.fake.crash()
