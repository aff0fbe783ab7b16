"""Estimates of waiting, from what was measured: how long requests and loads of each model took on this device.

They feed `Retry-After`, placement and `estimated_wait_s`: honest guesses, not promises.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# One part new to three parts old: follows a change within a few requests, and one odd request does not own it.
_NEWEST_WEIGHT = 0.25
# Before anything was measured. A short chat answer, and a small model from a warm page cache.
_UNMEASURED_SERVICE_S = 2.0
_UNMEASURED_LOAD_S = 2.0
# A client that comes back later than this has not come back: one long pause must not outweigh many short ones.
_RETURN_MAX_S = 1.0


@dataclass(frozen=True, slots=True)
class Running:
    """A request in flight for `so_far_s`."""

    model_id: str
    so_far_s: float


@dataclass(frozen=True, slots=True)
class Occupied:
    """What is before a request that came now: the model at hand (loaded, or loading for `load_left_s` more) with its
    slots, the requests in flight, and the models that the queue wants, oldest first."""

    resident: str | None
    slots: int
    load_left_s: float
    running: Sequence[Running]
    queued: Sequence[str]


class LaneTimes:
    """Moving averages of service, load and return times in seconds, by model id. Written by the lane alone.

    `kin` are those of the node's other devices: what was not measured here is taken from there.
    """

    def __init__(self) -> None:
        self.kin: Sequence[LaneTimes] = ()
        self._service_s: dict[str, float] = {}
        self._load_s: dict[str, float] = {}
        self._return_s: dict[str, float] = {}

    def served(self, model_id: str, took_s: float) -> None:
        _blend(self._service_s, model_id, took_s)

    def loaded(self, model_id: str, took_s: float) -> None:
        _blend(self._load_s, model_id, took_s)

    def came_back(self, model_id: str, after_s: float) -> None:
        """After the model's last request had ended, the next one came so much later."""
        _blend(self._return_s, model_id, min(after_s, _RETURN_MAX_S))

    def return_s(self, model_id: str) -> float:
        """How soon after its last request the model's next one comes; 0 where it is not known."""
        return self._return_s.get(model_id, 0.0)

    def service_s(self, model_id: str) -> float:
        measured = (times._service_s[model_id] for times in (self, *self.kin) if model_id in times._service_s)
        return next(measured, _UNMEASURED_SERVICE_S)

    def load_s(self, model_id: str) -> float:
        measured = (times._load_s[model_id] for times in (self, *self.kin) if model_id in times._load_s)
        return next(measured, _UNMEASURED_LOAD_S)

    def left_s(self, running: Running) -> float:
        """How much longer a request goes on that has taken so long. Lengths of answers have a long tail: one that has
        outlasted the average is likely to go on for a while."""
        return max(self.service_s(running.model_id) - running.so_far_s, running.so_far_s / 2)

    def measured_load_s(self, model_id: str) -> float | None:
        """The average load, None before the first one."""
        return self._load_s.get(model_id)

    def drained_s(self, occupied: Occupied) -> float:
        """When a request that came now would start, were all served one by one in order."""
        wait_s = max(map(self.left_s, occupied.running), default=0.0) + occupied.load_left_s
        loaded = occupied.resident
        for model_id in occupied.queued:
            wait_s += self.service_s(model_id) + (self.load_s(model_id) if model_id != loaded else 0.0)
            loaded = model_id
        return wait_s

    def start_s(self, model_id: str, occupied: Occupied) -> float:
        """When a request for that model that came now would start, its model's load included.

        Taken to be served before those that want a model that is not at hand; behind all others if it wants one
        itself, with each model loaded once.
        """
        left_s = sorted(map(self.left_s, occupied.running))
        if model_id != occupied.resident:
            loads = {*occupied.queued, model_id} - {occupied.resident}
            work_s = sum(map(self.service_s, occupied.queued)) + sum(map(self.load_s, loads))
            return max(left_s, default=0.0) + occupied.load_left_s + work_s
        before = [self.service_s(queued) for queued in occupied.queued if queued == model_id]
        free = occupied.slots - len(left_s)
        if len(before) < free:
            return occupied.load_left_s
        first_s = left_s[0] if free <= 0 and left_s else 0.0
        return occupied.load_left_s + first_s + sum(before) / occupied.slots


def _blend(averages: dict[str, float], model_id: str, took_s: float) -> None:
    before = averages.get(model_id, took_s)
    averages[model_id] = before + _NEWEST_WEIGHT * (took_s - before)
