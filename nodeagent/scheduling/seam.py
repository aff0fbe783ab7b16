"""The seam of scheduling: what it asks of a device's servers, and how a lane looks from outside."""

from collections.abc import Awaitable, Callable, Collection
from enum import Enum
from typing import Generic, Protocol, TypeVar

import msgspec

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


class ServerView(msgspec.Struct, Generic[E], frozen=True, kw_only=True):
    """One server of a device. Times are `trio.current_time()`.

    `reason` says why it is in its state, for people; `reason_code` the same for programs. `last_lines` is what it
    printed before it ended, for operators only. `retry_at` is when a server that is backing off or failed may be
    started again. `endpoint` is set while ready. `idle_unload_s` is how long it may be without a request before it is
    unloaded; None: no limit. `pinned`: it gives way to no other model. `returns`: once the model that it gave way to
    has been unloaded for being idle, it is loaded again. `slot_ctx_size` is the context of each slot in tokens, None if
    unknown. `device_ids` are the devices that it spans, empty if it runs on one.
    """

    model_id: str
    state: ServerState
    generation: int
    since: float
    slots: int
    spawned_at: float | None = None
    reason: str | None = None
    reason_code: str | None = None
    last_lines: tuple[str, ...] = ()
    retry_at: float | None = None
    endpoint: E | None = None
    idle_unload_s: float | None = None
    pinned: bool = False
    returns: bool = False
    slot_ctx_size: int | None = None
    device_ids: tuple[str, ...] = ()

    @property
    def is_active(self) -> bool:
        """Whether it has a process, or is about to get one."""
        return self.state is not ServerState.FAILED


class Obstacle(msgspec.Struct, frozen=True):
    """Why a device can't serve a model now. `retry_at` is when that may change, None if unknown. `elsewhere`: the
    configuration keeps the model to other devices."""

    reason: str
    retry_at: float | None = None
    reason_code: str | None = None
    elsewhere: bool = False


MakeRoom = Callable[[], Awaitable[None]]
"""Stops servers that are in the way of a load, and returns once their memory is free."""


class Servers(Protocol[E]):
    """The servers of one device: the seam between scheduling and what runs them."""

    def views(self) -> list[ServerView[E]]:
        """Every server that runs, is about to, or has failed."""

    def view(self, model_id: str) -> ServerView[E] | None:
        """That of one model, None if there is none."""

    async def ensure(self, model_id: str, beside: Collection[str] = (), make_room: MakeRoom | None = None) -> None:
        """Return once the device runs a ready server of that model; servers of models that are not in `beside` are
        stopped first, and `make_room` is called for what else is in the way, unless the model is known to be unusable.

        Raises BackendUnavailable as soon as a start failed, OutOfDeviceMemory if the device's memory was too small:
        from then on `bytes_of` is what is known to be needed. Cancelling only stops the waiting; the next `ensure` of
        another model stops the start.
        """

    async def prepare(self, model_id: str) -> None:
        """Prepare the load of this model, which is next, while another model is still in use.

        Raises BackendUnavailable if it is known already that the load will fail.
        """

    async def stop(self, model_id: str) -> None:
        """Return once no server of that model runs; a failed one stays failed. Cancelling only stops the waiting."""

    async def settled(self) -> None:
        """Return once the memory of servers that were stopped is free again."""

    def obstacle(self, model_id: str) -> Obstacle | None:
        """What keeps this device from serving the model, None if nothing is known to."""

    def has_room(self, model_id: str, least_bytes: int = 0) -> bool:
        """Whether one more copy of a model that is loaded elsewhere fits into the free memory, counting what is freed
        when the servers here are stopped; True if unknown. It is known to need `least_bytes`."""

    def memory_free_bytes(self) -> int | None:
        """The last reading, None if unknown."""

    def bytes_of(self, model_id: str) -> int:
        """What a server of the model takes of the device's memory, 0 if unknown."""


class TicketView(msgspec.Struct, frozen=True, kw_only=True):
    """A request in a lane. `position` counts from 1 in the order in which queued requests are expected to start, and
    `starts_in_s` says when; both are None for a request in flight, and if unknown."""

    request_id: str
    model_id: str
    state: str
    priority: Priority
    age_s: float
    position: int | None = None
    starts_in_s: float | None = None


class LaneView(msgspec.Struct, frozen=True):
    """The load of a lane. `estimated_wait_s`: when a request that arrives now would start."""

    in_flight: int
    waiting: int
    limit: int
    estimated_wait_s: float

    @property
    def free(self) -> int:
        return max(0, self.limit - self.in_flight - self.waiting)
