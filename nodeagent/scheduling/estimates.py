"""Estimates of waiting times, from how long requests and loads of each model took on this device.

They feed `Retry-After`, placement and `estimated_wait_s`. They are guesses, not promises.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# One part new to three parts old: follows a change within a few requests, and one outlier does not dominate.
_NEWEST_WEIGHT = 0.25
# Before anything was measured: a short chat response, and a small model from a warm page cache.
_UNMEASURED_SERVICE_S = 2.0
_UNMEASURED_LOAD_S = 2.0


@dataclass(frozen=True, slots=True)
class Running:
    """A request in flight for `so_far_s`, on that many slots."""

    model_id: str
    so_far_s: float
    slots: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What is ahead of a request that arrives now.

    `resident` is the model that is loaded, or loading for `load_left_s` more, with `slots` slots; `running` are the
    requests in flight, `queued` the models of the queued requests, oldest first.
    """

    resident: str | None
    slots: int = 1
    load_left_s: float = 0.0
    running: Sequence[Running] = ()
    queued: Sequence[str] = ()


class LaneTimes:
    """Moving averages of service and load times in seconds, by model id. Only the lane writes them.

    `peers` are those of the node's other devices: what was not measured here is taken from there.
    """

    def __init__(self) -> None:
        self.peers: Sequence[LaneTimes] = ()
        self._service_s: dict[str, float] = {}
        self._load_s: dict[str, float] = {}

    def served(self, model_id: str, took_s: float) -> None:
        """A request for the model took that long, from its grant to its end."""
        _blend(self._service_s, model_id, took_s)

    def loaded(self, model_id: str, took_s: float) -> None:
        """A load of the model took that long."""
        _blend(self._load_s, model_id, took_s)

    def service_s(self, model_id: str) -> float:
        """The average time of a request for the model."""
        measured = (times._service_s[model_id] for times in (self, *self.peers) if model_id in times._service_s)
        return next(measured, _UNMEASURED_SERVICE_S)

    def load_s(self, model_id: str) -> float:
        """The average time of a load of the model."""
        measured = (times._load_s[model_id] for times in (self, *self.peers) if model_id in times._load_s)
        return next(measured, _UNMEASURED_LOAD_S)

    def measured_load_s(self, model_id: str) -> float | None:
        """The average load on this device, None before the first one."""
        return self._load_s.get(model_id)

    def left_s(self, running: Running) -> float:
        """How much longer a request in flight will take. Response lengths have a long tail: a request that has
        outlasted the average is likely to go on for a while."""
        return max(self.service_s(running.model_id) - running.so_far_s, running.so_far_s / 2)

    def drained_s(self, backlog: Backlog) -> float:
        """When a request that arrives now would start if all others were served one by one in order."""
        wait_s = max(map(self.left_s, backlog.running), default=0.0) + backlog.load_left_s
        loaded = backlog.resident
        for model_id in backlog.queued:
            wait_s += self.service_s(model_id) + (self.load_s(model_id) if model_id != loaded else 0.0)
            loaded = model_id
        return wait_s

    def start_s(self, model_id: str, backlog: Backlog) -> float:
        """When a request for that model that arrives now would start, the load of its model included.

        A request for the resident model is assumed to go before those for other models. A request for another model
        is assumed to go last, with each model loaded once.
        """
        left_s = sorted(map(self.left_s, backlog.running))
        if model_id != backlog.resident:
            loads = {*backlog.queued, model_id} - {backlog.resident}
            work_s = sum(map(self.service_s, backlog.queued)) + sum(map(self.load_s, loads))
            return max(left_s, default=0.0) + backlog.load_left_s + work_s
        before = [self.service_s(queued) for queued in backlog.queued if queued == model_id]
        free = backlog.slots - sum(running.slots for running in backlog.running)
        if len(before) < free:
            return backlog.load_left_s
        first_s = left_s[0] if free <= 0 and left_s else 0.0
        return backlog.load_left_s + first_s + sum(before) / backlog.slots

    def place_free_s(self, backlog: Backlog) -> float:
        """When the next place in the lane becomes free."""
        if backlog.running:
            return min(map(self.left_s, backlog.running))
        if not backlog.queued:
            return 0.0
        next_model = backlog.queued[0]
        load_s = backlog.load_left_s if next_model == backlog.resident else self.load_s(next_model)
        return load_s + self.service_s(next_model)


def _blend(averages: dict[str, float], model_id: str, took_s: float) -> None:
    before = averages.get(model_id, took_s)
    averages[model_id] = before + _NEWEST_WEIGHT * (took_s - before)
