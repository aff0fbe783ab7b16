"""A device whose servers are a table and a clock: speaks the seam that the real ones speak."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from nodeagent.errors import BackendUnavailable
from nodeagent.scheduling.seam import Obstacle, ServerState, ServerView


@dataclass
class FakeServers:
    """Loads take `load_s` of virtual time; a model in `broken` fails its start at the end of that time.

    One in `missing` has no file. At most one server at a time; `history` lists what was done, in order. Before a load
    stops another server, `hesitates_s` pass, as real ones take to look at the model's file.
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
    current: ServerView[str] | None = None
    _generations: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def views(self) -> list[ServerView[str]]:
        self.looks += 1
        return [self.current] if self.current is not None else []

    def obstacle(self, model_id: str) -> Obstacle | None:
        return self.obstacles.get(model_id)

    def has_room(self, model_id: str) -> bool:
        return self.room

    def memory_free_bytes(self) -> int | None:
        return self.free_bytes

    async def ensure(self, model_id: str) -> None:
        await trio.sleep(self.hesitates_s)
        if self.current is not None and self.current.model_id != model_id:
            self.history.append(f"stop {self.current.model_id}")
            self._become(None)
        if self.current is None:
            self.history.append(f"start {model_id}")
            self._become(self._server(model_id, ServerState.STARTING))
        assert self.current is not None
        assert self.current.spawned_at is not None
        await trio.sleep_until(self.current.spawned_at + self.load_s)
        if self.current is None:
            raise BackendUnavailable(model_id, "was stopped")
        if model_id in self.broken:
            self._become(None)
            raise BackendUnavailable(model_id, "exited with code 1", 4.0)
        if self.current.state is ServerState.STARTING:
            self.come_up()

    async def prepare(self, model_id: str) -> None:
        self.prepared.append(model_id)
        if model_id in self.missing:
            raise BackendUnavailable(model_id, "no such file")

    async def stop(self, model_id: str) -> None:
        if self.current is not None and self.current.model_id == model_id:
            self.history.append(f"stop {model_id}")
            self._become(None)

    def come_up(self) -> None:
        """The server that is starting is ready now."""
        assert self.current is not None
        self._become(self._server(self.current.model_id, ServerState.READY, self.current.generation))

    def crash(self) -> None:
        """The server dies, and a supervisor starts it again at once."""
        assert self.current is not None
        self.history.append(f"crash {self.current.model_id}")
        self._become(self._server(self.current.model_id, ServerState.STARTING))

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
        )

    def _become(self, server: ServerView[str] | None) -> None:
        self.current = server
        self.on_change()
