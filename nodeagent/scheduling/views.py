"""A lane as it is shown to people and to the dispatcher."""

from dataclasses import dataclass

from nodeagent.scheduling.queueing import Priority


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
