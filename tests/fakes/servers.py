"""A device whose servers are a table and a clock: speaks the seam that the real ones speak."""

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import trio

from nodeagent.errors import BackendUnavailable, OutOfDeviceMemory
from nodeagent.scheduling.seam import MakeRoom, Obstacle, ServerState, ServerView


@dataclass
class FakeServers:
    """Loads take `load_s` of virtual time; a model in `broken` fails its start at the end of that time.

    One in `missing` has no file. `history` lists what was done, in order. Before a load stops another server,
    `hesitates_s` pass, as real ones take to look at the model's file. A server of a model takes what `sizes` says of
    `total_bytes`; without that, the free memory is `free_bytes`. What it really takes is in `needs`, if that is not
    what `sizes` says: with less than that free its load runs out of memory.
    """

    load_s: float = 1.0
    hesitates_s: float = 0.0
    slots: int = 1
    broken: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    obstacles: dict[str, Obstacle] = field(default_factory=dict)
    free_bytes: int | None = None
    room: bool = True
    idle_unload_s: float | None = None
    history: list[str] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    looks: int = 0
    on_change: Callable[[], None] = lambda: None
    sizes: dict[str, int] = field(default_factory=dict)
    total_bytes: int | None = None
    needs: dict[str, int] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    returning: set[str] = field(default_factory=set)
    servers: dict[str, ServerView[str]] = field(default_factory=dict)
    _generations: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def views(self) -> list[ServerView[str]]:
        self.looks += 1
        return list(self.servers.values())

    def view(self, model_id: str) -> ServerView[str] | None:
        return self.servers.get(model_id)

    def obstacle(self, model_id: str) -> Obstacle | None:
        return self.obstacles.get(model_id)

    def has_room(self, model_id: str, least_bytes: int = 0) -> bool:
        return self.room and (self.total_bytes is None or least_bytes <= self.total_bytes)

    def memory_free_bytes(self) -> int | None:
        if self.total_bytes is None:
            return self.free_bytes
        return self.total_bytes - sum(self.needs.get(it, self.bytes_of(it)) for it in self.servers)

    def bytes_of(self, model_id: str) -> int:
        return self.sizes.get(model_id, 0)

    @property
    def current(self) -> ServerView[str] | None:
        """The server that was started last."""
        return next(reversed(self.servers.values()), None)

    async def ensure(self, model_id: str, beside: Collection[str] = (), make_room: MakeRoom | None = None) -> None:
        await trio.sleep(self.hesitates_s)
        if make_room is not None:
            await make_room()
        for other in [other for other in self.servers if other != model_id and other not in beside]:
            self.history.append(f"stop {other}")
            self._remove(other)
        if model_id not in self.servers:
            self.history.append(f"start {model_id}")
            self._put(self._server(model_id, ServerState.STARTING))
        spawned_at = self.servers[model_id].spawned_at
        assert spawned_at is not None
        await trio.sleep_until(spawned_at + self.load_s)
        if model_id not in self.servers:
            raise BackendUnavailable(model_id, "was stopped")
        free_bytes = self.memory_free_bytes()
        if model_id in self.needs and free_bytes is not None and free_bytes < 0:
            self._remove(model_id)
            free_bytes += self.needs[model_id]
            self.history.append(f"{model_id} runs out of memory")
            self.sizes[model_id] = free_bytes + 1
            if not self.servers:
                self.obstacles[model_id] = Obstacle(f"needs more than {free_bytes}")
            raise OutOfDeviceMemory(model_id, f"out of device memory: {free_bytes} free", free_bytes + 1, 60.0, ())
        if model_id in self.broken:
            self._remove(model_id)
            raise BackendUnavailable(model_id, "exited with code 1", 4.0)
        if self.servers[model_id].state is ServerState.STARTING:
            self.come_up(model_id)

    async def prepare(self, model_id: str) -> None:
        self.prepared.append(model_id)
        if model_id in self.missing:
            raise BackendUnavailable(model_id, "no such file")

    async def stop(self, model_id: str) -> None:
        if model_id in self.servers:
            self.history.append(f"stop {model_id}")
            self._remove(model_id)

    async def settled(self) -> None:
        """At once."""

    def come_up(self, model_id: str | None = None) -> None:
        """The server that is starting is ready now; by default the one that was started last."""
        server = self._named(model_id)
        self._put(self._server(server.model_id, ServerState.READY, server.generation))

    def crash(self, model_id: str | None = None) -> None:
        """The server dies, and a supervisor starts it again at once; by default the one that was started last."""
        server = self._named(model_id)
        self.history.append(f"crash {server.model_id}")
        self._put(self._server(server.model_id, ServerState.STARTING))

    def _named(self, model_id: str | None) -> ServerView[str]:
        server = self.current if model_id is None else self.servers[model_id]
        assert server is not None
        return server

    def _server(self, model_id: str, state: ServerState, generation: int | None = None) -> ServerView[str]:
        generation = generation or next(self._generations)
        now = trio.current_time()
        endpoint = f"{model_id}#{generation}" if state is ServerState.READY else None
        return ServerView(
            model_id=model_id,
            state=state,
            generation=generation,
            since=now,
            slots=self.slots,
            spawned_at=now,
            endpoint=endpoint,
            idle_unload_s=self.idle_unload_s,
            pinned=model_id in self.pinned,
            returns=model_id in self.returning,
        )

    def _put(self, server: ServerView[str]) -> None:
        self.servers[server.model_id] = server
        self.on_change()

    def _remove(self, model_id: str) -> None:
        del self.servers[model_id]
        self.on_change()
