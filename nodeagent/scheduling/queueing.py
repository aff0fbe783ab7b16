"""The pure choice of what a lane does next: grant a queued request, load a model, or wait.

A policy decides whose turn it is; what follows from that is the same for all policies (`step`). There are two:
`FirstCome`, which serves strictly in order, and `SwapAware` in its own module, which is the default.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Protocol

import msgspec

from nodeagent.scheduling.estimates import LaneTimes
from nodeagent.scheduling.room import Room, ServerUse, staying

IDLE = "idle, queue is empty"


class Priority(IntEnum):
    """How urgent a request is; a smaller number is more urgent."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


class QueuedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A queued request as a policy sees it. Times are `trio.current_time()`.

    `passed_since` is when a later request was first granted ahead of it, None if none was. `slots` is how many slots of
    the server it wants (as many as the server has, at most).
    """

    model_id: str
    admitted_at: float = 0.0
    priority: Priority = Priority.NORMAL
    passed_since: float | None = None
    slots: int = 1


class LaneSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A lane at one moment.

    `waiting` are the queued requests, the oldest first. `servers` maps a model id to its server on this device, if
    there is one. `loading` is the model that is being loaded now; that load leaves the servers of `staying` alone.
    `times` are the measured ones, `room` is what may be resident at the same time. `is_held`: the device is held for
    that load, of a model that spans it, so no other may take its place.
    """

    now: float
    waiting: Sequence[QueuedRequest]
    servers: Mapping[str, ServerUse]
    loading: str | None
    times: LaneTimes
    staying: frozenset[str] = frozenset()
    room: Room = msgspec.field(default_factory=Room)
    is_held: bool = False

    def is_ready(self, model_id: str) -> bool:
        """Whether the model has a ready server that the load under way, if there is one, does not stop."""
        server = self.servers.get(model_id)
        stays = self.loading in (None, model_id) or model_id in self.staying
        return server is not None and server.ready and stays

    def leaving(self, model_id: str) -> frozenset[str] | None:
        """The models that give way to a load of this one; None if pinned ones leave no room for it."""
        return self.room.leaving(model_id, self.servers, reload_s=self.times.load_s, now=self.now)


class Grant(msgspec.Struct, frozen=True):
    """Let the queued request at `index` run now."""

    index: int
    reason: str


class Load(msgspec.Struct, frozen=True):
    """Load `model_id`. The servers of `beside` stay; all others are stopped first, and have no request in flight."""

    model_id: str
    reason: str
    beside: frozenset[str] = frozenset()


class Wait(msgspec.Struct, frozen=True):
    """Do nothing until something changes, or until that time. `then` is the model to load after the requests in flight,
    if that is known already. `blocks` are the models that have to become idle for it: nothing more is granted on them.
    """

    reason: str
    until: float = math.inf
    then: str | None = None
    blocks: frozenset[str] = frozenset()


Decision = Grant | Load | Wait


class Policy(Protocol):
    """Decides for a lane. Pure: the same snapshot gets the same decision."""

    def decide(self, lane: LaneSnapshot) -> Decision: ...


class FirstCome(msgspec.Struct, frozen=True):
    """First come, first served: models alternate in the order of the requests.

    A request behind the oldest runs beside it only if it wants the same model and a slot is free.
    """

    def decide(self, lane: LaneSnapshot) -> Decision:
        if not lane.waiting:
            return Wait(IDLE)
        if lane.room.concurrent:
            return first_possible(lane, ((index, "oldest request") for index in range(len(lane.waiting))))
        return step(lane, 0, "oldest request")


def step(lane: LaneSnapshot, index: int, reason: str) -> Decision:
    """What the lane does now if the request at `index` is served next."""
    wanted = lane.waiting[index].model_id
    server = lane.servers.get(wanted)
    if server is not None and server.held:
        return Wait(f"{wanted} is being unloaded, or gives way")
    is_ready = lane.is_ready(wanted)
    leaving = frozenset() if is_ready or lane.loading == wanted else lane.leaving(wanted)
    if leaving is None:
        return Wait(f"pinned models leave no room for {wanted}")
    # Before anything is asked to become idle for it: else a model would be in use and closed in turn, without an end.
    if not is_ready and _loads_another(lane, wanted):
        return Wait(f"{lane.loading} is loading; next is {wanted}: {reason}", then=wanted)
    in_use = _in_the_way(lane, wanted, leaving)
    if in_use is not None:
        then = None if is_ready else wanted
        return Wait(f"{in_use} is in use; next is {wanted}: {reason}", then=then, blocks=leaving)
    # The load of another model may just be stopping this server: that load is cancelled before anything is granted.
    if server is not None and is_ready:
        free, needed = server.slots - server.in_flight, min(lane.waiting[index].slots, server.slots)
        if needed <= free:
            return Grant(index, f"{wanted} has {free} of {server.slots} slots free; {reason}")
        return Wait(f"{wanted} has {free} of {server.slots} slots free, {needed} are needed: {reason}")
    if lane.loading == wanted:
        return Wait(f"{wanted} is loading")
    replaces = f"; replaces the load of {lane.loading}" if lane.loading else ""
    return Load(wanted, reason + replaces, staying(wanted, lane.servers, leaving))


def first_possible(
    lane: LaneSnapshot,
    order: Iterable[tuple[int, str]],
    turns_end_at: Callable[[int], float] = lambda _index: -math.inf,
) -> Decision:
    """What the lane does now if its models serve at the same time: the first of these requests, each with the reason
    for its place, that can be granted or needs a load.

    A request that has to wait holds up only those for its own model, and those for the models that give way to it. It
    waits until the turns of these end: `turns_end_at`.
    """
    held_up: set[str] = set()
    waits: list[Wait] = []
    for index, reason in order:
        wanted = lane.waiting[index].model_id
        if wanted in held_up:
            continue
        held_up.add(wanted)
        until = turns_end_at(index)
        decision = step(lane, index, reason) if lane.now >= until else Wait(f"{wanted} waits for its turn", until)
        if not isinstance(decision, Wait):
            return decision
        held_up |= decision.blocks
        waits.append(decision)
    return msgspec.structs.replace(waits[0], until=min(wait.until for wait in waits)) if waits else Wait(IDLE)


def _in_the_way(lane: LaneSnapshot, wanted: str, leaving: frozenset[str]) -> str | None:
    """A model in use that has to become idle first: one that gives way, or any other if one serves at a time."""
    for model_id, use in lane.servers.items():
        if model_id != wanted and use.in_use and (model_id in leaving or not lane.room.concurrent):
            return model_id
    return None


def _loads_another(lane: LaneSnapshot, wanted: str) -> bool:
    """Whether the load of another model goes on, whatever is wanted."""
    if lane.loading is None or lane.loading == wanted:
        return False
    return lane.is_held or (lane.room.concurrent and _is_waited_for(lane, lane.loading))


def _is_waited_for(lane: LaneSnapshot, model_id: str) -> bool:
    server = lane.servers.get(model_id)
    return not (server is not None and server.backing_off) and any(it.model_id == model_id for it in lane.waiting)
