"""What happens on the node, as operators and programs are told: one kind of value for every transition."""

from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import trio

from nodeagent.llama_server.server_id import ServerId
from supervisor import lifecycle

KEPT = 1000


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """What a reader gets: `items`, the number of the last one, and how many before them are lost to it."""

    items: list[T]
    last: int
    missed: int


class Ring(Generic[T]):
    """Keeps the last `capacity` items, numbered from 1. A reader remembers a number and nothing is kept for it here,
    so a slow one costs nothing, and learns what it missed.

    What changes: everything, in `append` alone.
    """

    def __init__(self, capacity: int) -> None:
        self.last = 0
        self._items: deque[T] = deque(maxlen=capacity)
        self._more = trio.Event()

    def append(self, item: T) -> None:
        self._items.append(item)
        self.last += 1
        self._more.set()
        self._more = trio.Event()

    def after(self, number: int) -> Page[T]:
        """What came after the item of that number. A number that was never given counts as 0: it is of another life."""
        if not 0 <= number <= self.last:
            number = 0
        wanted = self.last - number
        items = list(self._items)[-wanted:] if wanted else []
        return Page(items, self.last, wanted - len(items))

    async def more_than(self, number: int) -> None:
        """Return once there is an item after the one of that number."""
        while self.last <= number:
            await self._more.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEvent:
    """One transition. `kind` is a server's new state (`starting`, `ready`, ...), `exited`, or `node` for the node's
    own word of state; what does not apply is None."""

    at: datetime
    kind: str
    device_id: str | None = None
    model_id: str | None = None
    generation: int | None = None
    reason: str | None = None
    last_lines: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "at": self.at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "kind": self.kind,
            "device_id": self.device_id,
            "model_id": self.model_id,
            "generation": self.generation,
            "reason": self.reason,
            "last_lines": list(self.last_lines),
        }


EventLog = Ring[NodeEvent]


def of_node(status: str, reasons: tuple[str, ...]) -> NodeEvent:
    """The node came into another state, or has other reasons for it."""
    return NodeEvent(at=datetime.now(UTC), kind="node", reason="; ".join((status, *reasons)))


def of_child(event: lifecycle.Event) -> NodeEvent:
    """A supervisor's event in the node's words."""
    server = ServerId.parse(event.child_id)
    kind, reason, last_lines = _facts(event)
    return NodeEvent(
        at=datetime.now(UTC),
        kind=kind,
        device_id=server.device_id,
        model_id=server.model_id,
        generation=event.generation,
        reason=reason,
        last_lines=last_lines,
    )


def _facts(event: lifecycle.Event) -> tuple[str, str | None, tuple[str, ...]]:
    match event:
        case lifecycle.Started():
            return "starting", None, ()
        case lifecycle.Ready():
            return "ready", None, ()
        case lifecycle.Unhealthy(reason=reason):
            return "unhealthy", reason, ()
        case lifecycle.Stopping():
            return "stopping", None, ()
        case lifecycle.Exited(exit=end):
            return "exited", end.reason, end.last_lines
        case lifecycle.Restarting(reason=reason):
            return "backing_off", reason, ()
        case lifecycle.GaveUp(reason=reason):
            return "failed", reason, ()
        case _:
            return "stopped", None, ()
