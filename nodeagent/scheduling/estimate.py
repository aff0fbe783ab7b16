"""Estimates of waiting, from what was measured: how long requests and loads of each model took on this device.

They feed `Retry-After` and `estimated_wait_s`: honest guesses, not promises.
"""

from collections.abc import Iterable, Sequence

# One part new to three parts old: follows a change within a few requests, and one odd request does not own it.
_NEWEST_WEIGHT = 0.25
# Before anything was measured. A short chat answer, and a small model from a warm page cache.
_UNMEASURED_SERVICE_S = 2.0
_UNMEASURED_LOAD_S = 2.0


class LaneTimes:
    """Moving averages of service and load times in seconds, by model id. Written by the lane alone."""

    def __init__(self) -> None:
        self._service_s: dict[str, float] = {}
        self._load_s: dict[str, float] = {}

    def served(self, model_id: str, took_s: float) -> None:
        _blend(self._service_s, model_id, took_s)

    def loaded(self, model_id: str, took_s: float) -> None:
        _blend(self._load_s, model_id, took_s)

    def service_s(self, model_id: str) -> float:
        return self._service_s.get(model_id, _UNMEASURED_SERVICE_S)

    def load_s(self, model_id: str) -> float:
        return self._load_s.get(model_id, _UNMEASURED_LOAD_S)

    def measured_load_s(self, model_id: str) -> float | None:
        """The average load, None before the first one."""
        return self._load_s.get(model_id)

    def wait_s(self, loaded: str | None, running: Iterable[tuple[str, float]], queued: Sequence[str]) -> float:
        """When a request that came now would start, were all served one by one in order.

        `loaded` is the model that is ready; `running` are (model id, seconds so far); `queued` the models waited for.
        """
        wait_s = max((max(0.0, self.service_s(model) - so_far) for model, so_far in running), default=0.0)
        for model_id in queued:
            wait_s += self.service_s(model_id) + (self.load_s(model_id) if model_id != loaded else 0.0)
            loaded = model_id
        return wait_s


def _blend(averages: dict[str, float], model_id: str, took_s: float) -> None:
    before = averages.get(model_id, took_s)
    averages[model_id] = before + _NEWEST_WEIGHT * (took_s - before)
