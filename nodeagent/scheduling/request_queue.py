"""The queued requests of one lane: the memory channel that they arrive through, and the ordered list behind it."""

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import trio

from nodeagent.scheduling.lease import Ticket

E = TypeVar("E")


class RequestQueue(Generic[E]):
    """Tickets, oldest first, and a wake-up for the lane's task.

    `waiting` is the ordered list, once `collect` has emptied the channel into it. `capacity` bounds the channel;
    `on_arrival` is called with each ticket that enters the list.

    What changes, always synchronously: `waiting`, `_in_channel` and `_models`, in what adds and removes tickets;
    `_wake_up` in `change`.
    """

    def __init__(self, capacity: int, on_arrival: Callable[[Ticket[E]], None]) -> None:
        self.waiting: list[Ticket[E]] = []
        self._on_arrival = on_arrival
        self._send, self._receive = trio.open_memory_channel[Ticket[E]](capacity)
        self._in_channel = 0
        self._models: dict[str, int] = {}
        self._wake_up = trio.Event()

    @property
    def models(self) -> Mapping[str, int]:
        """How many tickets are queued for each model, those in the channel included. It changes with the queue."""
        return self._models

    def post(self, ticket: Ticket[E]) -> None:
        """Put a ticket into the channel."""
        self.collect()  # so the channel is never full, though the limit may have been raised since it was made
        self._send.send_nowait(ticket)
        self._in_channel += 1
        self._count(ticket)

    def nudge(self) -> None:
        """Wake the lane's task."""
        self._wake_up.set()

    async def change(self, until: float) -> None:
        """Wait for the next nudge, at most until that time."""
        with trio.move_on_at(until):
            await self._wake_up.wait()
        self._wake_up = trio.Event()

    def collect(self) -> None:
        """Empty the channel into `waiting`."""
        while self._in_channel:
            ticket = self._receive.receive_nowait()
            self._in_channel -= 1
            self._place(ticket)

    def insert(self, ticket: Ticket[E]) -> None:
        """Insert a ticket by its age."""
        self.collect()
        self._count(ticket)
        self._place(ticket)

    def insert_first(self, ticket: Ticket[E]) -> None:
        """Put it at the head of the queue, whatever its age."""
        self.collect()
        self._count(ticket)
        self.waiting.insert(0, ticket)
        self._on_arrival(ticket)

    def remove(self, ticket: Ticket[E]) -> bool:
        """Remove a ticket; return whether it was queued."""
        self.collect()
        try:
            self.waiting.remove(ticket)
        except ValueError:
            return False
        self._models[ticket.model_id] -= 1
        if not self._models[ticket.model_id]:
            del self._models[ticket.model_id]
        return True

    def _count(self, ticket: Ticket[E]) -> None:
        self._models[ticket.model_id] = self._models.get(ticket.model_id, 0) + 1

    def _place(self, ticket: Ticket[E]) -> None:
        """Behind every older ticket: nearly always at the end."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].age_order > ticket.age_order:
            place -= 1
        self.waiting.insert(place, ticket)
        self._on_arrival(ticket)
