"""How long a queued request may wait: for its turn, and for its model to be loaded. Pure."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from nodeagent.errors import ModelLoadTimeout, QueueTimeout, Refusal
from nodeagent.scheduling.estimates import LaneTimes
from nodeagent.scheduling.lease import Ticket
from nodeagent.scheduling.seam import ServerView

# A client that is told to come back sooner would only find the same load still going on.
_LEAST_RETRY_S = 1.0


class Deadlines:
    """The deadlines of one lane's requests at one moment. `starting` are the servers that are starting, by model;
    `queue_timeout_s` says how long a model's requests may wait for their turn."""

    def __init__(
        self,
        *,
        now: float,
        queue_timeout_s: Callable[[str], float],
        startup_timeout_s: float,
        starting: Mapping[str, ServerView[Any]],
        times: LaneTimes,
    ) -> None:
        self._now = now
        self._queue_timeout_s = queue_timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._starting = starting
        self._times = times

    def overdue_at(self, ticket: Ticket[Any]) -> float:
        """When this request will have waited too long."""
        return min(ticket.admitted_at + self._queue_timeout_s(ticket.model_id), self._ready_by(ticket))

    def refusal(self, ticket: Ticket[Any]) -> Refusal:
        """Why this request, which is overdue, may wait no longer."""
        if self._now >= self._ready_by(ticket):
            return self._load_timeout(ticket)
        return QueueTimeout(ticket.model_id, ticket.lane.device_id, self._now - ticket.admitted_at)

    def _ready_by(self, ticket: Ticket[Any]) -> float:
        """A whole time-out from the spawn, or from the request's own arrival if that was later (it may be the second
        try of a client that was told to come back)."""
        server = self._starting.get(ticket.model_id)
        if server is None or server.spawned_at is None:
            return math.inf
        return max(server.spawned_at, ticket.admitted_at) + self._startup_timeout_s

    def _load_timeout(self, ticket: Ticket[Any]) -> ModelLoadTimeout:
        spawned_at = self._starting[ticket.model_id].spawned_at
        assert spawned_at is not None
        left_s = self._times.load_s(ticket.model_id) - (self._now - spawned_at)
        retry_s = max(_LEAST_RETRY_S, left_s)
        return ModelLoadTimeout(ticket.model_id, ticket.lane.device_id, self._startup_timeout_s, retry_s)
