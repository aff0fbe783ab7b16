"""The node as it is now: one snapshot of everything, and the word for its state.

    STARTING ──listener bound──> READY <──a device or model fails, or recovers──> DEGRADED
        └────────────┴────────────────┴──SIGTERM, SIGINT──> DRAINING ──work done──> STOPPING

READY means that requests are taken, not that a model is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.scheduling.seam import LaneView, ServerState, ServerView

MODEL_ENDPOINTS = ("chat", "completions")
"""The endpoints of OpenAI's API that each model serves, as the wire names them."""


class NodeStatus(Enum):
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class NodeState:
    """The node's word of state. `can_serve` is False when every model has failed everywhere."""

    status: NodeStatus
    reasons: tuple[str, ...]
    can_serve: bool


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """One device: what it is, the last reading (None before the first), its lane and its servers."""

    ref: DeviceRef
    metrics: DeviceMetrics | None
    lane: LaneView
    servers: tuple[ServerView[Any], ...]


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model: what the configuration and its file say, and its average load time in seconds where measured.

    `problem` is what is wrong with its file, None where nothing is known to be. `ctx_size` is in tokens.
    """

    model_id: str
    aliases: tuple[str, ...]
    roles: tuple[str, ...]
    endpoints: tuple[str, ...]
    parallel: int
    path: str
    arguments: tuple[str, ...]
    ctx_size: int | None
    size_bytes: int | None
    problem: str | None
    load_time_s: float | None


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """Everything about the node at one moment; `now` is `trio.current_time()`, the other times are wall clock."""

    now: float
    node_id: str
    node_name: str
    base_url: str
    agent_version: str
    incarnation: str
    started_at: datetime
    heartbeat_interval_s: float
    state: NodeState
    devices: tuple[DeviceStatus, ...]
    models: tuple[ModelStatus, ...]

    def devices_with(self, model_id: str, *states: ServerState) -> list[str]:
        """The devices on which that model's server is in one of these states."""
        return [
            device.ref.device_id
            for device in self.devices
            if any(server.model_id == model_id and server.state in states for server in device.servers)
        ]


def node_state(phase: NodeStatus, devices: Sequence[tuple[str, Sequence[ServerView[Any]]]], models: int) -> NodeState:
    """The word for a node in this phase (STARTING, READY, DRAINING or STOPPING) with these servers on its devices.

    `models` is how many are configured. A READY node with a failed server is DEGRADED, and says which.
    """
    failed = [
        (device_id, server)
        for device_id, servers in devices
        for server in servers
        if server.state is ServerState.FAILED
    ]
    reasons = tuple(f"{server.model_id} on {device_id}: {server.reason}" for device_id, server in failed)
    can_serve = bool(devices) and models > 0 and len(failed) < models * len(devices)
    status = NodeStatus.DEGRADED if phase is NodeStatus.READY and failed else phase
    return NodeState(status, reasons, can_serve)
