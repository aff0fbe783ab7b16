"""The status that follows from what the node does and how its servers are."""

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from nodeagent.devices.values import DeviceRef
from nodeagent.scheduling.seam import LaneView, ServerState, ServerView
from nodeagent.status import DeviceStatus, NodeReason, NodeSnapshot, NodeState, NodeStatus, Phase, in_a_line, node_state

Servers = Sequence[ServerView[str]]


def server(model_id: str, state: ServerState, reason: str | None = None) -> ServerView[str]:
    return ServerView(model_id=model_id, state=state, generation=1, since=0.0, slots=1, reason=reason)


READY = server("a", ServerState.READY)
FAILED = server("b", ServerState.FAILED, "exited with code 1")


@pytest.mark.parametrize(
    ("phase", "status", "reasons", "codes"),
    [
        (Phase.STARTING, NodeStatus.STARTING, (), ()),
        (Phase.SERVING, NodeStatus.READY, (), ()),
        (Phase.DRAINED, NodeStatus.DRAINING, ("drained by an operator",), (NodeReason.DRAINED_BY_OPERATOR,)),
        (Phase.SHUTTING_DOWN, NodeStatus.DRAINING, ("shutting down",), (NodeReason.SHUTTING_DOWN,)),
        (Phase.STOPPING, NodeStatus.STOPPING, ("shutting down",), (NodeReason.SHUTTING_DOWN,)),
    ],
)
@pytest.mark.parametrize("failed", [False, True])
def test_the_phase_gives_the_status_and_a_failed_server_degrades_only_a_node_that_serves(
    phase: Phase, status: NodeStatus, reasons: tuple[str, ...], codes: tuple[NodeReason, ...], failed: bool
) -> None:
    state = node_state(phase, [("cpu:0", [READY, FAILED] if failed else [READY])], 2)
    if failed:
        status = NodeStatus.DEGRADED if status is NodeStatus.READY else status
        reasons = (*reasons, "b on cpu:0: exited with code 1")
        codes = (*codes, NodeReason.SERVER_FAILED)
    assert state == NodeState(status, reasons, can_serve=True, reason_codes=codes)


@pytest.mark.parametrize("state", [state for state in ServerState if state is not ServerState.FAILED])
def test_a_server_in_any_other_state_degrades_nothing(state: ServerState) -> None:
    assert node_state(Phase.SERVING, [("cpu:0", [server("a", state, "why")])], 1).status is NodeStatus.READY


@pytest.mark.parametrize(
    ("devices", "models", "can_serve"),
    [
        ([("cpu:0", [])], 1, True),
        ([("cpu:0", [FAILED])], 1, False),
        ([("cpu:0", [FAILED])], 2, True),
        ([("cpu:0", [FAILED]), ("cpu:1", [])], 1, True),
        ([("cpu:0", [FAILED]), ("cpu:1", [FAILED])], 1, False),
        ([], 1, False),
        ([("cpu:0", [])], 0, False),
    ],
)
def test_a_node_can_serve_unless_every_model_has_failed_everywhere(
    devices: list[tuple[str, Servers]], models: int, can_serve: bool
) -> None:
    state = node_state(Phase.SERVING, devices, models)
    assert state.can_serve == can_serve
    assert len(state.reasons) == len(state.reason_codes)


def snapshot_of(state: NodeState) -> NodeSnapshot:
    def device(device_id: str, *servers: ServerView[str]) -> DeviceStatus:
        return DeviceStatus(
            DeviceRef(device_id=device_id, backend="cpu", index=0, name="CPU"), None, LaneView(1, 2, 4, 0.0), servers
        )

    return NodeSnapshot(
        now=0.0,
        node_id="box",
        node_name="Box",
        base_url="http://box",
        agent_version="1",
        incarnation="i",
        started_at=datetime.now(UTC),
        heartbeat_interval_s=10.0,
        state=state,
        devices=(device("cpu:0", READY), device("cpu:1", server("a", ServerState.STARTING), FAILED)),
        models=(),
    )


def test_the_status_fits_into_a_line() -> None:
    state = NodeState(NodeStatus.DEGRADED, ("b on cpu:1: exited with code 1",), can_serve=True)
    assert in_a_line(snapshot_of(state)) == (
        "degraded: 2 requests in flight, 4 queued; loaded: a on cpu:0; b on cpu:1: exited with code 1"
    )


def test_devices_are_found_by_model_and_state() -> None:
    snapshot = snapshot_of(NodeState(NodeStatus.READY, (), can_serve=True))
    assert snapshot.devices_with("a", ServerState.READY) == ["cpu:0"]
    assert snapshot.devices_with("a", ServerState.READY, ServerState.STARTING) == ["cpu:0", "cpu:1"]
    assert snapshot.devices_with("b", ServerState.READY) == []
