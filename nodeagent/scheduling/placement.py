"""The pure choice of the lane that a request goes to.

First a device where the model has not just failed; of those one that has it, or is loading it; else the one with the
least queue pressure, then the most free memory. A device on which the model is known not to fit, or which cools down
after failing, is not tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Residency(IntEnum):
    """How near a device is to serving the model; the smaller, the nearer."""

    READY = 0
    LOADING = 1
    EMPTY = 2
    OTHER_MODEL = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """One device, as placement sees it for one model.

    `admitted` counts the lane's requests in flight and queued, of `limit`. `memory_free_bytes` is None where unknown.
    `failing` says that the model's last end here was a failure. `obstacle` says why the device can't take the model,
    None where it can; `retry_at` is when that may change (`trio.current_time()`), None where it is not known to.
    """

    device_id: str
    residency: Residency
    admitted: int
    limit: int
    memory_free_bytes: int | None = None
    failing: bool = False
    obstacle: str | None = None
    retry_at: float | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    device_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class AllFull:
    """Devices could serve it, but each lane holds as many requests as it may."""

    device_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoneEligible:
    """No device can serve it now."""

    reason: str
    retry_at: float | None


Placement = Placed | AllFull | NoneEligible


def choose(candidates: Sequence[Candidate]) -> Placement:
    """Place a request for one model on one of the candidates; ties go to the one listed first."""
    able = [candidate for candidate in candidates if candidate.obstacle is None]
    if not able:
        return _none_eligible(candidates)
    with_room = [candidate for candidate in able if candidate.admitted < candidate.limit]
    if not with_room:
        return AllFull(tuple(candidate.device_id for candidate in able))
    best = min(with_room, key=_preference)
    return Placed(best.device_id, f"{best.residency.name.lower()}, {best.admitted} of {best.limit} places taken")


def _preference(candidate: Candidate) -> tuple[int, int, int, int, int]:
    resident = candidate.residency if candidate.residency <= Residency.LOADING else Residency.EMPTY
    # Between devices without the model an empty one comes first: evicting costs the evicted model's next user a load.
    evicts = candidate.residency is Residency.OTHER_MODEL
    return (candidate.failing, resident, candidate.admitted, evicts, -(candidate.memory_free_bytes or 0))


def _none_eligible(candidates: Sequence[Candidate]) -> NoneEligible:
    if not candidates:
        return NoneEligible("this node has no device", None)
    reasons = "; ".join(f"{candidate.device_id}: {candidate.obstacle}" for candidate in candidates)
    hopes = [candidate.retry_at for candidate in candidates if candidate.retry_at is not None]
    return NoneEligible(reasons, min(hopes, default=None))
