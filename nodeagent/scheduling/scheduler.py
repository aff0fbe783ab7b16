"""Which lane takes a request: the lanes, and what placement needs to know of each."""

import logging
from collections.abc import Mapping
from typing import Generic, TypeVar

import trio

from nodeagent.errors import BackendUnavailable, Draining, QueueFull
from nodeagent.scheduling.host import Host, ServerState
from nodeagent.scheduling.lane import Lane
from nodeagent.scheduling.lease import Ticket
from nodeagent.scheduling.placement import AllFull, Candidate, NoneEligible, Placed, Residency, choose

logger = logging.getLogger(__name__)

E = TypeVar("E")


class Scheduler(Generic[E]):
    """Admits requests to lanes. `lanes` and `hosts` share their keys, the device ids, in the order of preference."""

    def __init__(self, lanes: Mapping[str, Lane[E]], hosts: Mapping[str, Host[E]]) -> None:
        self.lanes = lanes
        self._hosts = hosts
        self._closed_for: Draining | None = None

    def admit(self, request_id: str, model_id: str) -> Ticket[E]:
        """Give a request its place in the best lane; it must be closed in the end.

        Raises QueueFull, BackendUnavailable or Draining. Nothing waits.
        """
        if self._closed_for is not None:
            raise self._closed_for
        return self.lanes[self.place(model_id)].submit(request_id, model_id)

    def place(self, model_id: str) -> str:
        """The device that a request for the model goes to now; raises QueueFull or BackendUnavailable."""
        match choose([self._candidate(device_id, model_id) for device_id in self.lanes]):
            case Placed(device_id, reason):
                logger.debug("%s goes to %s: %s", model_id, device_id, reason)
                return device_id
            case AllFull(device_ids):
                lanes = [self.lanes[device_id] for device_id in device_ids]
                raise QueueFull(model_id, lanes[0].limit, min(lane.place_free_in_s() for lane in lanes))
            case NoneEligible(reason, retry_at):
                retry_after_s = None if retry_at is None else max(0.0, retry_at - trio.current_time())
                raise BackendUnavailable(model_id, reason, retry_after_s)

    def preload(self, model_ids: list[str]) -> list[str]:
        """Have each model loaded on a device of its own; returns those for which there is no device left."""
        free = list(self.lanes)
        left_over = []
        for model_id in model_ids:
            match choose([self._candidate(device_id, model_id) for device_id in free]):
                case Placed(device_id):
                    free.remove(device_id)
                    self.lanes[device_id].preload(model_id)
                case _:
                    left_over.append(model_id)
        return left_over

    def refuse_new(self, reason: Draining) -> None:
        """From now on `admit` raises `reason`; what was admitted is served."""
        self._closed_for = reason

    def take_new(self) -> None:
        """Admit requests again."""
        self._closed_for = None

    @property
    def admitted(self) -> int:
        """Requests in flight or queued on the whole node."""
        return sum(lane.admitted for lane in self.lanes.values())

    def _candidate(self, device_id: str, model_id: str) -> Candidate:
        lane, host = self.lanes[device_id], self._hosts[device_id]
        obstacle = host.obstacle(model_id)
        return Candidate(
            device_id,
            _residency(host, lane, model_id),
            lane.admitted,
            lane.limit,
            host.memory_free_bytes(),
            _state(host, model_id) in (ServerState.BACKING_OFF, ServerState.FAILED),
            obstacle.reason if obstacle else None,
            obstacle.retry_at if obstacle else None,
        )


def _state(host: Host[E], model_id: str) -> ServerState | None:
    return next((view.state for view in host.views() if view.model_id == model_id), None)


def _residency(host: Host[E], lane: Lane[E], model_id: str) -> Residency:
    states = {view.model_id: view.state for view in host.views()}
    if states.get(model_id) is ServerState.READY:
        return Residency.READY
    if lane.loading == model_id or states.get(model_id) is ServerState.STARTING:
        return Residency.LOADING
    if any(state is not ServerState.FAILED for state in states.values()):
        return Residency.OTHER_MODEL
    return Residency.EMPTY
