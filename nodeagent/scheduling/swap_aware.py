"""The policy that knows what a switch of models costs.

The first rule that applies decides whose turn it is:

1. **A model in use is never evicted** (`queueing.step` enforces it).
2. **Fairness.** Once later requests have been granted ahead of a request for `swap_fairness_s`, no more are. Requests
   that have reached that bound are served next: those for the loaded model first, then the one passed for the longest.
   So no request starves, and if many reach the bound, each model is loaded once, not once per request.
3. **Priority.** Interactive before normal before batch. A request that is passed becomes more urgent by one class for
   each third of `swap_fairness_s`.
4. **Residency.** The loaded model (or the one that is loading) serves its requests, ahead of older ones for models that
   it has to give way to, for one turn: `turn_s`, counted from when it became ready or the other request arrived,
   whichever was later.
5. **Order.** Then the oldest request decides.

Where several models are resident and serve at the same time, the rules apply to each request in turn: one that has to
wait holds up only those for its own model and for the models that give way to it.

A turn is long enough to make the load worth its time: `_LOADS_PER_TURN` loads, at least `min_residency_s`, at most
`swap_fairness_s`. So about a tenth of the time goes into switching, however long a load takes, and where loads are
quick no request waits long.
"""

import math
from collections.abc import Iterator
from functools import partial

import msgspec

from nodeagent.scheduling.queueing import (
    IDLE,
    Decision,
    LaneSnapshot,
    Priority,
    QueuedRequest,
    Wait,
    first_possible,
    step,
)

_LOADS_PER_TURN = 8.0
# How many classes a request has risen once it was passed for `swap_fairness_s`.
_CLASSES = len(Priority)


class SwapAware(msgspec.Struct, frozen=True):
    """The policy, by its two durations in seconds (the configuration keys of the same names)."""

    swap_fairness_s: float = 30.0
    min_residency_s: float = 2.0

    def decide(self, lane: LaneSnapshot) -> Decision:
        if not lane.waiting:
            return Wait(IDLE)
        if lane.room.concurrent:
            return first_possible(lane, self._order(lane), partial(self._turns_end_at, lane))
        overdue = [index for index, request in enumerate(lane.waiting) if self._is_overdue(request, lane.now)]
        if overdue:
            return step(lane, self._first_overdue(lane, overdue), f"passed for {self.swap_fairness_s:g} s")
        return self._by_residency(lane, self._most_urgent(lane))

    def turn_s(self, lane: LaneSnapshot, model_id: str) -> float:
        """How long a model may go on ahead of requests for another."""
        worth_s = max(self.min_residency_s, _LOADS_PER_TURN * lane.times.load_s(model_id))
        return min(self.swap_fairness_s, worth_s)

    def _turn_ends_at(self, lane: LaneSnapshot, model_id: str, other: QueuedRequest) -> float:
        """When the model's turn ahead of that request for another one is over."""
        return max(lane.servers[model_id].since, other.admitted_at) + self.turn_s(lane, model_id)

    def _is_overdue(self, request: QueuedRequest, now: float) -> bool:
        return request.passed_since is not None and now - request.passed_since >= self.swap_fairness_s

    def _first_overdue(self, lane: LaneSnapshot, overdue: list[int]) -> int:
        resident = [index for index in overdue if _is_resident(lane, lane.waiting[index].model_id)]
        return min(resident or overdue, key=lambda index: lane.waiting[index].passed_since or 0.0)

    def _order(self, lane: LaneSnapshot) -> Iterator[tuple[int, str]]:
        """Every queued request in the order in which it may be granted, with the reason."""
        waiting = list(enumerate(lane.waiting))
        overdue = [(index, request) for index, request in waiting if self._is_overdue(request, lane.now)]
        for index, _request in sorted(overdue, key=lambda it: it[1].passed_since or 0.0):
            yield index, f"passed for {self.swap_fairness_s:g} s"
        others = [(index, request) for index, request in waiting if not self._is_overdue(request, lane.now)]
        others.sort(key=lambda it: (_backs_off(lane, it[1].model_id), self._class(it[1], lane.now)))
        for index, _request in others:
            yield index, "oldest request"

    def _turns_end_at(self, lane: LaneSnapshot, index: int) -> float:
        """When those of the models that give way to this request have had their turn for which requests are queued."""
        request = lane.waiting[index]
        if lane.is_ready(request.model_id) or self._is_overdue(request, lane.now):
            return -math.inf
        wanted = {other.model_id for other in lane.waiting}
        busy = [model_id for model_id in lane.leaving(request.model_id) or () if model_id in wanted]
        ready = [model_id for model_id in busy if lane.servers[model_id].ready and not lane.servers[model_id].held]
        return max((self._turn_ends_at(lane, it, request) for it in ready), default=-math.inf)

    def _most_urgent(self, lane: LaneSnapshot) -> list[int]:
        """The queued requests of the most urgent class, without those whose server can't be started yet."""
        every = range(len(lane.waiting))
        startable = [index for index in every if not _backs_off(lane, lane.waiting[index].model_id)] or every
        classes = {index: self._class(lane.waiting[index], lane.now) for index in startable}
        best = min(classes.values())
        return [index for index, its_class in classes.items() if its_class == best]

    def _class(self, request: QueuedRequest, now: float) -> int:
        if request.passed_since is None:
            return request.priority
        return max(0, request.priority - int((now - request.passed_since) * _CLASSES / self.swap_fairness_s))

    def _by_residency(self, lane: LaneSnapshot, candidates: list[int]) -> Decision:
        """Of equally urgent requests, those for the resident model go first until its turn ends."""
        loading = [index for index in candidates if lane.waiting[index].model_id == lane.loading]
        if loading:
            return step(lane, loading[0], "its model is loading already")
        for model_id, server in lane.servers.items():
            own = [index for index in candidates if lane.waiting[index].model_id == model_id]
            others = [index for index in candidates if lane.waiting[index].model_id != model_id]
            if not server.ready or server.held or not own or not others:
                continue
            other = lane.waiting[others[0]]
            turn_ends = self._turn_ends_at(lane, model_id, other)
            if lane.now < turn_ends and _gives_way(lane, model_id, other.model_id):
                return step(lane, own[0], f"its model is loaded, and its turn lasts {turn_ends - lane.now:.2f} s more")
        return step(lane, candidates[0], "oldest request")


def _is_resident(lane: LaneSnapshot, model_id: str) -> bool:
    server = lane.servers.get(model_id)
    return lane.loading == model_id or (server is not None and server.ready and not server.held)


def _gives_way(lane: LaneSnapshot, model_id: str, to: str) -> bool:
    """Whether the model has to leave before a request for the other one can be served."""
    return lane.room.max_models == 1 or (not lane.is_ready(to) and model_id in (lane.leaving(to) or ()))


def _backs_off(lane: LaneSnapshot, model_id: str) -> bool:
    server = lane.servers.get(model_id)
    return server is not None and server.backing_off
