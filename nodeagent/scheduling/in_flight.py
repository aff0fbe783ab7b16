"""What a lane has granted: requests in flight, and holds of its device for models that span it."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from nodeagent.scheduling.lease import Ticket

E = TypeVar("E")


class InFlight(Generic[E]):
    """Granted tickets in the order of their grants, and sums of them that every decision needs.

    What changes: everything, in `add` and `remove`.
    """

    def __init__(self) -> None:
        self._tickets: dict[Ticket[E], None] = {}
        self.holds: list[Ticket[E]] = []
        # By model, how many tickets there are of each number of slots.
        self._slots: dict[str, dict[int, int]] = {}

    def __iter__(self) -> Iterator[Ticket[E]]:
        return iter(self._tickets)

    def __contains__(self, ticket: Ticket[E]) -> bool:
        return ticket in self._tickets

    def __bool__(self) -> bool:
        return bool(self._tickets)

    @property
    def requests(self) -> list[Ticket[E]]:
        """Those that are no holds."""
        return [ticket for ticket in self._tickets if ticket.holder is None]

    def add(self, ticket: Ticket[E]) -> None:
        """The ticket was granted."""
        self._tickets[ticket] = None
        counts = self._slots.setdefault(ticket.model_id, {})
        counts[ticket.slots] = counts.get(ticket.slots, 0) + 1
        if ticket.holder is not None:
            self.holds.append(ticket)

    def remove(self, ticket: Ticket[E]) -> None:
        """The ticket was given back."""
        del self._tickets[ticket]
        counts = self._slots[ticket.model_id]
        counts[ticket.slots] -= 1
        if not counts[ticket.slots]:
            del counts[ticket.slots]
        if not counts:
            del self._slots[ticket.model_id]
        if ticket.holder is not None:
            self.holds.remove(ticket)

    def uses(self, model_id: str) -> bool:
        """Whether one is for the model."""
        return model_id in self._slots

    def uses_only(self, model_id: str) -> bool:
        """Whether none is for another model."""
        return len(self._slots) == (model_id in self._slots)

    @property
    def models(self) -> set[str]:
        """The models that they are for."""
        return set(self._slots)

    def slots_in_use(self, model_id: str, slots: int) -> int:
        """How many slots of the model's server, which has `slots`, they use. None uses more than there are."""
        if model_id not in self._slots:
            return 0
        return sum([min(own, slots) * count for own, count in self._slots[model_id].items()])

    def without_slot(self, model_id: str) -> int:
        """How many for the model use none of its slots."""
        return self._slots.get(model_id, {}).get(0, 0)
