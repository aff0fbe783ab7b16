"""Which lane a request goes to, and which lane takes over a queued one."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Generic, TypeVar

import trio
from msgspec.structs import replace

from nodeagent.errors import BackendUnavailable, Draining, QueueFull
from nodeagent.scheduling.affinity import Conversations
from nodeagent.scheduling.estimates import LaneTimes
from nodeagent.scheduling.lane import Lane
from nodeagent.scheduling.lease import Ticket, TicketState
from nodeagent.scheduling.placement import (
    AllFull,
    Candidate,
    Movable,
    NoneEligible,
    Placed,
    Residency,
    choose,
    choose_move,
)
from nodeagent.scheduling.queueing import Priority
from nodeagent.scheduling.seam import Servers, ServerState

logger = logging.getLogger(__name__)

E = TypeVar("E")

_LOOK_AGAIN_S = 1.0
# How many times a load counts that a request adds to a device in use, beside the request's own wait for it. With 2,
# eight models on two devices need a quarter fewer loads than with 0 (tests/benchmarks/scheduling/simulate.py); 4 saves
# little more, and leaves devices idle.
_OWN_LOADS = 2.0


class Scheduler(Generic[E]):
    """Admits requests to lanes. `lanes` and `servers` have the same keys, the device ids, in the order of preference;
    the lanes of models that span devices come last.

    What changes: `_closed_for` in `refuse_new` and `accept_new`.
    """

    def __init__(self, lanes: Mapping[str, Lane[E]], servers: Mapping[str, Servers[E]]) -> None:
        self.lanes = lanes
        self._servers = servers
        self.conversations = Conversations()
        self._closed_for: Draining | None = None
        node_times = LaneTimes()
        for lane in lanes.values():
            lane.on_idle = partial(self._help_others, lane)
            lane.moves_elsewhere = self._move_elsewhere
            lane.times.node = node_times

    @property
    def device_lanes(self) -> list[Lane[E]]:
        """The lanes of single devices. Requests for models that span several are in the queue of the first of them."""
        return [lane for lane in self.lanes.values() if len(lane.device_ids) == 1]

    def ready_servers(self) -> Iterator[tuple[str, str, E]]:
        """The device, model and endpoint of each server that is ready. One that spans devices is one of the first."""
        for device_id, servers in self._servers.items():
            for view in servers.views():
                if view.endpoint is not None:
                    yield self.lanes[device_id].home_id, view.model_id, view.endpoint

    def admit(
        self,
        request_id: str,
        model_id: str,
        priority: Priority = Priority.NORMAL,
        conversation: str | None = None,
        *,
        slots: int = 1,
    ) -> Ticket[E]:
        """Give a request a place in the best lane; the caller closes the ticket in the end.

        `slots` is how many slots of the server it needs: one for each completion that it asks for.

        Raises QueueFull, BackendUnavailable or Draining. Does not wait.
        """
        if self._closed_for is not None:
            raise self._closed_for
        ticket = self.lanes[self.place(model_id, conversation)].submit(request_id, model_id, priority, slots=slots)
        if ticket.state is TicketState.WAITING:
            self._nudge_helpers(ticket)
        return ticket

    def requeue(self, ticket: Ticket[E]) -> None:
        """Put a request whose server died back at the head of its queue; an idle device may take it over."""
        ticket.requeue()
        self._nudge_helpers(ticket)

    def _nudge_helpers(self, ticket: Ticket[E]) -> None:
        """A request was queued: the idle lanes that could serve it decide whether to take it over."""
        for device_id, lane in self.lanes.items():
            if lane is not ticket.lane and lane.is_idle and self._servers[device_id].obstacle(ticket.model_id) is None:
                lane.nudge()

    def place(self, model_id: str, conversation: str | None = None) -> str:
        """The device that a request for the model goes to now; raises QueueFull or BackendUnavailable."""
        has_choice = len(self.lanes) > 1
        cached_on = self.conversations.device_of(conversation)
        # Nothing starts sooner than at once, so where one device or several can do that, no estimates are needed, nor
        # where there is nothing to choose. They would cost ten times as much.
        at_once = [it for it in self.lanes if self._serves_at_once(it, model_id)] if has_choice else []
        candidates = [self._candidate_at_once(it, model_id, cached_on) for it in at_once]
        if not at_once or (cached_on is not None and cached_on not in at_once):
            devices = self._allowed(model_id) if has_choice else list(self.lanes)
            if len(devices) == 1 and self._can_take(devices[0], model_id):
                return devices[0]
            candidates += [self._candidate(it, model_id, cached_on) for it in devices if it not in at_once]
        return self._choose(model_id, candidates)

    def place_load(self, model_id: str) -> str:
        """The device to load the model on, however full its lane is; raises BackendUnavailable."""
        candidates = [self._candidate(device_id, model_id) for device_id in self._allowed(model_id)]
        return self._choose(model_id, [replace(it, limit=it.admitted + 1) for it in candidates])

    def _allowed(self, model_id: str) -> list[str]:
        """The devices to which the configuration does not forbid the model; all of them if it forbids every one."""
        obstacles = {device_id: servers.obstacle(model_id) for device_id, servers in self._servers.items()}
        return [it for it, obstacle in obstacles.items() if obstacle is None or not obstacle.elsewhere] or [*obstacles]

    def _choose(self, model_id: str, candidates: list[Candidate]) -> str:
        match choose(candidates):
            case Placed(device_id, reason):
                if len(candidates) > 1:
                    logger.debug("request for %s placed on %s: %s", model_id, device_id, reason)
                return device_id
            case AllFull(device_ids):
                lanes = [self.lanes[device_id] for device_id in device_ids]
                raise QueueFull(model_id, lanes[0].limit, min(lane.place_free_in_s() for lane in lanes))
            case NoneEligible(reason, retry_at):
                retry_after_s = None if retry_at is None else max(0.0, retry_at - trio.current_time())
                raise BackendUnavailable(model_id, reason, retry_after_s)

    def preload(self, model_ids: list[str]) -> list[str]:
        """Load the models, each on a device of its own while there are such, then as many on each device as it may
        have and has memory for; return those for which there is no place."""
        planned: dict[str, list[str]] = {it: [] for lane in self.lanes.values() for it in lane.device_ids}
        left_over = []
        for model_id in model_ids:
            device_id = self._place_preload(model_id, planned)
            if device_id is None:
                left_over.append(model_id)
                continue
            for member in self.lanes[device_id].device_ids:
                planned[member].append(model_id)
            self.lanes[device_id].preload(model_id)
        return left_over

    def _place_preload(self, model_id: str, planned: Mapping[str, Sequence[str]]) -> str | None:
        """The best of the devices on which the fewest are planned and that can run the model, None if there is none."""
        members = {device_id: self.lanes[device_id].device_ids for device_id in self._allowed(model_id)}
        counts = {device_id: max(len(planned[member]) for member in its) for device_id, its in members.items()}
        for count in sorted(set(counts.values())):
            devices = [it for it in counts if counts[it] == count and count < self.lanes[it].rules.max_models]
            devices = [it for it in devices if self._fits_beside(planned, model_id, members[it])]
            match choose([self._candidate(device_id, model_id) for device_id in devices]):
                case Placed(device_id):
                    return device_id
        return None

    def _fits_beside(self, planned: Mapping[str, Sequence[str]], model_id: str, device_ids: Sequence[str]) -> bool:
        """Whether each of the devices has memory for the model beside what is planned there."""
        return all(self._fit_together(it, [*planned[it], model_id]) for it in device_ids if planned[it])

    def _fit_together(self, device_id: str, model_ids: Sequence[str]) -> bool:
        """Whether the device has memory for all of them: else the last one would evict the others."""
        servers = self._servers[device_id]
        free_bytes = servers.memory_free_bytes()
        return free_bytes is None or sum(map(servers.bytes_of, model_ids)) <= free_bytes

    def hold_preloads(self, *, held: bool) -> None:
        """Begin no preload while `held`; those that were asked for begin afterwards."""
        for lane in self.lanes.values():
            lane.hold_preload(held=held)

    def refuse_new(self, reason: Draining) -> None:
        """From now on `admit` raises `reason`; requests already admitted are served."""
        self._closed_for = reason

    def accept_new(self) -> None:
        """Admit requests again."""
        self._closed_for = None

    @property
    def admitted(self) -> int:
        """Requests in flight or queued on the whole node."""
        return sum(lane.admitted for lane in self.lanes.values())

    def _help_others(self, idle: Lane[E]) -> float:
        """Let an idle lane take over the queued request that gains most by it, if any does. Return when to look again:
        requests in flight elsewhere may take longer than expected."""
        waiting = [it for lane in self.lanes.values() if lane is not idle for it in lane.expected_starts()]
        found = [(ticket, it) for ticket, starts_in_s in waiting if (it := self._movable(idle, ticket, starts_in_s))]
        best = choose_move([movable for _ticket, movable in found])
        if best is None:
            return trio.current_time() + _LOOK_AGAIN_S if found else math.inf
        ticket, movable = found[best]
        logger.info(
            "%s: taking over a request for %s from %s: it would start in %.2f s there, in %.2f s here",
            idle.device_id,
            ticket.model_id,
            ticket.lane.device_id,
            movable.starts_in_s,
            movable.elsewhere_s,
        )
        ticket.lane.hand_over(ticket, idle)
        return math.inf  # it has something to do

    def _movable(self, idle: Lane[E], ticket: Ticket[E], starts_in_s: float | None) -> Movable | None:
        candidate = self._candidate(idle.device_id, ticket.model_id)
        able = candidate.obstacle is None and candidate.has_room and not candidate.failing
        if starts_in_s is None or not able or not ticket.counted:
            return None
        return Movable(starts_in_s, candidate.start_s + candidate.delays_s)

    def _move_elsewhere(self, ticket: Ticket[E], least_bytes: int) -> bool:
        """Hand over a request that its device has no room for to another device, if its model may fit on one."""
        others = [device_id for device_id, lane in self.lanes.items() if lane is not ticket.lane]
        roomy = [it for it in others if self._servers[it].has_room(ticket.model_id, least_bytes)]
        placed = choose([it for name in roomy if not (it := self._candidate(name, ticket.model_id)).failing])
        if not isinstance(placed, Placed):
            return False
        logger.info(
            "%s: taking over a request for %s from %s, which has no room for it",
            placed.device_id,
            ticket.model_id,
            ticket.lane.device_id,
        )
        ticket.lane.hand_over(ticket, self.lanes[placed.device_id])
        return True

    def _serves_at_once(self, device_id: str, model_id: str) -> bool:
        """Whether a request that arrives now would be granted there without a load and without a wait."""
        return self.lanes[device_id].serves_at_once(model_id) and self._can_take(device_id, model_id)

    def _can_take(self, device_id: str, model_id: str) -> bool:
        """Whether the device has a place for a request, and can serve the model."""
        lane = self.lanes[device_id]
        return lane.places_taken < lane.limit and self._servers[device_id].obstacle(model_id) is None

    def _candidate_at_once(self, device_id: str, model_id: str, cached_on: str | None) -> Candidate:
        """As `_candidate`, for a device that serves it at once."""
        lane = self.lanes[device_id]
        return Candidate(
            device_id=device_id,
            residency=Residency.READY,
            admitted=lane.places_taken,
            limit=lane.limit,
            memory_free_bytes=self._servers[device_id].memory_free_bytes(),
            has_conversation=device_id == cached_on,
        )

    def _candidate(self, device_id: str, model_id: str, cached_on: str | None = None) -> Candidate:
        lane, servers = self.lanes[device_id], self._servers[device_id]
        obstacle = servers.obstacle(model_id)
        views = servers.views()
        states = {view.model_id: view.state for view in views}
        ready = states.get(model_id) is ServerState.READY
        coming = model_id in lane.wanted or lane.loading == model_id
        leaving = (None if ready or coming else lane.leaving(model_id, views)) or frozenset()
        return Candidate(
            device_id=device_id,
            residency=_residency(states, lane, model_id),
            admitted=lane.places_taken,
            limit=lane.limit,
            start_s=lane.times.start_s(model_id, lane.backlog(views), leaving),
            delays_s=self._delays_s(lane, model_id, leaving, is_new=not ready and not coming),
            memory_free_bytes=servers.memory_free_bytes(),
            has_room=servers.has_room(model_id),
            has_conversation=device_id == cached_on,
            failing=states.get(model_id) in (ServerState.BACKING_OFF, ServerState.FAILED),
            obstacle=obstacle.reason if obstacle else None,
            retry_at=obstacle.retry_at if obstacle else None,
        )

    def _delays_s(self, lane: Lane[E], model_id: str, leaving: Collection[str], *, is_new: bool) -> float:
        """How much loading this request would add for others: the models that it evicts are loaded again, and while its
        own is loaded, those that are queued there wait, and those that come next."""
        own_s = _OWN_LOADS * lane.times.load_s(model_id) if is_new and lane.admitted else 0.0
        return own_s + sum(map(lane.times.load_s, leaving))


def _residency(states: Mapping[str, ServerState], lane: Lane[E], model_id: str) -> Residency:
    if states.get(model_id) is ServerState.READY:
        return Residency.READY
    if model_id in lane.wanted or lane.loading == model_id or states.get(model_id) is ServerState.STARTING:
        return Residency.LOADING
    if any(state is not ServerState.FAILED for state in states.values()):
        return Residency.OTHER_MODEL
    return Residency.EMPTY
