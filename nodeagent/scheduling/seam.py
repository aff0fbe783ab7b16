"""The seam of scheduling: what it asks of a device's servers, and how a lane looks from outside."""

from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

from nodeagent.scheduling.queueing import Priority

E = TypeVar("E")


class ServerState(Enum):
    """The states of a server, as the wire names them."""

    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    STOPPING = "stopping"
    BACKING_OFF = "backing_off"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ServerView(Generic[E]):
    """One server of a device. Times are `trio.current_time()`.

    `retry_at` is when a server that is backing off or failed may be started again. `endpoint` is set while ready.
    `idle_unload_s` is how long it may be without a request before it is unloaded, None for ever.
    """

    model_id: str
    state: ServerState
    generation: int
    since: float
    slots: int
    spawned_at: float | None = None
    reason: str | None = None
    retry_at: float | None = None
    endpoint: E | None = None
    idle_unload_s: float | None = None


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a device can't take a model now; `retry_at` is when that may change, None where it is not known to."""

    reason: str
    retry_at: float | None = None


class Servers(Protocol[E]):
    """The servers of one device: the seam between scheduling and whatever runs them."""

    def views(self) -> list[ServerView[E]]:
        """Every server that runs, is about to, or has failed."""

    async def ensure(self, model_id: str) -> None:
        """Return when the device runs a ready server of that model, having stopped what stood in its way.

        Raises BackendUnavailable as soon as a start failed. Cancelling only stops the waiting; the next `ensure` of
        another model stops the start.
        """

    async def prepare(self, model_id: str) -> None:
        """Make ready what can be while another model is in use: this one is loaded next.

        Raises BackendUnavailable where it is plain already that it can't be.
        """

    async def stop(self, model_id: str) -> None:
        """Return when no server of that model runs; one that has failed stays failed. Cancelling only stops waiting."""

    def obstacle(self, model_id: str) -> Obstacle | None:
        """What keeps this device from serving the model, None if nothing is known to."""

    def has_room(self, model_id: str) -> bool:
        """Whether one more copy of a model that is loaded elsewhere fits into the memory that is free, or would be once
        what runs here is stopped; True where that is not known."""

    def memory_free_bytes(self) -> int | None:
        """The last reading, None where unknown."""


@dataclass(frozen=True, slots=True)
class TicketView:
    """A request in the lane. `position` counts from 1 in the order in which those who wait are expected to start, and
    `starts_in_s` says when; both None for one in flight, and where nothing can be expected."""

    request_id: str
    model_id: str
    state: str
    priority: Priority
    age_s: float
    position: int | None = None
    starts_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class LaneView:
    in_flight: int
    waiting: int
    limit: int
    estimated_wait_s: float

    @property
    def free(self) -> int:
        return max(0, self.limit - self.in_flight - self.waiting)
