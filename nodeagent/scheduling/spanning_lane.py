"""The lane of models that span several devices: a lane like another, which serves while it holds its members."""

import logging
from collections.abc import Sequence
from typing import TypeVar

import trio

from nodeagent.errors import Refusal
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.lease import Ticket
from nodeagent.scheduling.queueing import Priority, QueuedRequest
from nodeagent.scheduling.seam import Servers, ServerState, ServerView
from nodeagent.scheduling.span import Span

logger = logging.getLogger(__name__)

E = TypeVar("E")


class SpanningLane(Lane[E]):
    """The queue and the decisions for the models that span the members of `span`.

    A model is ready here only while its members are held for it, and their policies would serve it.
    """

    def __init__(self, device_id: str, servers: Servers[E], rules: LaneRules, span: Span[E]) -> None:
        super().__init__(device_id, servers, rules)
        self._span = span
        self._loads.take_devices = self._take_devices
        self._loads.make_room = span.make_room

    @property
    def device_ids(self) -> list[str]:
        """The members, in the node's order."""
        return self._span.device_ids

    @property
    def loads_now(self) -> str | None:
        return self.loading if self.loading is not None and self._span.is_held_for(self.loading) else None

    def expected_starts(self) -> list[tuple[Ticket[E], float | None]]:
        """As for any lane, once the device that is asked for has been taken."""
        starts = super().expected_starts()
        taken_in_s = self._span.taken_in_s() if starts else 0.0
        if taken_in_s is None:
            return [(ticket, None) for ticket, _starts_in_s in starts]
        return [(ticket, None if it is None else it + taken_in_s) for ticket, it in starts]

    # What the members ask.

    def demand(self, model_id: str) -> QueuedRequest:
        """What waits here for the model, as one request: as old as the oldest and as urgent as the most urgent."""
        self._queue.collect()
        waiting = [ticket.as_queued() for ticket in self._queue.waiting if ticket.model_id == model_id]
        if not waiting:
            return QueuedRequest(model_id=model_id, admitted_at=trio.current_time(), priority=Priority.BATCH, slots=0)
        return QueuedRequest(
            model_id=model_id,
            admitted_at=min(it.admitted_at for it in waiting),
            priority=min(it.priority for it in waiting),
            passed_since=min((it.passed_since for it in waiting if it.passed_since is not None), default=None),
            slots=0,
        )

    def was_passed(self, model_id: str, since: float) -> None:
        """A member has granted younger requests ahead of those that wait here for the model."""
        for ticket in self._queue.waiting:
            if ticket.model_id == model_id and ticket.passed_since is None:
                ticket.passed_since = since

    def refuse_model(self, model_id: str, refusal: Refusal) -> None:
        """A member has no room for the model, and will have none: refuse its requests."""
        self._refuse_model(model_id, refusal)
        if self.loading == model_id:
            self._loads.cancel()
        self.nudge()

    # Taking the members and giving them back.

    async def _take_devices(self, model_id: str) -> None:
        """Return once the members are held for the model, whose file is looked at meanwhile."""
        if self._in_use(model_id) and self._span.is_held_for(model_id):
            return
        if not self._span.take_at_once(self, model_id):
            if not any(view.model_id == model_id and view.is_active for view in self._servers.views()):
                await self._servers.prepare(model_id)
            await self._span.take(self, model_id)
        while not self._is_ready(model_id) and not self._span.has_plan:
            await self._span.take(self, model_id)  # it ran when a device was taken, and has ended since

    def _take_free_devices(self, model_id: str) -> bool:
        """If the model is ready and its devices are free, hold them, without a wait; return whether that was done."""
        span = self._span
        if span.model_id is not None or self.loading is not None or self._loads.is_held(model_id):
            return False
        return self._is_ready(model_id) and span.take_at_once(self, model_id)

    def _is_ready(self, model_id: str) -> bool:
        return any(view.model_id == model_id and view.state is ServerState.READY for view in self._servers.views())

    def _before_turn(self, views: Sequence[ServerView[E]]) -> None:
        """Release the members if the model has no use for them now, or others there go first."""
        span = self._span
        span.demand_changed()
        model_id, load = span.model_id, self._loads.current
        if load is not None:
            backs_off = any(it.model_id == load.model_id and it.state is ServerState.BACKING_OFF for it in views)
            if (load.model_id not in self.wanted and span.others_wait()) or (backs_off and span.gives_way(self)):
                logger.info("%s: load of %s cancelled: other requests wait there", self.device_id, load.model_id)
                self._loads.cancel()
        elif model_id is not None and not self._in_use(model_id):
            is_ready = any(it.model_id == model_id and it.state is ServerState.READY for it in views)
            if not is_ready or model_id not in self.wanted or not self._may_serve(model_id):
                span.release()

    def _may_serve(self, model_id: str) -> bool:
        """Whether the devices that the model spans are held for it, and their policies give it the turn."""
        span = self._span
        return span.is_held_for(model_id) and span.may_serve(self, model_id)

    def _is_closed(self, model_id: str) -> bool:
        """Whether a model that spans devices is in use, but has to let others go first."""
        return self._in_use(model_id) and not self._may_serve(model_id)

    def _before_grant(self, ticket: Ticket[E]) -> None:
        self._span.passes(ticket)
