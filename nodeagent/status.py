"""The node at one moment: a snapshot of everything, and its status with the reasons for it.

    STARTING ──front serves───> READY <──a model fails on a device, or recovers──> DEGRADED
        │                         │ ▲
        │                   drain │ │ undrain (operator)
        │                         ▼ │
        └──SIGTERM, SIGINT──> DRAINING ──SIGTERM, SIGINT, requests ended──> STOPPING

READY means that requests are accepted, not that a model is loaded. `Phase` is what the node itself does; `node_state`
derives the status from it and from the state of the servers.
"""

from collections.abc import Sequence
from datetime import datetime
from enum import Enum, StrEnum
from typing import Any

import msgspec

from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.scheduling.seam import LaneView, ServerState, ServerView

MODEL_ENDPOINTS = {"chat": ("chat", "completions"), "embedding": ("embeddings",), "rerank": ("rerank",)}
"""The endpoints that a model for each task serves, as the dispatcher protocol names them."""


class NodeStatus(Enum):
    """The status of the node, as the dispatcher protocol names it."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    STOPPING = "stopping"


class NodeReason(StrEnum):
    """Why the node has its status, as a closed set of codes for programs; the text beside it is for people."""

    SERVER_FAILED = "server_failed"
    """A model has failed on a device."""
    DRAINED_BY_OPERATOR = "drained_by_operator"
    """An operator drained the node; `undrain` ends that."""
    SHUTTING_DOWN = "shutting_down"
    """The agent was asked to end."""


class Phase(Enum):
    """What the node itself does, whatever the state of its servers."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINED = "drained"
    SHUTTING_DOWN = "shutting_down"
    STOPPING = "stopping"


class NodeState(msgspec.Struct, frozen=True):
    """The node's status. Each of `reasons` has its code at the same place in `reason_codes`.

    `can_serve` is False if every model has failed on every device.
    """

    status: NodeStatus
    reasons: tuple[str, ...]
    can_serve: bool
    reason_codes: tuple[NodeReason, ...] = ()


class DeviceStatus(msgspec.Struct, frozen=True):
    """One device with its last reading (None before the first), its lane and its servers. `used_by` are the models
    whose server is that of another device and spans this one too."""

    ref: DeviceRef
    metrics: DeviceMetrics | None
    lane: LaneView
    servers: tuple[ServerView[Any], ...]
    used_by: tuple[str, ...] = ()


class FitState(StrEnum):
    """How a model fits on a device, as a closed set of codes for programs; the text beside it is for people."""

    LOADED = "loaded"
    LOADING = "loading"
    """Its server runs or is about to, and is not ready."""
    FITS = "fits"
    """The memory is free."""
    NEEDS_ROOM = "needs_room"
    """It fits once other models have given way to it."""
    FITS_IN_PART = "fits_in_part"
    """llama-server puts as many layers on the device as fit."""
    DOES_NOT_FIT = "does_not_fit"
    FAILED = "failed"
    """Its last server there failed, and it is not started again yet."""
    UNKNOWN = "unknown"


class DeviceFit(msgspec.Struct, frozen=True, kw_only=True):
    """How a model fits on a device, and why: if it is loaded, who asked for that; else what it needs and what is free.

    `needed_bytes` is what a server of it takes of the device's memory, by a measurement (`is_measured`) or an estimate;
    `taken_bytes` is the same while one runs. What is unknown is None.
    """

    device_id: str
    state: FitState
    why: str
    needed_bytes: int | None
    taken_bytes: int | None
    is_measured: bool


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model: what its configuration and its file say, and its average load time in seconds (None: not measured).

    `fits`, if it was asked for, has an entry for each device that the model may run on, or for those that it spans
    together. `problem` is what is wrong with its file, None if nothing is known. `ctx_size` is in tokens. `arguments`
    are those of llama-server.
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
    fits: tuple[DeviceFit, ...] = ()


class NodeSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about the node at one moment. `now` is `trio.current_time()`, as are the times of servers and
    readings; `started_at` is wall clock."""

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


def in_a_line(node: NodeSnapshot) -> str:
    """The node's status for people: its requests and what is loaded, or what is wrong."""
    lanes = [device.lane for device in node.devices]
    running, waiting = sum(lane.in_flight for lane in lanes), sum(lane.waiting for lane in lanes)
    loaded = [
        f"{server.model_id} on {device.ref.device_id}"
        for device in node.devices
        for server in device.servers
        if server.state is ServerState.READY
    ]
    requests = f"{running} requests in flight, {waiting} queued"
    models = f"loaded: {', '.join(loaded)}" if loaded else "no model loaded"
    return "; ".join([f"{node.state.status.value}: {requests}", models, *node.state.reasons])


_BY_PHASE: dict[Phase, tuple[NodeStatus, tuple[NodeReason, ...]]] = {
    Phase.STARTING: (NodeStatus.STARTING, ()),
    Phase.SERVING: (NodeStatus.READY, ()),
    Phase.DRAINED: (NodeStatus.DRAINING, (NodeReason.DRAINED_BY_OPERATOR,)),
    Phase.SHUTTING_DOWN: (NodeStatus.DRAINING, (NodeReason.SHUTTING_DOWN,)),
    Phase.STOPPING: (NodeStatus.STOPPING, (NodeReason.SHUTTING_DOWN,)),
}
_TEXTS = {NodeReason.DRAINED_BY_OPERATOR: "drained by an operator", NodeReason.SHUTTING_DOWN: "shutting down"}


def node_state(
    phase: Phase, devices: Sequence[tuple[str, Sequence[ServerView[Any]]]], models: int, places: int | None = None
) -> NodeState:
    """The status of a node in this phase with these servers on its devices; the phase's own reason comes first.

    `models` is how many are configured, `places` on how many devices each may run, summed up; by default each may run
    on all. A node that serves with a failed server is DEGRADED.
    """
    failed = [
        (device_id, server)
        for device_id, servers in devices
        for server in servers
        if server.state is ServerState.FAILED
    ]
    status, codes = _BY_PHASE[phase]
    failures = [f"{server.model_id} on {device_id}: {server.reason}" for device_id, server in failed]
    return NodeState(
        NodeStatus.DEGRADED if status is NodeStatus.READY and failed else status,
        (*(_TEXTS[code] for code in codes), *failures),
        can_serve=bool(devices) and models > 0 and len(failed) < (models * len(devices) if places is None else places),
        reason_codes=(*codes, *(NodeReason.SERVER_FAILED for _ in failed)),
    )
