"""A device's lane: the bounded queue of its requests, and the one task that decides who is served and by what.

The memory channel is the mailbox: tickets, and at most one nudge, a token that says "something changed, look again".
The bound is the counter `admitted`, which changes only in synchronous code (`submit`, `close`, a refusal): with no
await inside, nothing comes between the look and the change. It can't be derived: what trio hands from the channel to
the waiting task is for a moment in neither.
"""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import trio

from nodeagent.errors import BackendUnavailable, ModelLoadTimeout, QueueFull, QueueTimeout, Refusal
from nodeagent.scheduling.estimate import LaneTimes
from nodeagent.scheduling.host import Servers, ServerState, ServerView
from nodeagent.scheduling.lease import Lease, Ticket, TicketState
from nodeagent.scheduling.queueing import Grant, Load, ServerUse, Wait, decide

logger = logging.getLogger(__name__)

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """`max_pending` requests in flight plus queued; `queue_timeout_s` for a turn; `startup_timeout_s` for a start."""

    max_pending: int
    queue_timeout_s: float
    startup_timeout_s: float


@dataclass(frozen=True, slots=True)
class TicketView:
    request_id: str
    model_id: str
    state: str
    age_s: float


@dataclass(frozen=True, slots=True)
class LaneView:
    in_flight: int
    waiting: int
    limit: int
    estimated_wait_s: float
    tickets: tuple[TicketView, ...]

    @property
    def free(self) -> int:
        return max(0, self.limit - self.in_flight - self.waiting)


class _Nudge:
    """Something changed: look again."""


_NUDGE: Final = _Nudge()


@dataclass(slots=True)
class _Loading:
    model_id: str
    began_at: float
    scope: trio.CancelScope


class Lane(Generic[E]):
    """The queue and the decisions of one device.

    What changes: `_admitted`, `_waiting` and `_in_flight` (in `submit`, `close`, `retry` and the lane's task, all
    synchronous), `_loading` (the lane's task and its one load), `_held` (who unloads).
    `limits` may be replaced at any time.
    """

    def __init__(self, device_id: str, servers: Servers[E], limits: LaneLimits) -> None:
        self.device_id = device_id
        self._servers = servers
        self.limits = limits
        self._admitted = 0
        self._numbers = itertools.count()
        self._waiting: list[Ticket[E]] = []
        self._in_flight: list[Ticket[E]] = []
        self._mail_in, self._mail_out = trio.open_memory_channel[Ticket[E] | _Nudge](limits.max_pending + 1)
        self._nudged = False
        self._held: Counter[str] = Counter()
        self._used_at: dict[str, float] = {}
        self._left = trio.Event()
        self._wanted_at_start: str | None = None
        self._loading: _Loading | None = None
        self.times = LaneTimes()

    # What requests call: synchronous, so that nothing comes between.

    @property
    def admitted(self) -> int:
        """Requests in flight plus queued, those still in the mailbox included."""
        return self._admitted

    @property
    def limit(self) -> int:
        return self.limits.max_pending

    def submit(self, request_id: str, model_id: str) -> Ticket[E]:
        """Take a place, or raise QueueFull: every place is taken."""
        if self._admitted >= self.limits.max_pending:
            raise QueueFull(model_id, self.limits.max_pending, self.place_free_in_s())
        ticket = Ticket(self, next(self._numbers), request_id, model_id, trio.current_time())
        self._collect()  # so the mailbox is never full, though the limit may have been raised since it was made
        self._mail_in.send_nowait(ticket)
        self._admitted += 1
        return ticket

    def visit(self, model_id: str) -> Ticket[E]:
        """Ask for a model as a request does, and wait in line as one, but without taking up a place.

        For operators: who is granted this has the model ready, and closes the ticket.
        """
        ticket = Ticket(self, next(self._numbers), f"load {model_id}", model_id, trio.current_time(), counted=False)
        self._collect()
        self._waiting.append(ticket)
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
            if ticket.counted:
                self.times.served(ticket.model_id, trio.current_time() - ticket.granted_at)
        elif ticket in self._waiting:
            self._waiting.remove(ticket)
        ticket.state = TicketState.CLOSED
        ticket.lease = None
        self.nudge()

    def retry(self, ticket: Ticket[E]) -> None:
        """Put a request whose server died under it back, at the head: it had its turn already."""
        self._back(ticket)
        self._collect()
        self._waiting.insert(0, ticket)
        ticket.state, ticket.lease, ticket.granted_at = TicketState.WAITING, None, None
        ticket.undecided()
        self.nudge()

    async def unload(self, model_id: str, *, force: bool = False) -> None:
        """Stop the model's server here once its requests in flight are back (at once with `force`); return when it is.

        Meanwhile nothing more is granted on it; afterwards a request for the model loads it again. Cancelling leaves a
        stop that has begun to go on.
        """
        self._held[model_id] += 1
        await self._unload_held(model_id, force=force)

    def preload(self, model_id: str) -> None:
        """Load this model when the lane starts, or as soon as nobody wants another."""
        self._wanted_at_start = model_id
        self.nudge()

    def nudge(self) -> None:
        """Have the lane look again; called after any change it can't see coming (a server's state, say)."""
        if not self._nudged:
            self._nudged = True
            self._mail_in.send_nowait(_NUDGE)

    def view(self) -> LaneView:
        """The lane as it is now, for status and placement."""
        self._collect()
        now = trio.current_time()
        tickets = tuple(
            TicketView(ticket.request_id, ticket.model_id, ticket.state.value, now - ticket.admitted_at)
            for ticket in (*self._in_flight, *self._waiting)
        )
        in_flight = len(self._in_flight)
        return LaneView(
            in_flight, self._admitted - in_flight, self.limits.max_pending, self._estimated_wait_s(), tickets
        )

    @property
    def loading(self) -> str | None:
        """The model that is being made ready now."""
        return self._loading.model_id if self._loading else None

    def place_free_in_s(self) -> float:
        """An estimate, from measured service times, of when the next place in this lane comes free."""
        now = trio.current_time()
        remaining = [
            self.times.service_s(ticket.model_id) - (now - (ticket.granted_at or now)) for ticket in self._in_flight
        ]
        if remaining:
            return max(0.0, min(remaining))
        if self._waiting:  # they wait for a load
            return self.times.load_s(self._waiting[0].model_id) + self.times.service_s(self._waiting[0].model_id)
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
        wake_at = self._refuse_overdue(trio.current_time())
        while True:
            decision = decide([ticket.model_id for ticket in self._waiting], self._uses(), self.loading)
            logger.debug("%s: %s", self.device_id, decision)
            match decision:
                case Grant(index):
                    self._grant(self._waiting.pop(index))
                case Load(model_id, reason):
                    self._begin_load(nursery, model_id, reason)
                    return wake_at
                case Wait():
                    self._begin_preload(nursery)
                    return min(wake_at, self._unload_idle(nursery))

    def _take_in(self, mail: Ticket[E] | _Nudge) -> None:
        if isinstance(mail, _Nudge):
            self._nudged = False
        elif mail.state is TicketState.WAITING:  # else it was closed between the channel's hand and ours
            # By number: what the channel handed to the task may come after what was collected past it.
            later = (place for place, ticket in enumerate(self._waiting) if ticket.number > mail.number)
            self._waiting.insert(next(later, len(self._waiting)), mail)

    def _collect(self) -> None:
        """Empty the mailbox into the ordered list that the policy sees."""
        while True:
            try:
                mail = self._mail_out.receive_nowait()
            except trio.WouldBlock:
                return
            self._take_in(mail)

    def _uses(self) -> dict[str, ServerUse]:
        uses = {}
        for view in self._servers.views():
            in_flight = sum(ticket.model_id == view.model_id for ticket in self._in_flight)
            held = self._held[view.model_id] > 0
            uses[view.model_id] = ServerUse(view.state is ServerState.READY, view.slots, in_flight, held)
        return uses

    def _grant(self, ticket: Ticket[E]) -> None:
        [server] = [view for view in self._servers.views() if view.model_id == ticket.model_id]
        assert server.endpoint is not None, f"{server.model_id} is ready without an endpoint"
        now = trio.current_time()
        self._charge(ticket, self._loading, now)
        queued_s = max(0.0, now - ticket.admitted_at - ticket.load_s)
        ticket.lease = Lease(
            self.device_id, ticket.model_id, server.generation, server.endpoint, queued_s, ticket.load_s
        )
        ticket.state, ticket.granted_at = TicketState.GRANTED, now
        self._in_flight.append(ticket)
        ticket.decided()

    def _back(self, ticket: Ticket[E]) -> None:
        """A lease is given back."""
        self._in_flight.remove(ticket)
        self._used_at[ticket.model_id] = trio.current_time()
        self._left.set()
        self._left = trio.Event()

    # Loads.

    def _begin_load(self, nursery: trio.Nursery, model_id: str, reason: str) -> None:
        if self._loading is not None:
            self._loading.scope.cancel()  # its end nudges the lane, which then decides anew
            return
        logger.info("%s: loading %s: %s", self.device_id, model_id, reason)
        self._loading = _Loading(model_id, trio.current_time(), trio.CancelScope())
        nursery.start_soon(self._load, self._loading)

    def _begin_preload(self, nursery: trio.Nursery) -> None:
        if self._wanted_at_start is None or self._waiting or self._in_flight or self._loading:
            return
        model_id, self._wanted_at_start = self._wanted_at_start, None
        self._begin_load(nursery, model_id, "preload")

    def _unload_idle(self, nursery: trio.Nursery) -> float:
        """Unload what has been idle for as long as its model may be; return when the next one will have been."""
        now, next_at = trio.current_time(), math.inf
        for view in self._servers.views():
            busy = any(ticket.model_id == view.model_id for ticket in (*self._in_flight, *self._waiting))
            if view.state is not ServerState.READY or view.idle_unload_s is None or busy or self._held[view.model_id]:
                continue
            idle_at = max(view.since, self._used_at.get(view.model_id, 0.0)) + view.idle_unload_s
            if now < idle_at:
                next_at = min(next_at, idle_at)
            else:
                logger.info("%s: unloading %s: no request for %g s", self.device_id, view.model_id, view.idle_unload_s)
                self._held[view.model_id] += 1  # now: nothing may be granted before the new task has begun
                nursery.start_soon(self._unload_held, view.model_id)
        return next_at

    async def _unload_held(self, model_id: str, *, force: bool = False) -> None:
        try:
            while not force and any(ticket.model_id == model_id for ticket in self._in_flight):
                await self._left.wait()
            await self._servers.stop(model_id)
        finally:
            self._held[model_id] -= 1
            self.nudge()

    async def _load(self, loading: _Loading) -> None:
        try:
            with loading.scope:
                await self._servers.ensure(loading.model_id)
                self.times.loaded(loading.model_id, trio.current_time() - loading.began_at)
        except Refusal as refusal:
            logger.warning("%s: %s can't be loaded: %s", self.device_id, loading.model_id, refusal)
            self._refuse_model(loading.model_id, refusal)
        except Exception as error:
            # A fault of ours in one load must not end the node: those who wait are told, the next one tries again.
            logger.exception("%s: loading %s failed unexpectedly", self.device_id, loading.model_id)
            self._refuse_model(loading.model_id, BackendUnavailable(loading.model_id, f"internal error: {error!r}"))
        finally:
            for ticket in self._waiting:
                self._charge(ticket, loading, trio.current_time())
            self._loading = None
            self.nudge()

    def _charge(self, ticket: Ticket[E], loading: _Loading | None, now: float) -> None:
        """Count what a request waited for this load, apart from its waiting for a turn."""
        if loading is not None and loading.model_id == ticket.model_id:
            ticket.load_s += now - max(loading.began_at, ticket.admitted_at)

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
            turn_by = ticket.admitted_at + self.limits.queue_timeout_s
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
        return max(server.spawned_at, ticket.admitted_at) + self.limits.startup_timeout_s

    def _load_timeout(self, server: ServerView[E], now: float) -> ModelLoadTimeout:
        timeout_s = self.limits.startup_timeout_s
        logger.warning(
            "%s: %s is not ready after %g s; its start goes on (raise llama_server_startup_timeout_s to wait longer)",
            self.device_id,
            server.model_id,
            timeout_s,
        )
        still_s = self.times.load_s(server.model_id) - (now - (server.spawned_at or now))
        return ModelLoadTimeout(server.model_id, self.device_id, timeout_s, max(1.0, still_s))

    def _estimated_wait_s(self) -> float:
        now = trio.current_time()
        loaded: Iterable[str] = [view.model_id for view in self._servers.views() if view.state is ServerState.READY]
        running = [(ticket.model_id, now - (ticket.granted_at or now)) for ticket in self._in_flight]
        return self.times.wait_s(next(iter(loaded), None), running, [ticket.model_id for ticket in self._waiting])
