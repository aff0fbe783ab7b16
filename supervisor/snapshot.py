"""A child at one moment, as callers see it."""

from dataclasses import dataclass
from enum import Enum

from supervisor.lifecycle import Cause


class ChildState(Enum):
    """Where a child is in its life; `supervisor/child.py` draws the transitions."""

    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    STOPPING = "stopping"
    BACKING_OFF = "backing_off"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSnapshot:
    """A child at one moment. Times are `trio.current_time()`; `since` is when it entered its state.

    `address` is set while it is ready. `cause` and `reason` say why it is unhealthy, backing off or failed. `retry_at`
    is when a child that is backing off restarts, or when a failed one may be started again. `pid` and `spawned_at`
    belong to the last generation.
    """

    child_id: str
    group: str
    state: ChildState
    generation: int
    since: float
    pid: int | None = None
    spawned_at: float | None = None
    address: str | None = None
    cause: Cause | None = None
    reason: str | None = None
    retry_at: float | None = None

    @property
    def is_active(self) -> bool:
        """Whether the child has a process or is about to get one."""
        return self.state not in (ChildState.STOPPED, ChildState.FAILED)
