"""A node as a load balancer sees it: its status and how full its lanes are."""

from typing import Any

from nodeagent.scheduling.seam import LaneView
from nodeagent.status import NodeState, NodeStatus


class FakeLane:
    def __init__(self, in_flight: int, waiting: int, limit: int) -> None:
        self._view = LaneView(in_flight, waiting, limit, 0.0)

    def view(self) -> LaneView:
        return self._view


class FakeNode:
    """A node in that status with these lanes; `scheduler` is itself."""

    def __init__(self, status: NodeStatus, *lanes: FakeLane, reasons: tuple[str, ...] = (), can_serve: bool = True):
        self.device_lanes = [*lanes]
        self.now = NodeState(status, reasons, can_serve=can_serve)
        self.scheduler: Any = self

    def state(self) -> NodeState:
        return self.now
