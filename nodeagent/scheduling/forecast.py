"""When the queued requests are expected to start: the policy itself, run ahead with the measured times."""

import math
from collections.abc import Sequence

from msgspec.structs import replace

from nodeagent.scheduling.estimates import Running
from nodeagent.scheduling.queueing import Grant, LaneSnapshot, Load, Policy, Wait
from nodeagent.scheduling.room import ServerUse

# Each step looks at every queued request, so a long queue would take a while; further back the forecast is too
# uncertain to be worth it.
_AHEAD = 64


def forecast(
    policy: Policy, lane: LaneSnapshot, running: Sequence[Running], *, load_left_s: float = 0.0
) -> list[float | None]:
    """Seconds until each queued request starts, in the queue's order; None if unknown.

    `load_left_s` is what the load under way still takes. No request is expected to arrive, leave or fail.
    """
    ahead = _Simulation(lane, running, load_left_s)
    starts: list[float | None] = [None] * len(lane.waiting)
    for _step in range(4 * len(ahead.waiting)):  # a grant, its end, a load and a pause for each: then nothing moves
        match policy.decide(ahead.lane()):
            case Grant(index):
                starts[ahead.grant(index)] = ahead.now - lane.now
            case Load(model_id, beside=beside):
                ahead.load(model_id, beside)
            case Wait(until=until):
                if not ahead.waiting or not ahead.advance(until):
                    break
    return starts


class _Simulation:
    """A lane in the time to come. What changes: everything, in `grant`, `load` and `advance`."""

    def __init__(self, lane: LaneSnapshot, running: Sequence[Running], load_left_s: float) -> None:
        self.now = lane.now
        self.waiting = list(enumerate(lane.waiting))[:_AHEAD]
        self._times = lane.times
        # What needs no slot keeps a server in use all the same, and counts as one here.
        self._servers = {
            it: replace(use, in_flight=use.in_flight + use.beside_slots, beside_slots=0)
            for it, use in lane.servers.items()
        }
        self._loading, self._staying, self._room = lane.loading, lane.staying, lane.room
        self._loaded_at = lane.now + load_left_s if lane.loading is not None else math.inf
        # As it was counted when it was granted: it has as many slots as there are, at most.
        self._ends = [
            (lane.now + lane.times.left_s(it), it.model_id, min(it.slots, lane.servers[it.model_id].slots) or 1)
            for it in running
            if it.model_id in lane.servers
        ]

    def lane(self) -> LaneSnapshot:
        return LaneSnapshot(
            now=self.now,
            waiting=[it for _place, it in self.waiting],
            servers=self._servers,
            loading=self._loading,
            times=self._times,
            staying=self._staying,
            room=self._room,
        )

    def grant(self, index: int) -> int:
        """Start one request; return its place in the original queue."""
        place, granted = self.waiting.pop(index)
        passed = [
            (at, it if it.passed_since else replace(it, passed_since=self.now)) for at, it in self.waiting[:index]
        ]
        self.waiting[:index] = passed
        slots = min(granted.slots, self._servers[granted.model_id].slots)
        self._use(granted.model_id, slots)
        self._ends.append((self.now + self._times.service_s(granted.model_id), granted.model_id, slots))
        return place

    def load(self, model_id: str, beside: frozenset[str]) -> None:
        bytes_of, free_bytes = self._room.bytes_of, self._room.free_bytes
        if free_bytes is not None:
            resident = {other for other, server in self._servers.items() if server.resident}
            freed = sum(map(bytes_of, resident - beside - {model_id}))
            self._room = replace(self._room, free_bytes=free_bytes + freed - bytes_of(model_id))
        self._servers = {other: server for other, server in self._servers.items() if other in beside}
        self._loading, self._staying, self._loaded_at = model_id, beside, self.now + self._times.load_s(model_id)

    def advance(self, until: float) -> bool:
        """Go on to the next thing that happens; False if nothing will."""
        at = min([end for end, _model_id, _slots in self._ends] + [self._loaded_at, until])
        if math.isinf(at):
            return False
        self.now = max(self.now, at)
        for end in [end for end in self._ends if end[0] <= self.now]:
            self._ends.remove(end)
            self._use(end[1], -end[2])
        if self._loading is not None and self._loaded_at <= self.now:
            # With one slot: how many it will have is not known here, and one at a time is never too optimistic.
            before = self._servers.get(self._loading)
            self._servers = {it: server for it, server in self._servers.items() if it in self._staying}
            in_flight = before.in_flight if before is not None else 0
            self._servers[self._loading] = ServerUse(
                ready=True, slots=1, in_flight=in_flight, since=self.now, used_at=self.now
            )
            self._loading, self._staying, self._loaded_at = None, frozenset(), math.inf
        return True

    def _use(self, model_id: str, by: int) -> None:
        server = self._servers.get(model_id)
        if server is not None:
            self._servers[model_id] = replace(server, in_flight=server.in_flight + by)
