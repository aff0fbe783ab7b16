"""What happens to children: one event for each transition.

`at` is `trio.current_time()`. `generation` rises by one with each spawn in the child's group.
"""

from dataclasses import dataclass

from supervisor.restart import Exit


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to a child."""

    child_id: str
    generation: int
    at: float


@dataclass(frozen=True, slots=True)
class Started(Event):
    """It was spawned; it is not ready yet."""

    pid: int


@dataclass(frozen=True, slots=True)
class Ready(Event):
    """Its probe passed; it answers at `address`."""

    address: str


@dataclass(frozen=True, slots=True)
class Unhealthy(Event):
    """It runs, but failed its liveness; it is about to be ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stopping(Event):
    """It was asked to end."""


@dataclass(frozen=True, slots=True)
class Exited(Event):
    """It is gone, and everything in its process group too."""

    exit: Exit


@dataclass(frozen=True, slots=True)
class Restarting(Event):
    """It will be started again in `delay_s`."""

    delay_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class GaveUp(Event):
    """It is not started again by itself; at `retry_at` (if any) a start may be asked for."""

    reason: str
    retry_at: float | None


@dataclass(frozen=True, slots=True)
class Stopped(Event):
    """It was stopped because that was asked for."""
