"""The payloads between node and dispatcher, and of `/v1/node/inventory`; README.md shows an example of each.

Sizes in bytes, durations in seconds, times in RFC 3339 and UTC; what is unknown is null. Writers send every field,
readers ignore fields that they don't know. `protocol` rises when a field changes its meaning.
"""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

from nodeagent.timestamps import rfc3339

PROTOCOL = 1

# The interval that a dispatcher may ask for.
INTERVAL_MIN_S = 1.0
INTERVAL_MAX_S = 300.0

Time = Annotated[datetime, PlainSerializer(rfc3339, return_type=str)]


class Payload(BaseModel):
    """A message, or part of one."""

    # Built when first used: no start waits for a dispatcher, and schemas take 12 ms to build.
    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)


class RegisteredDevice(Payload):
    device_id: str
    uuid: str | None
    name: str
    backend: str
    memory_total_bytes: int | None


class RegisteredModel(Payload):
    model_id: str
    aliases: list[str]
    roles: list[str]
    endpoints: list[str]
    ctx_size: int | None
    parallel: int
    size_bytes: int | None


class Register(Payload):
    """`POST /v1/nodes/register`: the node and what it has. It replaces an earlier one with the same `node_id`."""

    protocol: int = PROTOCOL
    node_id: str
    node_name: str
    base_url: str
    agent_version: str
    incarnation: str
    started_at: Time
    heartbeat_interval_s: float
    roles: list[str]
    devices: list[RegisteredDevice]
    models: list[RegisteredModel]


class Metrics(Payload):
    """The last reading of a device, `age_s` ago."""

    memory_total_bytes: int | None
    memory_used_bytes: int | None
    memory_free_bytes: int | None
    utilization_ratio: float | None
    temperature_celsius: float | None
    power_watts: float | None
    age_s: float | None


class LaneLoad(Payload):
    """The requests of one device. `estimated_wait_s`: when a request that arrives now would start."""

    in_flight: int
    waiting: int
    limit: int
    free: int
    estimated_wait_s: float


class Server(Payload):
    """One server. `ready_in_s`: when a server that is backing off restarts, or a failed one may be started again.
    `slot_ctx_size`: the context of each slot in tokens, as the server itself says, null if unknown. `device_ids`: the
    devices that it spans, empty if it runs on one."""

    model_id: str
    state: str
    generation: int
    since: Time
    ready_in_s: float | None
    slots: int
    slot_ctx_size: int | None
    reason: str | None
    reason_code: str | None
    device_ids: list[str] = []


class DeviceState(Payload):
    """A device with its servers. `used_by` are models whose server is that of another device and spans this one."""

    device_id: str
    metrics: Metrics
    lane: LaneLoad
    servers: list[Server]
    used_by: list[str] = []


class ModelState(Payload):
    """The devices on which a model is loaded. `load_time_s` is the shortest average of the devices, null before the
    first load."""

    model_id: str
    loaded_on: list[str]
    loading_on: list[str]
    failed_on: list[str]
    load_time_s: float | None


class Heartbeat(Payload):
    """`POST /v1/nodes/heartbeat`: the status of the node. `reason_codes` has one code for each of `reasons`, in order.

    `sequence` rises with each heartbeat; a reader drops one that is older.
    """

    protocol: int = PROTOCOL
    node_id: str
    incarnation: str
    sequence: int
    sent_at: Time
    status: str
    reasons: list[str]
    reason_codes: list[str]
    devices: list[DeviceState]
    models: list[ModelState]


class HeartbeatResponse(Payload):
    """The response to both calls; the body may also be empty."""

    heartbeat_interval_s: float | None = Field(default=None, allow_inf_nan=False)


class InventoryDevice(RegisteredDevice, DeviceState):
    """A device with its state and its configuration. `pci_id` is as `0000:01:00.0`; `integrated` says whether it shares
    the host's memory."""

    pci_id: str | None
    integrated: bool | None
    threads: int | None
    cpus: list[int] | None


class Fit(Payload):
    """How a model fits on a device: its server takes `memory_needed_bytes` there (measured or estimated), and takes
    `memory_taken_bytes` now, if it runs. `state` is one of `FitState`; `why` says it for people."""

    device_id: str
    state: str
    why: str
    memory_needed_bytes: int | None
    memory_taken_bytes: int | None
    measured: bool


class InventoryModel(RegisteredModel, ModelState):
    """A model with its state and its configuration; `arguments` are llama-server's, `fits` has each device that it may
    run on, or those that it spans together (`gpu:0+gpu:1`)."""

    path: str
    arguments: list[str]
    problem: str | None
    fits: list[Fit]


class Inventory(Payload):
    """`GET /v1/node/inventory`: registration and heartbeat in one, with parts of the configuration."""

    protocol: int = PROTOCOL
    node_id: str
    node_name: str
    base_url: str
    agent_version: str
    incarnation: str
    started_at: Time
    sent_at: Time
    heartbeat_interval_s: float
    roles: list[str]
    status: str
    reasons: list[str]
    reason_codes: list[str]
    devices: list[InventoryDevice]
    models: list[InventoryModel]


def as_json(payload: Payload) -> dict[str, Any]:
    """The payload as it is sent, with every field."""
    return payload.model_dump(mode="json")
