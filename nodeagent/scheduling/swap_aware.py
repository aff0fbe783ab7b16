"""The policy that knows what a switch of models costs.

Whose turn it is, the first rule that has a say:

1. **A model in use is never evicted** (`queueing.step` sees to it).
2. **Fairness.** Once later requests have been granted before a request for `swap_fairness_s`, no more are: those that
   have been passed for that long are served, of the loaded model first, then the one passed for the longest. So nobody
   starves, and with many of them overdue, each model is loaded once, not once for each.
3. **Priority.** Interactive before normal before batch. Being passed ages a request: one class for each third of
   `swap_fairness_s`.
4. **Residency.** The loaded model (or the one that loads) goes on with its requests, past older ones for other models,
   for one turn: `turn_s`, counted from when it became ready or the other request came, whichever was later. When its
   requests run out before that, the device idles for at most `residency_linger_s` if its clients are known to come
   back at once when they have their answer.
5. **Order.** Then the oldest request decides.

A turn is as long as makes the load worth its time: `_LOADS_PER_TURN` loads, at least `min_residency_s`, at most
`swap_fairness_s`. So about a tenth of the time goes into switching, however long a load takes, and where loads are
quick nobody waits for long.
"""

from dataclasses import dataclass

from nodeagent.scheduling.queueing import Decision, LaneNow, Priority, Wait, Waiting, step

_LOADS_PER_TURN = 8.0
# Of a priority, the class that a request has reached when it was passed for as long as anybody may be.
_CLASSES = len(Priority)


@dataclass(frozen=True, slots=True)
class SwapAware:
    """The policy, by its three durations in seconds (the configuration's keys of the same names)."""

    swap_fairness_s: float = 30.0
    min_residency_s: float = 2.0
    residency_linger_s: float = 0.05

    def decide(self, lane: LaneNow) -> Decision:
        if not lane.waiting:
            return Wait("nobody waits")
        overdue = [index for index, request in enumerate(lane.waiting) if self._is_overdue(request, lane.now)]
        if overdue:
            return step(lane, self._first_overdue(lane, overdue), f"passed for {self.swap_fairness_s:g} s")
        return self._by_residency(lane, self._most_urgent(lane))

    def turn_s(self, lane: LaneNow, model_id: str) -> float:
        """How long a model may go on past those who wait for another."""
        worth_s = max(self.min_residency_s, _LOADS_PER_TURN * lane.times.load_s(model_id))
        return min(self.swap_fairness_s, worth_s)

    def _is_overdue(self, request: Waiting, now: float) -> bool:
        return request.passed_since is not None and now - request.passed_since >= self.swap_fairness_s

    def _first_overdue(self, lane: LaneNow, overdue: list[int]) -> int:
        at_hand = [index for index in overdue if _is_at_hand(lane, lane.waiting[index].model_id)]
        return min(at_hand or overdue, key=lambda index: lane.waiting[index].passed_since or 0.0)

    def _most_urgent(self, lane: LaneNow) -> list[int]:
        """The waiting requests of the best class, without those whose server can't be started yet."""
        everyone = range(len(lane.waiting))
        startable = [index for index in everyone if not _backs_off(lane, lane.waiting[index].model_id)] or everyone
        classes = {index: self._class(lane.waiting[index], lane.now) for index in startable}
        best = min(classes.values())
        return [index for index, its_class in classes.items() if its_class == best]

    def _class(self, request: Waiting, now: float) -> int:
        if request.passed_since is None:
            return request.priority
        return max(0, request.priority - int((now - request.passed_since) * _CLASSES / self.swap_fairness_s))

    def _by_residency(self, lane: LaneNow, candidates: list[int]) -> Decision:
        """Of equally urgent requests those for the model at hand come first, for as long as its turn lasts."""
        loading = [index for index in candidates if lane.waiting[index].model_id == lane.loading]
        if loading:
            return step(lane, loading[0], "it loads already")
        for model_id, server in lane.servers.items():
            own = [index for index in candidates if lane.waiting[index].model_id == model_id]
            others = [index for index in candidates if lane.waiting[index].model_id != model_id]
            if not server.ready or server.held or not others:
                continue
            turn_ends = max(server.since, lane.waiting[others[0]].admitted_at) + self.turn_s(lane, model_id)
            if own and lane.now < turn_ends:
                return step(lane, own[0], f"it is loaded, for {turn_ends - lane.now:.2f} s more if others wait")
            lingers_until = min(turn_ends, self._lingers_until(lane, model_id, lane.waiting[others[0]]))
            if not own and lane.now < lingers_until:
                return Wait(f"clients of {model_id} may come back", until=lingers_until)
        return step(lane, candidates[0], "it is the oldest")

    def _lingers_until(self, lane: LaneNow, model_id: str, candidate: Waiting) -> float:
        """Until when the device idles for the clients that this model has just answered."""
        server = lane.servers[model_id]
        if server.in_flight or server.used_at is None or candidate.priority is Priority.INTERACTIVE:
            return lane.now
        comes_back = lane.times.return_s(model_id) <= self.residency_linger_s
        return server.used_at + self.residency_linger_s if comes_back else lane.now


def _is_at_hand(lane: LaneNow, model_id: str) -> bool:
    server = lane.servers.get(model_id)
    return lane.loading == model_id or (server is not None and server.ready and not server.held)


def _backs_off(lane: LaneNow, model_id: str) -> bool:
    server = lane.servers.get(model_id)
    return server is not None and server.backing_off
