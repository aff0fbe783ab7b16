"""A device's lane: the bounded queue of its requests, and the one task that decides which request is served by what.

One decision does not wait for that task: a request that can be granted and passes nobody is granted at once.

Requests arrive through a memory channel (`request_queue`). The bound is the counter `admitted`, which changes only in
synchronous code (`submit`, `close`, a refusal): with no await inside, nothing comes between the check and the change.
"""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec
import trio
from msgspec.structs import replace

from nodeagent.errors import BackendUnavailable, ModelLoadTimeout, OutOfDeviceMemory, QueueFull, Refusal
from nodeagent.scheduling.deadlines import Deadlines
from nodeagent.scheduling.estimates import Backlog, LaneTimes, Running
from nodeagent.scheduling.forecast import forecast
from nodeagent.scheduling.in_flight import InFlight
from nodeagent.scheduling.lease import Lease, Ticket, TicketState
from nodeagent.scheduling.loads import Loading, Loads
from nodeagent.scheduling.queueing import Grant, LaneSnapshot, Load, Policy, Priority, QueuedRequest, Wait, step
from nodeagent.scheduling.request_queue import RequestQueue
from nodeagent.scheduling.room import Room, ServerUse, staying
from nodeagent.scheduling.seam import LaneView, Servers, ServerState, ServerView, TicketView
from nodeagent.scheduling.swap_aware import SwapAware

if TYPE_CHECKING:
    from nodeagent.scheduling.spanning_lane import SpanningLane

logger = logging.getLogger(__name__)

E = TypeVar("E")

# Who asked for a load.
_A_REQUEST, _AN_OPERATOR, _PRELOAD = "for a request", "by an operator", "preload"


class LaneRules(msgspec.Struct, frozen=True, kw_only=True):
    """`max_pending` requests in flight plus queued; `queue_timeout_s` for a turn, `queue_timeouts_s` for those of some
    models; `startup_timeout_s` for a start.

    A load that no request waits for any more goes on for `abandoned_load_grace_s`, unless another model is wanted. At
    most `max_models` models are resident; with `concurrent_models` they serve at the same time.
    """

    max_pending: int
    queue_timeout_s: float
    startup_timeout_s: float
    abandoned_load_grace_s: float = 30.0
    max_models: int = 1
    concurrent_models: bool = False
    policy: Policy = msgspec.field(default_factory=SwapAware)
    queue_timeouts_s: Mapping[str, float] = msgspec.field(default_factory=dict)

    def timeout_of(self, model_id: str) -> float:
        """How long a request for the model may wait for its turn."""
        return self.queue_timeouts_s.get(model_id, self.queue_timeout_s)


class Lane(Generic[E]):
    """The queue and the decisions of one device.

    What changes: `_admitted`, `_queue` and `_in_flight`, in `submit`, `close`, `requeue`, `hand_over` and the lane's
    task, always synchronously; `_why_loaded` and `turns`, how many the task has taken, in the lane's task;
    `_preload_held` in `hold_preload`; `_sharing` in `share_places`. `rules` may be replaced at any time. `on_idle` is
    called whenever the lane has nothing to do, and returns when to call it again. `moves_elsewhere` is asked to hand a
    request over to another lane, whose device has so many bytes for its model; it returns whether it did.

    A device may be held for a model that spans it (`span.py`). `SpanningLane` is the lane of such models.
    """

    def __init__(self, device_id: str, servers: Servers[E], rules: LaneRules) -> None:
        self.device_id = device_id
        self.rules = rules
        self.times = LaneTimes()
        self.on_idle: Callable[[], float] = lambda: math.inf
        self.moves_elsewhere: Callable[[Ticket[E], int], bool] = lambda _ticket, _least_bytes: False
        self._servers = servers
        self.turns = 0
        self._admitted = 0
        self._numbers = itertools.count()
        self._queue: RequestQueue[E] = RequestQueue(rules.max_pending, self._request_queued)
        self._in_flight: InFlight[E] = InFlight()
        self._preload_held = False
        self._why_loaded: dict[str, str] = {}
        self._sharing: list[Lane[E]] = [self]
        self._loads = Loads(
            device_id,
            servers,
            self.times,
            on_end=self._load_ended,
            on_refusal=self._refuse_model,
            look_again=self.nudge,
        )

    def __repr__(self) -> str:
        in_flight = len(self._in_flight.requests)
        loading = f", loading {self.loading}" if self.loading else ""
        return (
            f"<Lane {self.device_id}: {in_flight} in flight, {self._admitted - in_flight} waiting, "
            f"limit {self.limit}{loading}>"
        )

    # What requests call: synchronous, so that nothing comes between.

    @property
    def admitted(self) -> int:
        """Requests in flight plus queued, those still in the mailbox included."""
        return self._admitted

    @property
    def places_taken(self) -> int:
        """The same, with those of the lanes that this one shares its places with."""
        return sum([lane._admitted for lane in self._sharing])

    def share_places(self, home: "Lane[E]") -> None:
        """Count requests here among those of the `home` lane, which has the same limit. Call it before either runs."""
        home._sharing.append(self)
        self._sharing = home._sharing

    @property
    def limit(self) -> int:
        return self.rules.max_pending

    def submit(
        self, request_id: str, model_id: str, priority: Priority = Priority.NORMAL, *, slots: int = 1
    ) -> Ticket[E]:
        """Take a place; raise QueueFull if every place is taken. `slots` is how many slots of the server are needed."""
        if self.places_taken >= self.rules.max_pending:
            raise QueueFull(model_id, self.rules.max_pending, self.place_free_in_s())
        ticket = self._ticket(request_id, model_id, priority, slots)
        self._queue.post(ticket)
        self._admitted += 1
        self._take_free_devices(model_id)
        if not self._granted_at_once(ticket):
            self.nudge()
        return ticket

    def request_load(self, model_id: str) -> Ticket[E]:
        """Queue for the load of a model as a request does, but without taking a place or a slot.

        For operators: once the ticket is granted, the model is ready. The caller closes the ticket.
        """
        ticket = self._ticket(f"load {model_id}", model_id, counted=False)
        self._queue.insert(ticket)
        self.nudge()
        return ticket

    def request_hold(self, holder: "SpanningLane[E]", model_id: str) -> Ticket[E]:
        """Queue for this device on behalf of a lane whose model spans it; granted at once if nobody waits here.

        While the hold is granted, the model counts as in use. The caller closes it.
        """
        ticket = self._ticket(f"hold for {model_id}", model_id, slots=0, counted=False, holder=holder)
        ticket.admitted_at = holder.demand(model_id).admitted_at
        self._queue.insert(ticket)
        if not self._held_at_once(ticket):
            self.nudge()
        return ticket

    def close(self, ticket: Ticket[E]) -> None:
        """Give up whatever the ticket holds, at any point of its life; later calls do nothing."""
        if ticket.state is TicketState.CLOSED:
            return
        if ticket.state in (TicketState.WAITING, TicketState.GRANTED):
            self._admitted -= ticket.counted
        if ticket in self._in_flight:
            now = trio.current_time()
            self._return_lease(ticket, now)
            assert ticket.granted_at is not None
            if ticket.slots:  # else it says nothing of how long a slot is in use
                self.times.served(ticket.model_id, now - ticket.granted_at)
        elif self._queue.remove(ticket):
            self._loads.waiter_left(ticket.model_id, self.wanted)
        ticket.state = TicketState.CLOSED
        ticket.lease = None
        # While other requests run on the model and none is queued, there is nothing to decide.
        if self.wanted or not self._in_use(ticket.model_id):
            self.nudge()

    def requeue(self, ticket: Ticket[E]) -> None:
        """Put a request whose server died back at the head of the queue: it had its turn already."""
        self._return_lease(ticket, trio.current_time())
        self._queue.insert_first(ticket)
        ticket.state, ticket.lease, ticket.granted_at = TicketState.WAITING, None, None
        self.nudge()

    def refuse(self, ticket: Ticket[E], refusal: Refusal) -> None:
        """End a queued request with this refusal; one that is not queued goes on."""
        if ticket.state is TicketState.WAITING:
            self._refuse(ticket, refusal)
            self._loads.waiter_left(ticket.model_id, self.wanted)
            self.nudge()

    def hand_over(self, ticket: Ticket[E], to: "Lane[E]") -> None:
        """Move a queued request to another lane; it keeps its age. Raises QueueFull if that lane has no place."""
        if to.places_taken >= to.limit:
            raise QueueFull(ticket.model_id, to.limit, to.place_free_in_s())
        self._queue.remove(ticket)
        self._admitted -= ticket.counted
        to._admitted += ticket.counted
        ticket.lane, ticket.tried_again = to, False
        to._queue.insert(ticket)
        self._loads.waiter_left(ticket.model_id, self.wanted)
        self.nudge()
        to.nudge()

    async def unload(self, model_id: str, *, force: bool = False) -> None:
        """Stop the model's server here once its requests in flight have ended (at once with `force`); return when it
        has stopped.

        Meanwhile nothing more is granted on it; afterwards a request for the model loads it again. Cancelling lets a
        stop that has begun go on.
        """
        await self._loads.unload(model_id, lambda: not force and self._in_use(model_id))

    def preload(self, model_id: str) -> None:
        """Load this model when the lane starts, or as soon as no request wants another."""
        self._loads.preloads.append(model_id)
        self.nudge()

    def hold_preload(self, *, held: bool) -> None:
        """Don't begin the preload while `held`."""
        self._preload_held = held
        self.nudge()

    def nudge(self) -> None:
        """Make the lane look again; called after any change that it can't see itself (a server's state, say)."""
        self._queue.nudge()
        for ticket in self._in_flight.holds:
            assert ticket.holder is not None
            ticket.holder._queue.nudge()

    # What others see of the lane.

    @property
    def loading(self) -> str | None:
        """The model that is being loaded now."""
        return self._loads.current.model_id if self._loads.current else None

    @property
    def loads_now(self) -> str | None:
        """The same, once the load itself has begun: what waits for devices that it spans has not."""
        return self.loading

    @property
    def wanted(self) -> Set[str]:
        """The models of the queued requests. It changes with the queue."""
        return self._queue.models.keys()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight, queued or loading."""
        return not (self._admitted or self._queue.waiting or self._in_flight or self._loads.current)

    def why_loaded(self, model_id: str) -> str | None:
        """Who asked for the model's last load here, None if nobody did yet."""
        return self._why_loaded.get(model_id)

    def view(self) -> LaneView:
        """The load of the lane now, with that of the lanes that share its places."""
        in_flight = sum(len(lane._in_flight.requests) for lane in self._sharing)
        waiting = self.places_taken - in_flight
        self._queue.collect()
        in_order = [ticket.model_id for ticket in self._queue.waiting]
        return LaneView(in_flight, waiting, self.rules.max_pending, self.times.drained_s(self.backlog(), in_order))

    def backlog(self, views: Sequence[ServerView[E]] | None = None) -> Backlog:
        """What is ahead of a request that arrives now; `views` are the device's servers, looked up if not given."""
        slots = {it.model_id: it.slots for it in views or self._servers.views() if it.state is ServerState.READY}
        load = self._loads.current
        staying = [model_id for model_id in slots if load is None or model_id in load.beside]
        resident = load.model_id if load is not None else next(iter(staying), None)
        return Backlog(
            resident=resident,
            # How many a server that is loading will have is not known here: as many as the one before, or one.
            slots=slots.get(resident or "", next(iter(slots.values()), 1)),
            beside={model_id: slots[model_id] for model_id in staying if model_id != resident},
            concurrent=self.rules.concurrent_models,
            load_left_s=self._loads.left_s(),
            running=self._running(),
            queued=self._queue.models,
        )

    def leaving(self, model_id: str, views: Sequence[ServerView[E]] | None = None) -> frozenset[str] | None:
        """The models that give way to a load of this one; None if pinned ones leave no room for it."""
        now = trio.current_time()
        uses = self._server_uses(now, self._servers.views() if views is None else views)
        return self._room().leaving(model_id, uses, reload_s=self.times.load_s, now=now)

    def place_free_in_s(self) -> float:
        """An estimate of when the next place in this lane becomes free."""
        self._queue.collect()
        next_model = self._queue.waiting[0].model_id if self._queue.waiting else None
        return self.times.place_free_s(self.backlog(), next_model)

    def expected_starts(self) -> list[tuple[Ticket[E], float | None]]:
        """The queued requests in the order in which they are expected to start, with the seconds until then (None if
        unknown)."""
        self._queue.collect()
        if not self._queue.waiting:
            return []
        lane = self._snapshot(trio.current_time(), self._servers.views())
        load_left_s = self.times.load_s(lane.loading) if lane.is_held and lane.loading else self._loads.left_s()
        starts = forecast(self.rules.policy, lane, self._running(), load_left_s=load_left_s)
        return sorted(zip(self._queue.waiting, starts, strict=True), key=_start_order)

    def queue(self) -> list[TicketView]:
        """Every request of the lane: those in flight, then the queued ones as they are expected to start.

        Those for models that span this device and others are in the queue of the first one.
        """
        now = trio.current_time()
        in_flight = [ticket for lane in self._sharing for ticket in lane._in_flight.requests]
        starts = [it for lane in self._sharing for it in lane.expected_starts() if it[0].holder is None]
        waiting = enumerate(sorted(starts, key=_start_order), start=1)
        return [
            *(ticket.view(now) for ticket in in_flight),
            *(ticket.view(now, place, starts_in_s) for place, (ticket, starts_in_s) in waiting),
        ]

    def serves_at_once(self, model_id: str) -> bool:
        """Whether a request for one slot of the model would be granted at once; False if that is not sure."""
        return not self._queue.models and len(self.device_ids) == 1 and self._free_server(model_id, 1) is not None

    # What the lane of models that span this device asks.

    def would_serve(self, request: QueuedRequest) -> bool:
        """Whether the policy, with this request in the queue as well, would grant it now."""
        self._queue.collect()
        if not self._queue.waiting:
            return True
        lane, place = self._with_request(request)
        while True:
            match self.rules.policy.decide(lane):
                case Grant(index) if index != place:  # it may run beside the other
                    lane = replace(lane, waiting=(*lane.waiting[:index], *lane.waiting[index + 1 :]))
                    place -= index < place
                case decision:
                    return isinstance(decision, Grant)

    def was_passed_by(self, ticket: Ticket[E]) -> None:
        """A request for a model that spans this device was granted, ahead of those that are older."""
        self._queue.collect()
        for passed in self._queue.waiting:
            if passed.passed_since is None and passed.admitted_at < ticket.admitted_at:
                passed.passed_since = trio.current_time()

    def rather_serves(self, request: QueuedRequest) -> bool:
        """Whether the policy, with this request in the queue as well, waits for the turn of another model."""
        decision = self.rules.policy.decide(self._with_request(request)[0])
        return isinstance(decision, Wait) and decision.then not in (None, request.model_id)

    def _with_request(self, request: QueuedRequest) -> tuple[LaneSnapshot, int]:
        """The lane as if this request were queued too, in the place that the hold for its model had, and this place."""
        lane = self._snapshot(trio.current_time(), self._servers.views())
        holds = [it.number for it in self._in_flight.holds if it.model_id == request.model_id]
        age_order = (request.admitted_at, holds[0] if holds else math.inf)
        place = sum(ticket.age_order <= age_order for ticket in self._queue.waiting)
        return replace(lane, waiting=(*lane.waiting[:place], request, *lane.waiting[place:])), place

    def has_others_than(self, hold: Ticket[E]) -> bool:
        """Whether anything but that hold is queued here."""
        self._queue.collect()
        return any(ticket is not hold for ticket in self._queue.waiting)

    @property
    def device_ids(self) -> list[str]:
        """The devices that the lane's models use."""
        return [self.device_id]

    @property
    def home_id(self) -> str:
        """The device in whose queue the lane's requests are shown."""
        return self._sharing[0].device_id

    @property
    def held_for(self) -> list[str]:
        """The models for which this device is held now."""
        return [ticket.model_id for ticket in self._in_flight.holds]

    # The lane's own task.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Decide for this device until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                wake_at = self._take_turn(nursery)
                self.turns += 1
                await self._queue.change(wake_at)

    def _take_turn(self, nursery: trio.Nursery) -> float:
        """Do everything that can be decided now; return when to look again at the latest.

        The servers are looked at once: nothing here waits, so they don't change meanwhile.
        """
        self._queue.collect()
        now, views = trio.current_time(), self._servers.views()
        self._before_turn(views)
        self._grant_load_requests(now, views)
        self._refuse_crowded_out(views)
        wake_at = min(
            self._refuse_overdue(now, views), self._loads.end_abandoned(nursery, self.rules.abandoned_load_grace_s)
        )
        while True:
            match self.rules.policy.decide(self._snapshot(now, views)):
                case Grant(index, reason):
                    self._grant(index, reason, now, views)
                case Load(model_id, _, beside) if (hold := self._hold_for(model_id)) is not None:
                    if self.loading is None:
                        self._grant_hold(hold, beside, now)
                        continue
                    if model_id in (hold.holder.wanted if hold.holder is not None else ()):
                        self._loads.cancel()
                    return wake_at
                case Load(model_id) if self._take_free_devices(model_id):
                    continue
                case Load(model_id, reason, beside):
                    begun = self._loads.begin(nursery, model_id, reason, beside)
                    if begun:
                        own = [it for it in self._queue.waiting if it.model_id == model_id]
                        self._why_loaded[model_id] = _A_REQUEST if any(it.counted for it in own) else _AN_OPERATOR
                        stay = {model_id, *beside}
                        self._loads.displaced(it.model_id for it in views if it.returns and it.model_id not in stay)
                    if not begun or not self.rules.concurrent_models:
                        return wake_at
                case Wait(reason, until, then):
                    logger.debug("%s: %s", self.device_id, reason)
                    if then is not None and self._hold_for(then) is None:
                        self._loads.prepare(nursery, then)
                    return min(wake_at, until, self._use_spare_time(nursery, views))

    def _granted_at_once(self, ticket: Ticket[E]) -> bool:
        """Grant the request that was just queued, if it needs no load and passes nobody; return whether it was granted.

        One that needs no slot passes nobody who waits for a slot of the same model.
        """
        self._queue.collect()
        others, now = len(self._queue.waiting) - 1, ticket.admitted_at
        if not others and (server := self._free_server(ticket.model_id, ticket.slots)) is not None:
            self._grant(0, "nobody else waits", now, [server])
            return True
        if others and (ticket.slots or len(self._queue.models) > 1):
            return False
        views = self._servers.views()
        decision = step(self._snapshot(now, views), others, "nobody is passed")  # whatever the policy, it is its turn
        if not isinstance(decision, Grant):
            return False
        self._grant(decision.index, decision.reason, now, views)
        return True

    def _free_server(self, model_id: str, slots: int) -> ServerView[E] | None:
        """The model's server, if it has so many slots free, and so clearly that the policy need not be asked; None
        otherwise (during a load or a hold, say). Nearly every request for a loaded model is granted by this."""
        running = self._in_flight
        if self._loads.current is not None or running.holds or self._loads.is_held(model_id):
            return None
        if not (self.rules.concurrent_models or running.uses_only(model_id)):
            return None
        server = self._servers.view(model_id)
        if server is None or server.state is not ServerState.READY or not self._may_serve(model_id):
            return None
        free = server.slots - running.slots_in_use(model_id, server.slots)
        return server if min(slots, server.slots) <= free else None

    def _grant_load_requests(self, now: float, views: Sequence[ServerView[E]]) -> None:
        """Operators who asked for a load need the model to be ready, and no slot."""
        requests = [ticket for ticket in self._queue.waiting if not ticket.counted and ticket.holder is None]
        uses = self._server_uses(now, views) if requests else {}
        for ticket in requests:
            use = uses.get(ticket.model_id)
            if use is not None and use.ready and not use.held and self.loading in (None, ticket.model_id):
                self._grant(self._queue.waiting.index(ticket), "the model is loaded", now, views)

    def _use_spare_time(self, nursery: trio.Nursery, views: Sequence[ServerView[E]]) -> float:
        """No request can be granted and none needs a load: preload, unload what is idle, help other lanes."""
        busy = {*self.wanted, *self._in_flight.models}
        if not busy and not self._preload_held:
            begun = self._loads.begin_preload(nursery, partial(self._stay_beside, views))
            if begun is not None:
                self._why_loaded[begun] = _PRELOAD
        unload_at = self._loads.unload_idle(nursery, views, busy, self.rules.abandoned_load_grace_s)
        if sum(view.is_active for view in views) > self.rules.max_models:
            now = trio.current_time()
            surplus = self._room().surplus(self._server_uses(now, views), reload_s=self.times.load_s, now=now)
            self._loads.unload_surplus(nursery, surplus - busy)
        return min(unload_at, self.on_idle() if self.is_idle else math.inf)

    def _stay_beside(self, views: Sequence[ServerView[E]], model_id: str) -> frozenset[str]:
        """The servers that a load of the model leaves alone."""
        uses = self._server_uses(trio.current_time(), views)
        return staying(model_id, uses, self.leaving(model_id, views) or frozenset())

    def _ticket(
        self,
        request_id: str,
        model_id: str,
        priority: Priority = Priority.NORMAL,
        slots: int = 1,
        *,
        counted: bool = True,
        holder: "SpanningLane[E] | None" = None,
    ) -> Ticket[E]:
        return Ticket(
            lane=self,
            number=next(self._numbers),
            request_id=request_id,
            model_id=model_id,
            admitted_at=trio.current_time(),
            priority=priority,
            slots=slots,
            counted=counted,
            holder=holder,
        )

    def _request_queued(self, ticket: Ticket[E]) -> None:
        self._loads.waiter_added(ticket.model_id)

    def _snapshot(self, now: float, views: Sequence[ServerView[E]]) -> LaneSnapshot:
        """The lane as its policy sees it."""
        uses, load = self._server_uses(now, views), self._loads.current
        hold = next((it for it in self._in_flight.holds if not uses[it.model_id].ready), None)
        held = hold is not None and load is None
        return LaneSnapshot(
            now=now,
            waiting=[ticket.as_queued() for ticket in self._queue.waiting],
            servers=uses,
            loading=hold.model_id if hold is not None and held else self.loading,
            times=self.times,
            staying=load.beside if load is not None else (hold.beside if hold is not None else None) or frozenset(),
            room=self._room(),
            is_held=held,
        )

    def _room(self) -> Room:
        return Room(
            max_models=self.rules.max_models,
            concurrent=self.rules.concurrent_models,
            free_bytes=self._servers.memory_free_bytes() if self.rules.max_models > 1 else None,
            bytes_of=self._servers.bytes_of,
        )

    def _server_uses(self, now: float, views: Sequence[ServerView[E]]) -> dict[str, ServerUse]:
        """The servers by model. A model that spans this device and is about to be loaded is in use already."""
        held = {
            ticket.model_id: ServerUse(ready=False, slots=1, in_flight=0, beside_slots=1)
            for ticket in self._in_flight.holds
        }
        return held | {
            view.model_id: ServerUse(
                ready=view.state is ServerState.READY and self._may_serve(view.model_id),
                slots=view.slots,
                in_flight=self._in_flight.slots_in_use(view.model_id, view.slots),
                beside_slots=self._in_flight.without_slot(view.model_id),
                held=self._loads.is_held(view.model_id) or self._is_closed(view.model_id),
                since=view.since,
                used_at=self._loads.used_at(view.model_id),
                resident=view.is_active,
                pinned=view.pinned,
                backing_off=view.state is ServerState.BACKING_OFF and view.retry_at is not None and view.retry_at > now,
            )
            for view in views
        }

    # What `SpanningLane` does before and after.

    def _before_turn(self, views: Sequence[ServerView[E]]) -> None:
        """The lane's task is about to decide."""

    def _before_grant(self, ticket: Ticket[E]) -> None:
        """The request is about to be granted."""

    def _take_free_devices(self, model_id: str) -> bool:
        """Hold what the model needs besides this lane, if that takes no wait; return whether anything was taken."""
        return False

    def _may_serve(self, model_id: str) -> bool:
        """Whether the model has all that it needs to serve a queued request now."""
        return True

    def _is_closed(self, model_id: str) -> bool:
        """Whether the model is in use, but has to let others go first."""
        return False

    # Models that span this device.

    def _hold_for(self, model_id: str) -> Ticket[E] | None:
        """The hold that is queued here for a model that spans this device."""
        return next((it for it in self._queue.waiting if it.holder is not None and it.model_id == model_id), None)

    def _held_at_once(self, ticket: Ticket[E]) -> bool:
        """Grant the hold that was just queued if nobody else waits and nothing is in its way."""
        self._queue.collect()
        if len(self._queue.waiting) > 1 or self.loading is not None:
            return False
        now = trio.current_time()
        match self.rules.policy.decide(self._snapshot(now, self._servers.views())):
            case Grant(index, _):
                self._grant(index, "nobody else waits", now, self._servers.views())
            case Load(_, _, beside):
                self._grant_hold(ticket, beside, now)
            case Wait():
                return False
        return True

    def _grant_hold(self, ticket: Ticket[E], beside: frozenset[str] | None, now: float) -> None:
        """Hold the device; `beside` stays when the model is loaded, None if it runs."""
        passed = self._queue.waiting[: self._queue.waiting.index(ticket)]
        for other in passed:
            other.passed_since = other.passed_since if other.passed_since is not None else now
        self._queue.remove(ticket)
        ticket.state, ticket.granted_at, ticket.beside = TicketState.GRANTED, now, beside
        self._in_flight.add(ticket)
        if ticket.holder is not None and ticket.passed_since is not None:
            ticket.holder.was_passed(ticket.model_id, ticket.passed_since)
        ticket.decided()

    def _running(self) -> list[Running]:
        now = trio.current_time()
        return [Running(it.model_id, now - (it.granted_at or now), it.slots) for it in self._in_flight]

    def _in_use(self, model_id: str) -> bool:
        return self._in_flight.uses(model_id)

    def _grant(self, index: int, reason: str, now: float, views: Sequence[ServerView[E]]) -> None:
        ticket = self._queue.waiting[index]
        if ticket.holder is not None:
            self._grant_hold(ticket, None, now)  # it runs already
            return
        self._before_grant(ticket)
        self._queue.remove(ticket)
        logger.debug("%s: granting %s ahead of %d others: %s", self.device_id, ticket.request_id, index, reason)
        for passed in self._queue.waiting[:index] if ticket.counted and ticket.slots else ():
            passed.passed_since = passed.passed_since if passed.passed_since is not None else now
        [server] = [view for view in views if view.model_id == ticket.model_id]
        assert server.endpoint is not None, f"{server.model_id} is ready without an endpoint"
        self._add_load_time(ticket, self._loads.current, now)
        ticket.lease = Lease(
            device_id=self.device_id,
            model_id=ticket.model_id,
            generation=server.generation,
            endpoint=server.endpoint,
            queued_s=max(0.0, now - ticket.admitted_at - ticket.load_s),
            load_s=ticket.load_s,
            granted_at=now,
        )
        ticket.state, ticket.granted_at = TicketState.GRANTED, now
        if ticket.counted:
            self._in_flight.add(ticket)
        ticket.decided()

    def _return_lease(self, ticket: Ticket[E], now: float) -> None:
        self._in_flight.remove(ticket)
        self._loads.lease_returned(ticket.model_id, now)

    def _load_ended(self, load: Loading) -> None:
        self._queue.collect()
        for ticket in self._queue.waiting:
            self._add_load_time(ticket, load, trio.current_time())

    def _add_load_time(self, ticket: Ticket[E], load: Loading | None, now: float) -> None:
        """Count how long a request waited for this load, apart from its waiting for a turn."""
        if load is not None and load.model_id == ticket.model_id:
            ticket.load_s += now - max(load.began_at, ticket.admitted_at)

    # Refusals.

    def _refuse_model(self, model_id: str, refusal: Refusal) -> None:
        self._queue.collect()
        waiting = [it for it in self._queue.waiting if it.model_id == model_id and it.holder is None]
        if isinstance(refusal, OutOfDeviceMemory):
            if self._makes_room(model_id, waiting):
                return
            self._hand_over_or_refuse(waiting, refusal, refusal.least_bytes or 0)
            return
        for ticket in waiting:
            self._refuse(ticket, refusal)

    def _hand_over_or_refuse(self, tickets: Sequence[Ticket[E]], refusal: Refusal, least_bytes: int = 0) -> None:
        """Another device may take over what this one has no room for."""
        for ticket in tickets:
            if not (ticket.counted and self.moves_elsewhere(ticket, least_bytes)):
                self._refuse(ticket, refusal)

    def _refuse_crowded_out(self, views: Sequence[ServerView[E]]) -> None:
        """Refuse the requests for models that pinned ones leave no room for: nothing that a lane does changes that."""
        if not any(view.pinned for view in views):
            return
        running = {view.model_id for view in views if view.is_active}
        for model_id in [it for it in self.wanted if it not in running and it != self.loading]:
            if self.leaving(model_id, views) is None:
                obstacle = self._servers.obstacle(model_id)
                is_told = obstacle is not None and not obstacle.elsewhere
                reason = obstacle.reason if obstacle is not None and is_told else "pinned models leave no room for it"
                refusal = BackendUnavailable(model_id, f"{self.device_id}: {reason}")
                waiting = [ticket for ticket in self._queue.waiting if ticket.model_id == model_id]
                for hold in waiting:
                    if hold.holder is not None:
                        hold.holder.refuse_model(model_id, refusal)
                self._hand_over_or_refuse([ticket for ticket in waiting if ticket.holder is None], refusal)

    def _makes_room(self, model_id: str, waiting: Sequence[Ticket[E]]) -> bool:
        """Whether others here can give way to a model that ran out of memory. Then its requests go on waiting, for one
        more try: what it needs is known better now, so that its next load has more of the others stopped."""
        if not waiting or any(ticket.tried_again for ticket in waiting) or self._servers.obstacle(model_id):
            return False
        leaving = self.leaving(model_id)
        if not leaving:
            return False
        logger.info("%s: making room for %s: %s will be unloaded", self.device_id, model_id, ", ".join(sorted(leaving)))
        for ticket in waiting:
            ticket.tried_again = True
        return True

    def _refuse(self, ticket: Ticket[E], refusal: Refusal) -> None:
        self._queue.remove(ticket)
        self._admitted -= ticket.counted
        ticket.state, ticket.refusal = TicketState.REFUSED, refusal
        ticket.decided()

    def _refuse_overdue(self, now: float, views: Sequence[ServerView[E]]) -> float:
        """Refuse the requests that have waited too long; return when the next one will have."""
        if not self._queue.waiting:
            return math.inf
        deadlines = Deadlines(
            now=now,
            queue_timeout_s=self.rules.timeout_of,
            startup_timeout_s=self.rules.startup_timeout_s,
            starting={view.model_id: view for view in views if view.state is ServerState.STARTING},
            times=self.times,
        )
        next_at = math.inf
        for ticket in [ticket for ticket in self._queue.waiting if ticket.holder is None]:
            overdue_at = deadlines.overdue_at(ticket)
            if overdue_at > now:
                next_at = min(next_at, overdue_at)
                continue
            refusal = deadlines.refusal(ticket)
            if isinstance(refusal, ModelLoadTimeout):
                logger.warning("%s (raise llama_server_startup_timeout_s to wait longer)", refusal)
            self._refuse(ticket, refusal)
        return next_at


def _start_order(ticket_and_start: tuple[object, float | None]) -> float:
    """By when a request is expected to start; unknown comes last."""
    starts_in_s = ticket_and_start[1]
    return math.inf if starts_in_s is None else starts_in_s
