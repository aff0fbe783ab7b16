"""What a lane hands out: a place in its queue (Ticket), then the use of a server for one request (Lease).

    WAITING ──grant──> GRANTED ──close──> CLOSED
       │  ▲               │
       │  └───requeue─────┘
       ├──refuse──> REFUSED ──close──> CLOSED
       └──close──> CLOSED

Only the lane moves a ticket along; the request's own task reads it and, in the end, closes it.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
import trio

from nodeagent.errors import Refusal
from nodeagent.scheduling.queueing import Priority, QueuedRequest
from nodeagent.scheduling.seam import TicketView

if TYPE_CHECKING:
    from nodeagent.scheduling.lane import Lane
    from nodeagent.scheduling.spanning_lane import SpanningLane

E = TypeVar("E")
"""What the front needs to reach a server. Scheduling passes it through unread."""


class TicketState(Enum):
    WAITING = "waiting"
    GRANTED = "granted"
    REFUSED = "refused"
    CLOSED = "closed"


class Lease(msgspec.Struct, Generic[E], frozen=True, kw_only=True):
    """The right to send one request to one ready server. It pins that server until its ticket is closed or requeued.

    `queued_s` is how long the request waited for its turn, `load_s` how long it waited for the model to be loaded; it
    was granted at `granted_at` (`trio.current_time()`).
    """

    device_id: str
    model_id: str
    generation: int
    endpoint: E
    queued_s: float
    load_s: float
    granted_at: float


class Ticket(msgspec.Struct, Generic[E], eq=False, kw_only=True):
    """One request's place in a lane, from its admission to `close()`.

    `number` rises with each ticket of the lane that made it. `counted` says whether it takes up one of the lane's
    places and `slots` slots of a server; a ticket that only asks for a load does not. Written by the lane alone:
    `lane`, `state`, `lease`, `refusal`, `granted_at`, `passed_since` (when a later request was first granted ahead of
    it), `load_s`, `tried_again` (its model ran out of memory here, and others give way for one more try), `beside`.

    A hold of a device for a model that spans it (`span.py`) is a ticket too, with the spanning lane as its `holder`.
    The servers of `beside` stay when the model is loaded; None if it ran already when the hold was granted.
    """

    lane: Lane[E]
    number: int
    request_id: str
    model_id: str
    admitted_at: float
    priority: Priority = Priority.NORMAL
    slots: int = 1
    state: TicketState = TicketState.WAITING
    lease: Lease[E] | None = None
    refusal: Refusal | None = None
    granted_at: float | None = None
    passed_since: float | None = None
    load_s: float = 0.0
    counted: bool = True
    tried_again: bool = False
    holder: SpanningLane[E] | None = None
    beside: frozenset[str] | None = None
    _decided: trio.Event | None = None  # made by the task that waits for it
    _as_queued: QueuedRequest | None = None

    @property
    def age_order(self) -> tuple[float, int]:
        """Rises with the order of admission, in one lane and between lanes."""
        return (self.admitted_at, self.number)

    async def granted(self) -> Lease[E]:
        """Wait for the lane's decision: return the lease, or raise the Refusal. Cancelling keeps the place; `close`
        gives it up."""
        await self.held()
        if self.refusal is not None:
            raise self.refusal
        assert self.lease is not None, f"ticket {self.request_id} was closed while a task waited for it"
        return self.lease

    async def held(self) -> None:
        """Wait until the lane has decided (has granted this hold, say)."""
        if self.state is TicketState.WAITING:
            if self._decided is None:
                self._decided = trio.Event()
            await self._decided.wait()

    def decided(self) -> None:
        """Wake the request's task; called by the lane after it set the outcome."""
        if self._decided is not None:
            self._decided.set()
            self._decided = None

    def requeue(self) -> None:
        """Give the lease back and wait again, at the head of the lane. See `Lane.requeue`."""
        self.lane.requeue(self)

    def close(self) -> None:
        """Give up the place or the lease, whichever is held. Synchronous, at any time, any number of times."""
        self.lane.close(self)

    def as_queued(self) -> QueuedRequest:
        """The request as a policy sees it; made again only when it has changed. A hold is as urgent as what waits for
        it."""
        if self.holder is not None:
            demand = self.holder.demand(self.model_id)
            passed = [since for since in (demand.passed_since, self.passed_since) if since is not None]
            return msgspec.structs.replace(demand, passed_since=min(passed, default=None))
        queued = self._as_queued
        if queued is None or queued.passed_since != self.passed_since:
            queued = self._as_queued = QueuedRequest(
                model_id=self.model_id,
                admitted_at=self.admitted_at,
                priority=self.priority,
                passed_since=self.passed_since,
                slots=self.slots,
            )
        return queued

    def view(self, now: float, position: int | None = None, starts_in_s: float | None = None) -> TicketView:
        """The request as it is shown to people."""
        return TicketView(
            request_id=self.request_id,
            model_id=self.model_id,
            state=self.state.value,
            priority=self.priority,
            age_s=now - self.admitted_at,
            position=position,
            starts_in_s=starts_in_s,
        )
