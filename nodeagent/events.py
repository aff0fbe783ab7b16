"""What happens on the node: one event for every transition, and the bounded ring that readers follow."""

from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import msgspec
import trio

from nodeagent.llama_server.server_id import ServerId
from nodeagent.timestamps import rfc3339
from supervisor import lifecycle

KEPT = 1000
"""How many events a reader can look back."""

T = TypeVar("T")


class Page(msgspec.Struct, Generic[T], frozen=True):
    """What a reader gets: `items`, the number of the last one, and how many items before them it missed."""

    items: list[T]
    last: int
    missed: int


class Ring(Generic[T]):
    """Keeps the last `capacity` items, numbered from 1.

    A reader only remembers the number of the last item it read. So a slow reader costs nothing here, and learns how
    many items it missed. Only `append` changes anything.
    """

    def __init__(self, capacity: int) -> None:
        self.last = 0
        self._items: deque[T] = deque(maxlen=capacity)
        self._readers = trio.lowlevel.ParkingLot()

    def append(self, item: T) -> None:
        self._items.append(item)
        self.last += 1
        if self._readers:
            self._readers.unpark_all()

    def after(self, number: int) -> Page[T]:
        """The items after that number. A number that was never given counts as 0: it is from an earlier run."""
        if not 0 <= number <= self.last:
            number = 0
        wanted = self.last - number
        items = list(self._items)[-wanted:] if wanted else []
        return Page(items, self.last, wanted - len(items))

    async def more_than(self, number: int) -> None:
        """Return once there is an item after that number."""
        while self.last <= number:
            await self._readers.park()


class NodeEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One transition; what does not apply is None.

    `kind` is a server's new state (`starting`, `ready`, ...), `exited`, `stopped`, or `node` if the status of the node
    or its reasons changed. `reason` is for people. `reason_code` is for programs: a `supervisor.lifecycle.Cause` of a
    server, a `status.NodeReason` of the node (the first, if there are several).
    """

    at: datetime
    kind: str
    device_id: str | None = None
    model_id: str | None = None
    generation: int | None = None
    reason: str | None = None
    reason_code: str | None = None
    last_lines: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "at": rfc3339(self.at),
            "kind": self.kind,
            "device_id": self.device_id,
            "model_id": self.model_id,
            "generation": self.generation,
            "reason": self.reason,
            "reason_code": self.reason_code,
            "last_lines": list(self.last_lines),
        }


EventLog = Ring[NodeEvent]


def of_node(status: str, reasons: Sequence[str], reason_codes: Sequence[str]) -> NodeEvent:
    """The node has another status, or other reasons for it."""
    return NodeEvent(
        at=datetime.now(UTC),
        kind="node",
        reason="; ".join((status, *reasons)),
        reason_code=next(map(str, reason_codes), None),
    )


def of_child(event: lifecycle.Event) -> NodeEvent:
    """A supervisor's event as an event of the node."""
    server = ServerId.parse(event.child_id)
    kind, cause, reason, last_lines = _facts(event)
    return NodeEvent(
        at=datetime.now(UTC),
        kind=kind,
        device_id=server.device_id,
        model_id=server.model_id,
        generation=event.generation,
        reason=reason,
        reason_code=None if cause is None else cause.value,
        last_lines=last_lines,
    )


def _facts(event: lifecycle.Event) -> tuple[str, lifecycle.Cause | None, str | None, tuple[str, ...]]:
    """Kind, cause, reason, last lines."""
    match event:
        case lifecycle.Started():
            return "starting", None, None, ()
        case lifecycle.Ready():
            return "ready", None, None, ()
        case lifecycle.Unhealthy(cause=cause, reason=reason):
            return "unhealthy", cause, reason, ()
        case lifecycle.Stopping():
            return "stopping", None, None, ()
        case lifecycle.Exited(exit=end):
            return "exited", end.cause, end.reason, end.last_lines
        case lifecycle.Restarting(cause=cause, reason=reason):
            return "backing_off", cause, reason, ()
        case lifecycle.GaveUp(cause=cause, reason=reason):
            return "failed", cause, reason, ()
        case _:  # Stopped
            return "stopped", None, None, ()
