"""Estimates of waiting times, from how long requests and loads of each model took on this device.

They feed `Retry-After`, placement and `estimated_wait_s`. They are guesses, not promises.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

# One part new to three parts old: follows a change within a few requests, and one outlier does not dominate.
_NEWEST_WEIGHT = 0.25
# Before anything was measured: a short chat response, and a small model from a warm page cache.
_UNMEASURED_SERVICE_S = 2.0
_UNMEASURED_LOAD_S = 2.0


class Running(msgspec.Struct, frozen=True):
    """A request in flight for `so_far_s`, on that many slots."""

    model_id: str
    so_far_s: float
    slots: int = 1


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """What is ahead of a request that arrives now.

    `resident` is the model that is loaded, or loading for `load_left_s` more, with `slots` slots; `beside` are the
    slots of the other resident models, which serve at the same time if `concurrent`. `running` are the requests in
    flight. `queued` is how many requests are queued for each model, so that a long queue does not make an
    estimate slow.
    """

    resident: str | None
    slots: int = 1
    beside: Mapping[str, int] = msgspec.field(default_factory=dict)
    concurrent: bool = False
    load_left_s: float = 0.0
    running: Sequence[Running] = ()
    queued: Mapping[str, int] = msgspec.field(default_factory=dict)


class LaneTimes:
    """Moving averages of service and load times in seconds, by model id. Only the lane writes them.

    `node` are those of all of the node's devices together: what was not measured here is taken from there.
    """

    def __init__(self, node: "LaneTimes | None" = None) -> None:
        self.node = node
        self._service_s: dict[str, float] = {}
        self._load_s: dict[str, float] = {}

    def served(self, model_id: str, took_s: float) -> None:
        """A request for the model took that long, from its grant to its end."""
        _blend(self._service_s, model_id, took_s)
        if self.node is not None:
            self.node.served(model_id, took_s)

    def loaded(self, model_id: str, took_s: float) -> None:
        """A load of the model took that long."""
        _blend(self._load_s, model_id, took_s)
        if self.node is not None:
            self.node.loaded(model_id, took_s)

    def service_s(self, model_id: str) -> float:
        """The average time of a request for the model."""
        measured = self._service_s.get(model_id)
        if measured is not None:
            return measured
        return self.node.service_s(model_id) if self.node is not None else _UNMEASURED_SERVICE_S

    def load_s(self, model_id: str) -> float:
        """The average time of a load of the model."""
        measured = self._load_s.get(model_id)
        if measured is not None:
            return measured
        return self.node.load_s(model_id) if self.node is not None else _UNMEASURED_LOAD_S

    def measured_load_s(self, model_id: str) -> float | None:
        """The average load on this device, None before the first one."""
        return self._load_s.get(model_id)

    def left_s(self, running: Running) -> float:
        """How much longer a request in flight will take. Response lengths have a long tail: a request that has
        outlasted the average is likely to go on for a while."""
        return max(self.service_s(running.model_id) - running.so_far_s, running.so_far_s / 2)

    def drained_s(self, backlog: Backlog, in_order: Iterable[str]) -> float:
        """When a request that arrives now would start if all others were served one by one. `in_order` are the models
        of the queued requests, oldest first."""
        wait_s = max(map(self.left_s, backlog.running), default=0.0) + backlog.load_left_s
        loaded = backlog.resident
        for model_id in in_order:
            is_loaded = model_id == loaded or model_id in backlog.beside
            wait_s += self.service_s(model_id) + (0.0 if is_loaded else self.load_s(model_id))
            loaded = model_id
        return wait_s

    def start_s(self, model_id: str, backlog: Backlog, leaving: Collection[str] = ()) -> float:
        """When a request for that model that arrives now would start, the load of its model included.

        A request for a resident model is assumed to go before those for others. A request for another model is assumed
        to go last, with each model loaded once; or, where models serve at the same time, once those that give way to it
        (`leaving`) are idle.
        """
        slots = backlog.slots if model_id == backlog.resident else backlog.beside.get(model_id)
        if slots is None:
            return self._load_start_s(model_id, backlog, leaving)
        own = [running for running in backlog.running if running.model_id == model_id]
        wait_s = backlog.load_left_s if model_id == backlog.resident or not backlog.concurrent else 0.0
        if not backlog.concurrent and len(own) < len(backlog.running):
            wait_s += max(self.left_s(running) for running in backlog.running if running.model_id != model_id)
        before = backlog.queued.get(model_id, 0)
        free = slots - sum(running.slots for running in own)
        if before < free:
            return wait_s
        first_s = min(map(self.left_s, own)) if free <= 0 and own else 0.0
        return wait_s + first_s + before * self.service_s(model_id) / slots

    def _load_start_s(self, model_id: str, backlog: Backlog, leaving: Collection[str]) -> float:
        """When a request for a model that is not resident would start."""
        if backlog.concurrent:
            own_s = backlog.queued.get(model_id, 0) * self.service_s(model_id)
            in_the_way = [self.left_s(running) for running in backlog.running if running.model_id in leaving]
            return max(in_the_way, default=0.0) + backlog.load_left_s + self.load_s(model_id) + own_s
        loads = {*backlog.queued, model_id} - {backlog.resident, *backlog.beside}
        served_s = sum(count * self.service_s(queued) for queued, count in backlog.queued.items())
        work_s = served_s + sum(map(self.load_s, loads))
        return max(map(self.left_s, backlog.running), default=0.0) + backlog.load_left_s + work_s

    def place_free_s(self, backlog: Backlog, next_model: str | None) -> float:
        """When the next place in the lane becomes free. `next_model` is that of the oldest queued request."""
        if backlog.running:
            return min(map(self.left_s, backlog.running))
        if next_model is None:
            return 0.0
        load_s = backlog.load_left_s if next_model == backlog.resident else self.load_s(next_model)
        return load_s + self.service_s(next_model)


def _blend(averages: dict[str, float], model_id: str, took_s: float) -> None:
    before = averages.get(model_id, took_s)
    averages[model_id] = before + _NEWEST_WEIGHT * (took_s - before)
