"""The queued requests of one lane: the memory channel that they arrive through, and the ordered list behind it."""

from collections.abc import Callable
from typing import Final, Generic, TypeVar

import trio

from nodeagent.scheduling.lease import Ticket, TicketState

E = TypeVar("E")


class _Nudge:
    """Something changed: look again."""


_NUDGE: Final = _Nudge()


class RequestQueue(Generic[E]):
    """Tickets, oldest first. The channel also carries at most one nudge, a token that only wakes the lane's task.

    `waiting` is the ordered list, once `collect` has emptied the channel into it. `capacity` bounds the channel;
    `on_arrival` is called with each ticket that enters the list.

    What changes: `waiting`, here and by the lane's own synchronous code; `_posted` (the tickets in the channel or on
    their way out of it) and `_nudged` here.
    """

    def __init__(self, capacity: int, on_arrival: Callable[[Ticket[E]], None]) -> None:
        self.waiting: list[Ticket[E]] = []
        self._on_arrival = on_arrival
        self._send, self._receive = trio.open_memory_channel[Ticket[E] | _Nudge](capacity + 1)
        self._posted: list[Ticket[E]] = []
        self._nudged = False

    def post(self, ticket: Ticket[E]) -> None:
        """Put a ticket into the channel, and wake the lane's task."""
        self.collect()  # so the channel is never full, though the limit may have been raised since it was made
        self._send.send_nowait(ticket)
        self._posted.append(ticket)

    def nudge(self) -> None:
        """Wake the lane's task."""
        if not self._nudged:
            self._nudged = True
            self._send.send_nowait(_NUDGE)

    async def arrival(self) -> None:
        """Wait for the next ticket or nudge, and take it in."""
        self._take_in(await self._receive.receive())

    def collect(self) -> None:
        """Empty the channel into `waiting`."""
        while True:
            try:
                mail = self._receive.receive_nowait()
            except trio.WouldBlock:
                return
            self._take_in(mail)

    def insert(self, ticket: Ticket[E]) -> None:
        """Insert it by its age: what the channel handed to the task may come after what was collected behind it."""
        later = (place for place, other in enumerate(self.waiting) if other.age_order > ticket.age_order)
        self.waiting.insert(next(later, len(self.waiting)), ticket)
        self._on_arrival(ticket)

    def insert_first(self, ticket: Ticket[E]) -> None:
        """Put it at the head of the queue, whatever its age."""
        self.collect()
        self.waiting.insert(0, ticket)
        self._on_arrival(ticket)

    def all(self) -> list[Ticket[E]]:
        """All queued tickets, including the one that the channel has just handed to the lane's task."""
        return [*self.waiting, *(ticket for ticket in self._posted if ticket.state is TicketState.WAITING)]

    def _take_in(self, mail: Ticket[E] | _Nudge) -> None:
        if isinstance(mail, _Nudge):
            self._nudged = False
            return
        self._posted.remove(mail)
        if mail.state is TicketState.WAITING:  # else it was closed while it was handed from the channel to the task
            self.insert(mail)
