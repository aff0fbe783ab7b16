"""Models that span several devices: how their lane takes the devices, keeps them and gives them back.

A group of devices that models span has a lane of its own, the spanning lane. It serves nothing before each member
device's lane has granted it a hold: a ticket that stands in that lane's queue for the spanning model, with the age and
the priority of the requests that wait for it. The member's own policy decides when its turn has come.

The invariant: **a spanning lane asks for one hold at a time, in the order of the node's devices.** So one that holds
devices while it waits only waits for later ones, and there is no circle. Once it has all of them it waits for nothing
but its own load and its own requests, which end. It gives all holds back as soon as no request for the model is left,
or a member's policy would rather serve another one.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from msgspec.structs import replace

from nodeagent.scheduling.lease import Ticket, TicketState
from nodeagent.scheduling.seam import MakeRoom, Obstacle, Servers, ServerView

if TYPE_CHECKING:
    from nodeagent.scheduling.lane import Lane
    from nodeagent.scheduling.spanning_lane import SpanningLane

E = TypeVar("E")


class SharedServers(Generic[E]):
    """What a member device's lane sees: the device's own servers, and those of `spanning` models that use it too.

    Implements `seam.Servers`.
    """

    def __init__(self, own: Servers[E], spanning: Sequence[Servers[E]]) -> None:
        self._own = own
        self._spanning = spanning

    def views(self) -> list[ServerView[E]]:
        """The spanning ones are unloaded for being idle by their own lane, and a failed one is not in the way here."""
        others = [view for servers in self._spanning for view in servers.views() if view.is_active]
        return [*self._own.views(), *(replace(view, idle_unload_s=None) for view in others)]

    def view(self, model_id: str) -> ServerView[E] | None:
        own = self._own.view(model_id)
        if own is not None:
            return own
        others = (servers.view(model_id) for servers in self._spanning)
        return next((replace(view, idle_unload_s=None) for view in others if view is not None and view.is_active), None)

    async def ensure(self, model_id: str, beside: Collection[str] = (), make_room: MakeRoom | None = None) -> None:
        async def stop_spanning() -> None:
            if make_room is not None:
                await make_room()
            await self._stop_others(self._spanning, model_id, beside)

        await self._own.ensure(model_id, beside, stop_spanning)

    async def make_room(self, model_id: str, beside: Collection[str]) -> None:
        """Stop the servers of all models but this one and those of `beside`; return once their memory is free."""
        await self._stop_others((self._own, *self._spanning), model_id, beside)

    async def _stop_others(self, of: Sequence[Servers[E]], model_id: str, beside: Collection[str]) -> None:
        stopped = False
        for servers in of:
            for other in self._leaving(servers, model_id, beside):
                await servers.stop(other)
                stopped = True
        if stopped:
            await self._own.settled()

    async def prepare(self, model_id: str) -> None:
        await self._own.prepare(model_id)

    async def stop(self, model_id: str) -> None:
        for servers in (self._own, *self._spanning):
            await servers.stop(model_id)

    async def settled(self) -> None:
        await self._own.settled()

    def obstacle(self, model_id: str) -> Obstacle | None:
        return self._own.obstacle(model_id)

    def has_room(self, model_id: str, least_bytes: int = 0) -> bool:
        return self._own.has_room(model_id, least_bytes)

    def memory_free_bytes(self) -> int | None:
        return self._own.memory_free_bytes()

    def bytes_of(self, model_id: str) -> int:
        return self._own.bytes_of(model_id)

    def _leaving(self, servers: Servers[E], model_id: str, beside: Collection[str]) -> list[str]:
        stay = {model_id, *beside}
        return [view.model_id for view in servers.views() if view.is_active and view.model_id not in stay]


class Span(Generic[E]):
    """The member devices of a spanning lane, in the node's order, and its holds on them.

    What changes: `model_id` (the model that devices are held for, or asked for) and `_holds`, in `take`, `take_at_once`
    and `release`.
    """

    def __init__(self, members: Sequence["Lane[E]"], servers: Sequence[SharedServers[E]]) -> None:
        self.model_id: str | None = None
        self._members = members
        self._servers = servers
        self._holds: list[Ticket[E]] = []

    @property
    def device_ids(self) -> list[str]:
        """The members, in the node's order."""
        return [member.device_id for member in self._members]

    def is_held_for(self, model_id: str) -> bool:
        """Whether every member is held for this model."""
        return self.model_id == model_id and len(self._holds) == len(self._members) and self._all_granted()

    def take_at_once(self, lane: "SpanningLane[E]", model_id: str) -> bool:
        """Hold every member now, if all are free; else hold none. Return whether they are held."""
        self.release()
        self.model_id = model_id
        for member in self._members:
            self._holds.append(member.request_hold(lane, model_id))
            if not self._all_granted():
                self.release()
                return False
        return True

    async def take(self, lane: "SpanningLane[E]", model_id: str) -> None:
        """Return once every member is held for the model. Cancelling gives back what is held."""
        self.release()
        self.model_id = model_id
        try:
            for member in self._members:
                hold = member.request_hold(lane, model_id)
                self._holds.append(hold)
                await hold.held()
        finally:
            if not self.is_held_for(model_id):
                self.release()

    @property
    def has_plan(self) -> bool:
        """Whether each member has said which models stay there when the model is loaded."""
        return all(hold.beside is not None for hold in self._holds)

    async def make_room(self, model_id: str) -> None:
        """Stop what gives way to the model on the members, which are held for it."""
        for servers, hold in zip(self._servers, list(self._holds), strict=True):
            await servers.make_room(model_id, hold.beside or ())

    def release(self) -> None:
        """Give back every hold, or stop asking for it."""
        holds, self._holds, self.model_id = self._holds, [], None
        for hold in holds:
            hold.close()

    def may_serve(self, lane: "SpanningLane[E]", model_id: str) -> bool:
        """Whether the policy of each member would serve the model's queued requests now, rather than another one."""
        demand = lane.demand(model_id)
        return all(member.would_serve(demand) for member in self._members)

    def gives_way(self, lane: "SpanningLane[E]") -> bool:
        """Whether a member that is held would rather serve another model, now that this one can't start yet."""
        demand = lane.demand(self.model_id) if self.model_id is not None else None
        return demand is not None and any(
            hold.state is TicketState.GRANTED and hold.lane.rather_serves(demand) for hold in self._holds
        )

    def others_wait(self) -> bool:
        """Whether a member that is held or asked for has other requests in its queue."""
        return any(hold.lane.has_others_than(hold) for hold in self._holds)

    def taken_in_s(self) -> float | None:
        """When the member that is asked for is expected to be held, 0 if none is; None if unknown."""
        for hold in self._holds:
            if hold.state is TicketState.WAITING:
                return dict(hold.lane.expected_starts()).get(hold)
        return 0.0

    def passes(self, ticket: Ticket[E]) -> None:
        """A request is granted: it passes the older ones that are queued on the members."""
        for member in self._members:
            member.was_passed_by(ticket)

    def demand_changed(self) -> None:
        """Make the member that is asked for a hold look again."""
        for hold in self._holds:
            if hold.state is TicketState.WAITING:
                hold.lane.nudge()

    def _all_granted(self) -> bool:
        return all(hold.state is TicketState.GRANTED for hold in self._holds)
