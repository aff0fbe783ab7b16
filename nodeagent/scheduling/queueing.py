"""The pure choice of what a lane does next: grant a queued request, load a model, or wait.

A policy decides whose turn it is; what follows from that is the same for all policies (`step`). There are two:
`FirstCome`, which serves strictly in order, and `SwapAware` in its own module, which is the default.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from nodeagent.scheduling.estimates import LaneTimes

IDLE = "idle, queue is empty"


class Priority(IntEnum):
    """How urgent a request is; a smaller number is more urgent."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRequest:
    """A queued request as a policy sees it. Times are `trio.current_time()`.

    `passed_since` is when a later request was first granted ahead of it, None if none was. `slots` is how many slots of
    the server it wants (as many as the server has, at most).
    """

    model_id: str
    admitted_at: float = 0.0
    priority: Priority = Priority.NORMAL
    passed_since: float | None = None
    slots: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerUse:
    """A server of the device as a policy sees it.

    `slots` is how many requests it may serve at once, `in_flight` how many of them are in use. `since` is when it
    entered its state (became ready, for example). `held`: it is being unloaded, and nothing more may be granted on it.
    `backing_off`: its next start is not due yet.
    """

    ready: bool
    slots: int
    in_flight: int
    held: bool = False
    since: float = 0.0
    backing_off: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSnapshot:
    """A lane at one moment.

    `waiting` are the queued requests, the oldest first. `servers` maps a model id to its server on this device, if
    there is one. `loading` is the model that is being loaded now. `times` are the measured ones.
    """

    now: float
    waiting: Sequence[QueuedRequest]
    servers: Mapping[str, ServerUse]
    loading: str | None
    times: LaneTimes


@dataclass(frozen=True, slots=True)
class Grant:
    """Let the queued request at `index` run now."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """Make the device's server run `model_id`; no other model has a request in flight."""

    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until something changes, or until that time. `then` is the model to load after the requests in flight,
    if that is known already."""

    reason: str
    until: float = math.inf
    then: str | None = None


Decision = Grant | Load | Wait


class Policy(Protocol):
    """Decides for a lane. Pure: the same snapshot gets the same decision."""

    def decide(self, lane: LaneSnapshot) -> Decision: ...


@dataclass(frozen=True, slots=True)
class FirstCome:
    """First come, first served: models alternate in the order of the requests.

    A request behind the oldest runs beside it only if it wants the same model and a slot is free.
    """

    def decide(self, lane: LaneSnapshot) -> Decision:
        return step(lane, 0, "oldest request") if lane.waiting else Wait(IDLE)


def step(lane: LaneSnapshot, index: int, reason: str) -> Decision:
    """What the lane does now if the request at `index` is served next."""
    wanted = lane.waiting[index].model_id
    server = lane.servers.get(wanted)
    if server is not None and server.held:
        return Wait(f"{wanted} is being unloaded")
    in_use = [model_id for model_id, use in lane.servers.items() if model_id != wanted and use.in_flight]
    if in_use:
        return Wait(f"{in_use[0]} is in use; next is {wanted}: {reason}", then=wanted)
    # The load of another model may just be stopping this server: that load is cancelled before anything is granted.
    if server is not None and server.ready and lane.loading in (None, wanted):
        free, needed = server.slots - server.in_flight, min(lane.waiting[index].slots, server.slots)
        if needed <= free:
            return Grant(index, f"{wanted} has {free} of {server.slots} slots free; {reason}")
        return Wait(f"{wanted} has {free} of {server.slots} slots free, {needed} are needed: {reason}")
    if lane.loading == wanted:
        return Wait(f"{wanted} is loading")
    return Load(wanted, reason + (f"; replaces the load of {lane.loading}" if lane.loading else ""))
