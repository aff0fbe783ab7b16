"""The pure choice of what a lane does next: grant a waiting request, load a model, or wait.

A policy says whose turn it is; what follows from that is the same for all of them (`step`). Two are here: `FirstCome`,
which serves strictly in order, and `SwapAware` in its own module, which is the default.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from nodeagent.scheduling.estimates import LaneTimes


class Priority(IntEnum):
    """How urgent a request is; the smaller, the more."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued request as a policy sees it. Times are `trio.current_time()`.

    `passed_since` is when a request that came later was first granted before it, None if none was.
    """

    model_id: str
    admitted_at: float = 0.0
    priority: Priority = Priority.NORMAL
    passed_since: float | None = None


@dataclass(frozen=True, slots=True)
class ServerUse:
    """A server of the device as a policy sees it.

    `slots` is how many requests it may serve at once. `since` is when it came into its state (became ready, say), and
    `used_at` when the last request on it ended, None if none has. `held` says that it is being unloaded, and nothing
    more may be granted on it; `backing_off` that its next start is not due yet.
    """

    ready: bool
    slots: int
    in_flight: int
    held: bool = False
    since: float = 0.0
    used_at: float | None = None
    backing_off: bool = False


@dataclass(frozen=True, slots=True)
class LaneNow:
    """A lane at one moment.

    `waiting` are the queued requests, the oldest first. `servers` maps a model id to its server on this device, if
    there is one. `loading` is the model that is being made ready now. `times` are the measured ones.
    """

    now: float
    waiting: Sequence[Waiting]
    servers: Mapping[str, ServerUse]
    loading: str | None
    times: LaneTimes


@dataclass(frozen=True, slots=True)
class Grant:
    """Let the waiting request at `index` run now."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """Make the device's server run `model_id`; nothing is in flight on any other."""

    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until something changes, or until that time. `then` is the model that is loaded after what is in
    flight, where that is known already."""

    reason: str
    until: float = math.inf
    then: str | None = None


Decision = Grant | Load | Wait


class Policy(Protocol):
    """Decides for a lane. Pure: the same lane at the same moment gets the same decision."""

    def decide(self, lane: LaneNow) -> Decision: ...


@dataclass(frozen=True, slots=True)
class FirstCome:
    """First come, first served: models alternate in the order in which they were asked for.

    A request behind the oldest runs beside it only where it wants the same model, and there is a slot left.
    """

    def decide(self, lane: LaneNow) -> Decision:
        return step(lane, 0, "it is the oldest") if lane.waiting else Wait("nobody waits")


def step(lane: LaneNow, index: int, reason: str) -> Decision:
    """What the lane does now, if the request at `index` is to be served next."""
    wanted = lane.waiting[index].model_id
    server = lane.servers.get(wanted)
    if server is not None and server.held:
        return Wait(f"{wanted} is being unloaded")
    in_use = [model_id for model_id, use in lane.servers.items() if model_id != wanted and use.in_flight]
    if in_use:
        return Wait(f"{in_use[0]} is still in use; then {wanted}: {reason}", then=wanted)
    # What loads another model may just be stopping this one's server: it is called off before anything is granted.
    if server is not None and server.ready and lane.loading in (None, wanted):
        if server.in_flight < server.slots:
            return Grant(
                index, f"{wanted} has {server.slots - server.in_flight} of {server.slots} slots free; {reason}"
            )
        return Wait(f"all {server.slots} slots of {wanted} are in use")
    if lane.loading == wanted:
        return Wait(f"{wanted} is loading")
    return Load(wanted, reason + (f"; no longer {lane.loading}" if lane.loading else ""))
