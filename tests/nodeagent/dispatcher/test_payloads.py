"""The payloads, field by field, from a snapshot made by hand."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.dispatcher.payloads import heartbeat, inventory, register
from nodeagent.dispatcher.wire import PROTOCOL, as_json
from nodeagent.scheduling.seam import LaneView, ServerState, ServerView
from nodeagent.status import (
    DeviceFit,
    DeviceStatus,
    FitState,
    ModelStatus,
    NodeReason,
    NodeSnapshot,
    NodeState,
    NodeStatus,
)

NOW = 1000.0
STARTED_AT = datetime(2026, 11, 23, 18, 7, 11, 500_000, tzinfo=UTC)

KNOWN_DEVICE = DeviceStatus(
    DeviceRef(
        device_id="gpu:0",
        backend="cuda",
        index=0,
        name="NVIDIA L4",
        uuid="GPU-6f",
        memory_total_bytes=24_000,
        pci_id="0000:01:00.0",
        integrated=False,
        threads=4,
        cpus=frozenset({3, 1}),
    ),
    DeviceMetrics(
        measured_at=NOW - 0.4,
        memory_total_bytes=24_000,
        memory_used_bytes=6_000,
        memory_free_bytes=18_000,
        utilization_ratio=0.83,
        temperature_celsius=61.0,
        power_watts=71.2,
    ),
    LaneView(1, 1, 3, 2.3456),
    (
        ServerView(
            model_id="planner", state=ServerState.READY, generation=7, since=NOW - 90, slots=2, slot_ctx_size=4096
        ),
        ServerView(
            model_id="coder",
            state=ServerState.BACKING_OFF,
            generation=8,
            since=NOW - 1,
            slots=1,
            reason="exited with code 1",
            reason_code="exited",
            retry_at=NOW + 2.5,
        ),
    ),
)
UNKNOWN_DEVICE = DeviceStatus(
    DeviceRef(device_id="gpu:1", backend="cuda", index=1, name="unknown"), None, LaneView(0, 0, 3, 0.0), ()
)
KNOWN_MODEL = ModelStatus(
    model_id="planner",
    aliases=("plan",),
    roles=("planner", "chat"),
    endpoints=("chat", "completions"),
    parallel=2,
    path="/models/planner.gguf",
    arguments=("-m", "/models/planner.gguf"),
    ctx_size=8192,
    size_bytes=5_000,
    problem=None,
    load_time_s=3.1,
    fits=(
        DeviceFit(
            device_id="gpu:0",
            state=FitState.LOADED,
            why="preload",
            needed_bytes=5_500,
            taken_bytes=5_500,
            is_measured=True,
        ),
    ),
)
UNKNOWN_MODEL = ModelStatus(
    model_id="coder",
    aliases=(),
    roles=("chat",),
    endpoints=("chat", "completions"),
    parallel=1,
    path="/models/coder.gguf",
    arguments=(),
    ctx_size=None,
    size_bytes=None,
    problem="no such file",
    load_time_s=None,
)
SNAPSHOT = NodeSnapshot(
    now=NOW,
    node_id="box-a",
    node_name="Box A",
    base_url="http://10.0.0.5:8081",
    agent_version="1.2.3",
    incarnation="b1d0",
    started_at=STARTED_AT,
    heartbeat_interval_s=10.0,
    state=NodeState(
        NodeStatus.DEGRADED,
        ("coder on gpu:0: exited with code 1",),
        can_serve=True,
        reason_codes=(NodeReason.SERVER_FAILED,),
    ),
    devices=(KNOWN_DEVICE, UNKNOWN_DEVICE),
    models=(KNOWN_MODEL, UNKNOWN_MODEL),
)

IDENTITY = {
    "protocol": PROTOCOL,
    "node_id": "box-a",
    "node_name": "Box A",
    "base_url": "http://10.0.0.5:8081",
    "agent_version": "1.2.3",
    "incarnation": "b1d0",
    "started_at": "2026-11-23T18:07:11.500Z",
    "heartbeat_interval_s": 10.0,
    "roles": ["chat", "planner"],
}
DEVICE_FACTS: list[dict[str, Any]] = [
    {
        "device_id": "gpu:0",
        "uuid": "GPU-6f",
        "name": "NVIDIA L4",
        "backend": "cuda",
        "memory_total_bytes": 24_000,
    },
    {"device_id": "gpu:1", "uuid": None, "name": "unknown", "backend": "cuda", "memory_total_bytes": None},
]
MODEL_FACTS: list[dict[str, Any]] = [
    {
        "model_id": "planner",
        "aliases": ["plan"],
        "roles": ["planner", "chat"],
        "endpoints": ["chat", "completions"],
        "ctx_size": 8192,
        "parallel": 2,
        "size_bytes": 5_000,
    },
    {
        "model_id": "coder",
        "aliases": [],
        "roles": ["chat"],
        "endpoints": ["chat", "completions"],
        "ctx_size": None,
        "parallel": 1,
        "size_bytes": None,
    },
]
STATUS = {
    "status": "degraded",
    "reasons": ["coder on gpu:0: exited with code 1"],
    "reason_codes": ["server_failed"],
}
MODEL_STATES: list[dict[str, Any]] = [
    {"model_id": "planner", "loaded_on": ["gpu:0"], "loading_on": [], "failed_on": [], "load_time_s": 3.1},
    {"model_id": "coder", "loaded_on": [], "loading_on": [], "failed_on": [], "load_time_s": None},
]


def device_states(sent_at: str) -> list[dict[str, Any]]:
    def since(seconds_ago: float) -> str:
        moment = datetime.fromisoformat(sent_at) - timedelta(seconds=seconds_ago)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    return [
        {
            "device_id": "gpu:0",
            "metrics": {
                "memory_total_bytes": 24_000,
                "memory_used_bytes": 6_000,
                "memory_free_bytes": 18_000,
                "utilization_ratio": 0.83,
                "temperature_celsius": 61.0,
                "power_watts": 71.2,
                "age_s": 0.4,
            },
            "lane": {"in_flight": 1, "waiting": 1, "limit": 3, "free": 1, "estimated_wait_s": 2.346},
            "used_by": [],
            "servers": [
                {
                    "model_id": "planner",
                    "state": "ready",
                    "generation": 7,
                    "since": since(90),
                    "ready_in_s": None,
                    "slots": 2,
                    "slot_ctx_size": 4096,
                    "reason": None,
                    "reason_code": None,
                    "device_ids": [],
                },
                {
                    "model_id": "coder",
                    "state": "backing_off",
                    "generation": 8,
                    "since": since(1),
                    "ready_in_s": 2.5,
                    "slots": 1,
                    "slot_ctx_size": None,
                    "reason": "exited with code 1",
                    "reason_code": "exited",
                    "device_ids": [],
                },
            ],
        },
        {
            "device_id": "gpu:1",
            "metrics": {
                "memory_total_bytes": None,
                "memory_used_bytes": None,
                "memory_free_bytes": None,
                "utilization_ratio": None,
                "temperature_celsius": None,
                "power_watts": None,
                "age_s": None,
            },
            "lane": {"in_flight": 0, "waiting": 0, "limit": 3, "free": 3, "estimated_wait_s": 0.0},
            "servers": [],
            "used_by": [],
        },
    ]


def test_a_registration_has_the_node_its_devices_and_its_models() -> None:
    assert as_json(register(SNAPSHOT)) == IDENTITY | {"devices": DEVICE_FACTS, "models": MODEL_FACTS}


def test_a_heartbeat_has_the_status_of_the_node_its_devices_and_its_models() -> None:
    before = datetime.now(UTC)
    sent = as_json(heartbeat(SNAPSHOT, 17))
    sent_at = datetime.fromisoformat(sent["sent_at"])
    assert before - timedelta(milliseconds=1) <= sent_at <= datetime.now(UTC)
    assert sent == STATUS | {
        "protocol": PROTOCOL,
        "node_id": "box-a",
        "incarnation": "b1d0",
        "sequence": 17,
        "sent_at": sent["sent_at"],
        "devices": rounded(device_states(sent["sent_at"]), sent),
        "models": MODEL_STATES,
    }


def test_the_inventory_is_both_with_parts_of_the_configuration() -> None:
    sent = as_json(inventory(SNAPSHOT))
    configured_devices: list[dict[str, Any]] = [
        {"pci_id": "0000:01:00.0", "integrated": False, "threads": 4, "cpus": [1, 3]},
        {"pci_id": None, "integrated": None, "threads": None, "cpus": None},
    ]
    fit = {"device_id": "gpu:0", "state": "loaded", "why": "preload", "memory_needed_bytes": 5_500}
    fit |= {"memory_taken_bytes": 5_500, "measured": True}
    configured_models: list[dict[str, Any]] = [
        {"path": "/models/planner.gguf", "arguments": ["-m", "/models/planner.gguf"], "problem": None, "fits": [fit]},
        {"path": "/models/coder.gguf", "arguments": [], "problem": "no such file", "fits": []},
    ]
    states = rounded(device_states(sent["sent_at"]), sent)
    devices = [
        facts | state | more for facts, state, more in zip(DEVICE_FACTS, states, configured_devices, strict=True)
    ]
    models = [
        facts | state | more for facts, state, more in zip(MODEL_FACTS, MODEL_STATES, configured_models, strict=True)
    ]
    assert sent == IDENTITY | STATUS | {"sent_at": sent["sent_at"], "devices": devices, "models": models}


def rounded(expected: list[dict[str, Any]], sent: dict[str, Any]) -> list[dict[str, Any]]:
    """`since` is computed before `sent_at` is cut to milliseconds, so the last digit may be one higher."""
    for device, sent_device in zip(expected, sent["devices"], strict=True):
        for server, sent_server in zip(device["servers"], sent_device["servers"], strict=True):
            difference = datetime.fromisoformat(sent_server["since"]) - datetime.fromisoformat(server["since"])
            assert abs(difference) <= timedelta(milliseconds=1)
            server["since"] = sent_server["since"]
    return expected


@pytest.mark.parametrize(
    ("state", "where"),
    [(ServerState.READY, "loaded_on"), (ServerState.STARTING, "loading_on"), (ServerState.FAILED, "failed_on")],
)
def test_a_model_is_listed_where_its_server_is_ready_starting_or_failed(state: ServerState, where: str) -> None:
    server: ServerView[str] = ServerView(model_id="coder", state=state, generation=1, since=NOW, slots=1)
    snapshot = replace(SNAPSHOT, devices=(KNOWN_DEVICE, replace(UNKNOWN_DEVICE, servers=(server,))))
    [_, coder] = as_json(heartbeat(snapshot, 1))["models"]
    assert {key: coder[key] for key in ("loaded_on", "loading_on", "failed_on")} == {
        "loaded_on": [],
        "loading_on": [],
        "failed_on": [],
    } | {where: ["gpu:1"]}


def test_a_retry_that_is_overdue_is_due_now() -> None:
    server: ServerView[str] = ServerView(
        model_id="coder", state=ServerState.FAILED, generation=1, since=NOW, slots=1, retry_at=NOW - 5
    )
    snapshot = replace(SNAPSHOT, devices=(replace(UNKNOWN_DEVICE, servers=(server,)),))
    [device] = as_json(heartbeat(snapshot, 1))["devices"]
    assert device["servers"][0]["ready_in_s"] == 0.0
