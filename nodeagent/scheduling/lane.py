"""A device's lane: the bounded queue of its requests, and the one task that decides who is served and by what.

The memory channel is the mailbox: tickets, and at most one nudge, a token that says "something changed, look again".
The bound is the counter `admitted`, which changes only in synchronous code (`submit`, `close`, a refusal): with no
await inside, nothing comes between the look and the change. It can't be derived: what trio hands from the channel to
the waiting task is for a moment in neither.
"""

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import trio

from nodeagent.errors import ModelLoadTimeout, QueueFull, QueueTimeout, Refusal
from nodeagent.scheduling.estimates import LaneTimes, Occupied, Running
from nodeagent.scheduling.forecast import forecast
from nodeagent.scheduling.lease import Lease, Ticket, TicketState
from nodeagent.scheduling.loads import Loading, Loads
from nodeagent.scheduling.queueing import Grant, LaneNow, Load, Policy, Priority, ServerUse, Wait, Waiting
from nodeagent.scheduling.seam import LaneView, Servers, ServerState, ServerView, TicketView
from nodeagent.scheduling.swap_aware import SwapAware

logger = logging.getLogger(__name__)

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class LaneRules:
    """`max_pending` requests in flight plus queued; `queue_timeout_s` for a turn; `startup_timeout_s` for a start.

    A load that nobody waits for any more goes on for `abandoned_load_grace_s`, unless another model is wanted.
    """

    max_pending: int
    queue_timeout_s: float
    startup_timeout_s: float
    abandoned_load_grace_s: float = 30.0
    policy: Policy = field(default_factory=SwapAware)


class _Nudge:
    """Something changed: look again."""


_NUDGE: Final = _Nudge()


class Lane(Generic[E]):
    """The queue and the decisions of one device.

    What changes: `_admitted`, `_waiting` and `_in_flight` (in `submit`, `close`, `requeue`, `hand_over` and the lane's
    task, all synchronous), `_mailed` (the tickets in the channel or on their way out of it). `rules` may be replaced at
    any time. `on_rest` is called whenever the lane has nothing to do, and says when it wants to be called again.
    """

    def __init__(self, device_id: str, servers: Servers[E], rules: LaneRules) -> None:
        self.device_id = device_id
        self.rules = rules
        self.times = LaneTimes()
        self.on_rest: Callable[[], float] = lambda: math.inf
        self._servers = servers
        self._admitted = 0
        self._numbers = itertools.count()
        self._waiting: list[Ticket[E]] = []
        self._in_flight: list[Ticket[E]] = []
        self._mail_in, self._mail_out = trio.open_memory_channel[Ticket[E] | _Nudge](rules.max_pending + 1)
        self._mailed: list[Ticket[E]] = []
        self._nudged = False
        self._loads = Loads(
            device_id,
            servers,
            self.times,
            on_end=self._load_is_over,
            on_refusal=self._refuse_model,
            look_again=self.nudge,
        )

    # What requests call: synchronous, so that nothing comes between.

    @property
    def admitted(self) -> int:
        """Requests in flight plus queued, those still in the mailbox included."""
        return self._admitted

    @property
    def limit(self) -> int:
        return self.rules.max_pending

    def submit(self, request_id: str, model_id: str, priority: Priority = Priority.NORMAL) -> Ticket[E]:
        """Take a place, or raise QueueFull: every place is taken."""
        if self._admitted >= self.rules.max_pending:
            raise QueueFull(model_id, self.rules.max_pending, self.place_free_in_s())
        ticket = Ticket(self, next(self._numbers), request_id, model_id, trio.current_time(), priority)
        self._collect()  # so the mailbox is never full, though the limit may have been raised since it was made
        self._note_return(model_id)
        self._mail_in.send_nowait(ticket)
        self._mailed.append(ticket)
        self._admitted += 1
        return ticket

    def visit(self, model_id: str) -> Ticket[E]:
        """Ask for a model as a request does, and wait in line as one, but without taking up a place, or a slot.

        For operators: who is granted this has the model ready, and closes the ticket.
        """
        ticket = Ticket(self, next(self._numbers), f"load {model_id}", model_id, trio.current_time(), counted=False)
        self._collect()
        self._queue(ticket)
        self.nudge()
        return ticket

    def close(self, ticket: Ticket[E]) -> None:
        """Give up whatever the ticket holds, at any point of its life; later calls do nothing."""
        if ticket.state is TicketState.CLOSED:
            return
        self._collect()  # a ticket that leaves at once must not take up room in the mailbox
        if ticket.state in (TicketState.WAITING, TicketState.GRANTED):
            self._admitted -= ticket.counted
        if ticket in self._in_flight:
            self._back(ticket)
            assert ticket.granted_at is not None
            self.times.served(ticket.model_id, trio.current_time() - ticket.granted_at)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
            self._loads.one_left(ticket.model_id, self.wanted)
        ticket.state = TicketState.CLOSED
        ticket.lease = None
        self.nudge()

    def requeue(self, ticket: Ticket[E]) -> None:
        """Put a request whose server died under it back, at the head: it had its turn already."""
        self._back(ticket)
        self._collect()
        self._waiting.insert(0, ticket)
        self._loads.one_came(ticket.model_id)
        ticket.state, ticket.lease, ticket.granted_at = TicketState.WAITING, None, None
        ticket.undecided()
        self.nudge()

    def hand_over(self, ticket: Ticket[E], to: "Lane[E]") -> None:
        """Let a waiting request take a place in another lane instead; it keeps its age. QueueFull if there is none."""
        if to.admitted >= to.limit:
            raise QueueFull(ticket.model_id, to.limit, to.place_free_in_s())
        self._collect()
        to._collect()
        self._waiting.remove(ticket)
        self._admitted -= ticket.counted
        to._admitted += ticket.counted
        ticket.lane = to
        to._queue(ticket)
        self._loads.one_left(ticket.model_id, self.wanted)
        self.nudge()
        to.nudge()

    async def unload(self, model_id: str, *, force: bool = False) -> None:
        """Stop the model's server here once its requests in flight are back (at once with `force`); return when it is.

        Meanwhile nothing more is granted on it; afterwards a request for the model loads it again. Cancelling leaves a
        stop that has begun to go on.
        """
        await self._loads.unload(model_id, lambda: not force and self._in_use(model_id))

    def preload(self, model_id: str) -> None:
        """Load this model when the lane starts, or as soon as nobody wants another."""
        self._loads.preload = model_id
        self.nudge()

    def nudge(self) -> None:
        """Have the lane look again; called after any change it can't see coming (a server's state, say)."""
        if not self._nudged:
            self._nudged = True
            self._mail_in.send_nowait(_NUDGE)

    def view(self) -> LaneView:
        """The lane as it is now, for status and placement."""
        self._collect()
        in_flight = len(self._in_flight)
        return LaneView(
            in_flight, self._admitted - in_flight, self.rules.max_pending, self.times.drained_s(self._occupied())
        )

    def expected_starts(self) -> list[tuple[Ticket[E], float | None]]:
        """Those who wait, in the order in which they are expected to start, with the seconds until then (None where
        nothing can be expected)."""
        self._collect()
        lane = self._now(trio.current_time())
        starts = forecast(self.rules.policy, lane, self._running(), load_left_s=self._loads.left_s())
        return sorted(zip(self._waiting, starts, strict=True), key=lambda it: math.inf if it[1] is None else it[1])

    def queue(self) -> list[TicketView]:
        """Every request of the lane: those in flight, then those who wait as they are expected to start."""
        now = trio.current_time()
        waiting = enumerate(self.expected_starts(), start=1)
        return [
            *(_ticket_view(ticket, now) for ticket in self._in_flight),
            *(_ticket_view(ticket, now, place, starts_in_s) for place, (ticket, starts_in_s) in waiting),
        ]

    @property
    def loading(self) -> str | None:
        """The model that is being made ready now."""
        return self._loads.current.model_id if self._loads.current else None

    @property
    def wanted(self) -> set[str]:
        """The models that somebody waits for."""
        return {ticket.model_id for ticket in self._queued()}

    @property
    def is_at_rest(self) -> bool:
        """Whether there is nothing in flight, waiting or loading."""
        return not (self._admitted or self._waiting or self._in_flight or self._loads.current)

    def start_in_s(self, model_id: str) -> float:
        """An estimate, from measured times, of when a request for that model that came now would start."""
        self._collect()
        return self.times.start_s(model_id, self._occupied())

    def place_free_in_s(self) -> float:
        """An estimate, from measured times, of when the next place in this lane comes free."""
        self._collect()
        if running := self._running():
            return min(map(self.times.left_s, running))
        if queued := self._queued():  # they wait for a load
            model_id = queued[0].model_id
            load_s = self._loads.left_s() if self.loading == model_id else self.times.load_s(model_id)
            return load_s + self.times.service_s(model_id)
        return 0.0

    # The lane's own task.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Decide for this device until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                wake_at = self._take_turn(nursery)
                with trio.move_on_at(wake_at):
                    self._take_in(await self._mail_out.receive())

    def _take_turn(self, nursery: trio.Nursery) -> float:
        """Act on everything that can be decided now; return when to look again at the latest."""
        self._collect()
        self._end_visits()
        now = trio.current_time()
        wake_at = min(self._refuse_overdue(now), self._loads.end_abandoned(nursery, self.rules.abandoned_load_grace_s))
        while True:
            decision = self.rules.policy.decide(self._now(now))
            match decision:
                case Grant(index, reason):
                    self._grant(index, reason)
                case Load(model_id, reason):
                    self._loads.begin(nursery, model_id, reason)
                    return wake_at
                case Wait(reason, until, then):
                    logger.debug("%s waits: %s", self.device_id, reason)
                    if then is not None:
                        self._loads.prepare(nursery, then)
                    return min(wake_at, until, self._rest(nursery))

    def _end_visits(self) -> None:
        """Operators who wait for a model only want it to be ready: they need no slot."""
        visits = [ticket for ticket in self._waiting if not ticket.counted]
        uses = self._uses(trio.current_time()) if visits else {}
        for ticket in visits:
            use = uses.get(ticket.model_id)
            if use is not None and use.ready and not use.held and self.loading in (None, ticket.model_id):
                self._grant(self._waiting.index(ticket), "its model is ready")

    def _rest(self, nursery: trio.Nursery) -> float:
        """Nothing is to be granted or loaded for anybody now: see to what else there is to do."""
        busy = {*self.wanted, *(ticket.model_id for ticket in self._in_flight)}
        if not busy:
            self._loads.begin_preload(nursery)
        idle_at = self._loads.unload_idle(nursery, busy, self.rules.abandoned_load_grace_s)
        return min(idle_at, self.on_rest() if self.is_at_rest else math.inf)

    def _take_in(self, mail: Ticket[E] | _Nudge) -> None:
        if isinstance(mail, _Nudge):
            self._nudged = False
            return
        self._mailed.remove(mail)
        if mail.state is TicketState.WAITING:  # else it was closed between the channel's hand and ours
            self._queue(mail)

    def _queue(self, ticket: Ticket[E]) -> None:
        """Put it in line by its age: what the channel handed to the task may come after what was collected past it."""
        later = (place for place, other in enumerate(self._waiting) if other.age_order > ticket.age_order)
        self._waiting.insert(next(later, len(self._waiting)), ticket)
        self._loads.one_came(ticket.model_id)

    def _collect(self) -> None:
        """Empty the mailbox into the ordered list that the policy sees."""
        while True:
            try:
                mail = self._mail_out.receive_nowait()
            except trio.WouldBlock:
                return
            self._take_in(mail)

    def _now(self, now: float) -> LaneNow:
        """The lane as its policy sees it."""
        waiting = [
            Waiting(ticket.model_id, ticket.admitted_at, ticket.priority, ticket.passed_since)
            for ticket in self._waiting
        ]
        return LaneNow(now, waiting, self._uses(now), self.loading, self.times)

    def _uses(self, now: float) -> dict[str, ServerUse]:
        return {
            view.model_id: ServerUse(
                view.state is ServerState.READY,
                view.slots,
                sum(ticket.model_id == view.model_id for ticket in self._in_flight),
                self._loads.is_held(view.model_id),
                view.since,
                self._loads.used_at.get(view.model_id),
                view.state is ServerState.BACKING_OFF and view.retry_at is not None and view.retry_at > now,
            )
            for view in self._servers.views()
        }

    def _in_use(self, model_id: str) -> bool:
        return any(ticket.model_id == model_id for ticket in self._in_flight)

    def _grant(self, index: int, reason: str) -> None:
        now = trio.current_time()
        ticket = self._waiting.pop(index)
        logger.debug("%s grants request %s, past %d others: %s", self.device_id, ticket.request_id, index, reason)
        for passed in self._waiting[:index] if ticket.counted else ():
            passed.passed_since = passed.passed_since if passed.passed_since is not None else now
        [server] = [view for view in self._servers.views() if view.model_id == ticket.model_id]
        assert server.endpoint is not None, f"{server.model_id} is ready without an endpoint"
        self._charge(ticket, self._loads.current, now)
        queued_s = max(0.0, now - ticket.admitted_at - ticket.load_s)
        ticket.lease = Lease(
            self.device_id, ticket.model_id, server.generation, server.endpoint, queued_s, ticket.load_s, now
        )
        ticket.state, ticket.granted_at = TicketState.GRANTED, now
        if ticket.counted:
            self._in_flight.append(ticket)
        ticket.decided()

    def _back(self, ticket: Ticket[E]) -> None:
        """A lease is given back."""
        self._in_flight.remove(ticket)
        self._loads.lease_is_back(ticket.model_id)

    def _queued(self) -> list[Ticket[E]]:
        """Everyone who waits, the one too that the channel has just handed to the lane's task."""
        return [*self._waiting, *(ticket for ticket in self._mailed if ticket.state is TicketState.WAITING)]

    def _note_return(self, model_id: str) -> None:
        used_at = self._loads.used_at.get(model_id)
        if used_at is not None and not any(it.model_id == model_id for it in (*self._in_flight, *self._queued())):
            self.times.came_back(model_id, trio.current_time() - used_at)

    # Loads.

    def _load_is_over(self, load: Loading) -> None:
        self._collect()
        for ticket in self._waiting:
            self._charge(ticket, load, trio.current_time())

    def _charge(self, ticket: Ticket[E], load: Loading | None, now: float) -> None:
        """Count what a request waited for this load, apart from its waiting for a turn."""
        if load is not None and load.model_id == ticket.model_id:
            ticket.load_s += now - max(load.began_at, ticket.admitted_at)

    # Refusals.

    def _refuse_model(self, model_id: str, refusal: Refusal) -> None:
        self._collect()
        for ticket in [ticket for ticket in self._waiting if ticket.model_id == model_id]:
            self._refuse(ticket, refusal)

    def _refuse(self, ticket: Ticket[E], refusal: Refusal) -> None:
        self._waiting.remove(ticket)
        self._admitted -= ticket.counted
        ticket.state, ticket.refusal = TicketState.REFUSED, refusal
        ticket.decided()

    def _refuse_overdue(self, now: float) -> float:
        """Refuse those who waited too long; return when the next one will have."""
        starting = {view.model_id: view for view in self._servers.views() if view.state is ServerState.STARTING}
        next_at = math.inf
        for ticket in list(self._waiting):
            turn_by = ticket.admitted_at + self.rules.queue_timeout_s
            ready_by = self._ready_by(ticket, starting.get(ticket.model_id))
            if now >= ready_by:
                self._refuse(ticket, self._load_timeout(starting[ticket.model_id], now))
            elif now >= turn_by:
                self._refuse(ticket, QueueTimeout(ticket.model_id, self.device_id, now - ticket.admitted_at))
            else:
                next_at = min(next_at, turn_by, ready_by)
        return next_at

    def _ready_by(self, ticket: Ticket[E], server: ServerView[E] | None) -> float:
        """When a request that waits for a start has waited long enough: a whole time-out from the spawn, or from
        its own arrival if that was later (it may be the second try of a client that was told to come back)."""
        if server is None or server.spawned_at is None:
            return math.inf
        return max(server.spawned_at, ticket.admitted_at) + self.rules.startup_timeout_s

    def _load_timeout(self, server: ServerView[E], now: float) -> ModelLoadTimeout:
        timeout_s = self.rules.startup_timeout_s
        logger.warning(
            "%s: %s is not ready after %g s; its start goes on (raise llama_server_startup_timeout_s to wait longer)",
            self.device_id,
            server.model_id,
            timeout_s,
        )
        still_s = self.times.load_s(server.model_id) - (now - (server.spawned_at or now))
        return ModelLoadTimeout(server.model_id, self.device_id, timeout_s, max(1.0, still_s))

    def _running(self) -> list[Running]:
        now = trio.current_time()
        return [Running(ticket.model_id, now - (ticket.granted_at or now)) for ticket in self._in_flight]

    def _occupied(self) -> Occupied:
        at_hand = [view for view in self._servers.views() if view.state is ServerState.READY]
        slots = at_hand[0].slots if at_hand else 1
        return Occupied(
            self.loading or (at_hand[0].model_id if at_hand else None),
            slots,
            self._loads.left_s(),
            self._running(),
            [ticket.model_id for ticket in self._queued()],
        )


def _ticket_view(
    ticket: Ticket[E], now: float, position: int | None = None, starts_in_s: float | None = None
) -> TicketView:
    age_s = now - ticket.admitted_at
    return TicketView(
        ticket.request_id, ticket.model_id, ticket.state.value, ticket.priority, age_s, position, starts_in_s
    )
