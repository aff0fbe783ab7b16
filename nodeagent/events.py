"""What happens on the node, as operators and programs are told: one kind of value for every transition."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nodeagent.ring import Ring
from supervisor import lifecycle

KEPT = 1000


@dataclass(frozen=True, slots=True)
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
    return NodeEvent(datetime.now(UTC), "node", reason="; ".join((status, *reasons)))


def of_child(event: lifecycle.Event) -> NodeEvent:
    """A supervisor's event in the node's words."""
    device_id, _, model_id = event.child_id.partition("/")
    kind, reason, last_lines = _facts(event)
    return NodeEvent(datetime.now(UTC), kind, device_id, model_id, event.generation, reason, last_lines)


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
