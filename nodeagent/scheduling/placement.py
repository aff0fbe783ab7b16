"""The pure choice of the lane that a request goes to, and of a queued request that is better off in another lane.

A request goes to the device where it is expected to start first, by the measured times: mostly where its model is
loaded or loading; elsewhere once the queue there is so long that another copy pays for its load. The delay of others
counts too: they wait for that load, and for models to be loaded again that it evicts. Another copy is only made where
it fits. A device where the model has just failed comes last; a device on which it is known not to fit, or which cools
down after a failure, is not tried.
"""

from collections.abc import Sequence
from enum import IntEnum

import msgspec

# Estimates that differ by less than 10 ms count as equal: then residency and the load of the lane decide.
_COST_DIGITS = 2
# Free memory that differs by less counts as equal: two readings a moment apart differ too.
_MEMORY_STEP_BYTES = 256 * 2**20
# Estimates are rough: a queued request stays where it is unless it gains more than this.
_MOVE_GAIN_S = 0.2


class Residency(IntEnum):
    """How close a device is to serving the model; a smaller number is closer. LOADING includes a model that a queued
    request will load next."""

    READY = 0
    LOADING = 1
    EMPTY = 2
    OTHER_MODEL = 3


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One device, as placement sees it for one model.

    `admitted` counts the lane's requests in flight and queued, of `limit`. `start_s` is how long a request that arrives
    now would wait there, the load of its model included; `delays_s` is how much loading it would add for others.
    `memory_free_bytes` is None if unknown; `has_room`: another copy of a model that is loaded elsewhere fits into it,
    once the evicted models are gone. `has_conversation`: the device served the request's conversation last. `failing`:
    the model's last end here was a failure. `obstacle` says why the device can't serve the model, None if it can;
    `retry_at` is when that may change (`trio.current_time()`), None if unknown.
    """

    device_id: str
    residency: Residency
    admitted: int
    limit: int
    start_s: float = 0.0
    delays_s: float = 0.0
    memory_free_bytes: int | None = None
    has_room: bool = True
    has_conversation: bool = False
    failing: bool = False
    obstacle: str | None = None
    retry_at: float | None = None


class Placed(msgspec.Struct, frozen=True):
    device_id: str
    reason: str


class AllFull(msgspec.Struct, frozen=True):
    """Devices could serve it, but each lane holds as many requests as it may."""

    device_ids: tuple[str, ...]


class NoneEligible(msgspec.Struct, frozen=True):
    """No device can serve it now."""

    reason: str
    retry_at: float | None


Placement = Placed | AllFull | NoneEligible


def choose(candidates: Sequence[Candidate]) -> Placement:
    """Place a request for one model on one of the candidates; ties go to the first one."""
    able = [candidate for candidate in candidates if candidate.obstacle is None]
    if not able:
        return _none_eligible(candidates)
    if any(candidate.residency <= Residency.LOADING for candidate in able):
        able = [candidate for candidate in able if candidate.residency <= Residency.LOADING or candidate.has_room]
    with_room = [candidate for candidate in able if candidate.admitted < candidate.limit]
    if not with_room:
        return AllFull(tuple(candidate.device_id for candidate in able))
    best = min(with_room, key=_preference)
    reason = (
        f"{best.residency.name.lower()}, starts in {best.start_s:.2f} s, {best.admitted} of {best.limit} places taken"
    )
    return Placed(best.device_id, reason)


class Movable(msgspec.Struct, frozen=True):
    """A queued request that is expected to start in `starts_in_s`, and on the idle device in `elsewhere_s`."""

    starts_in_s: float
    elsewhere_s: float


def choose_move(movables: Sequence[Movable]) -> int | None:
    """The index of the request that gains most by moving to the idle device; None if none gains enough."""
    if not movables:
        return None
    gains = [it.starts_in_s - it.elsewhere_s for it in movables]
    best = max(range(len(gains)), key=gains.__getitem__)
    return best if gains[best] > _MOVE_GAIN_S else None


def _preference(candidate: Candidate) -> tuple[bool, float, int, bool, int, int]:
    cost_s = round(candidate.start_s + candidate.delays_s, _COST_DIGITS)
    free = (candidate.memory_free_bytes or 0) // _MEMORY_STEP_BYTES
    return (candidate.failing, cost_s, candidate.residency, not candidate.has_conversation, candidate.admitted, -free)


def _none_eligible(candidates: Sequence[Candidate]) -> NoneEligible:
    if not candidates:
        return NoneEligible("this node has no device", None)
    reasons = "; ".join(f"{candidate.device_id}: {candidate.obstacle}" for candidate in candidates)
    hopes = [candidate.retry_at for candidate in candidates if candidate.retry_at is not None]
    return NoneEligible(reasons, min(hopes, default=None))
