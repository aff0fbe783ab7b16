"""The whole node over fake processes: what the front, the dispatcher and the shutdown call, in virtual time."""

import json
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fakes.child_process import Fate
from fakes.node_with_fakes import FakeDispatcherClient, NodeWithFakes, loaded, request_in_flight
from nodeagent.dispatcher.wire import Inventory
from nodeagent.errors import BackendUnavailable, NoSuchDevice, OutOfDeviceMemory
from nodeagent.front.seam import ModelCard
from nodeagent.llama_server.reason_codes import ReasonCode
from nodeagent.scheduling.seam import ServerState
from nodeagent.status import NodeReason, NodeStatus
from supervisor.lifecycle import Cause
from supervisor.probe import LivenessPolicy

EXITS = Fate(ready_after_s=None, exits_after_s=0.5)
SLOW = Fate(ready_after_s=5.0)
RUNS_OUT = Fate(ready_after_s=None, exits_after_s=0.5, prints=b"CUDA error: out of memory\n")


# Loading and unloading.


async def test_a_load_returns_the_device_on_which_the_model_is_ready(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path, [SLOW])
    node = await parts.start(nursery)
    assert await node.load("a", None) == "cpu:0"
    assert trio.current_time() == pytest.approx(5, abs=1)
    assert loaded(node) == ["cpu:0/a"]
    assert parts.event_kinds() == ["node", "starting", "ready"]


async def test_a_load_goes_to_the_named_device_only(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, device_ids=["cpu:0", "cpu:1"]).start(nursery)
    assert await node.load("a", "cpu:1") == "cpu:1"
    assert loaded(node) == ["cpu:1/a"]
    with pytest.raises(NoSuchDevice) as refusal:
        await node.load("a", "gpu:7")
    assert refusal.value.known == ["cpu:0", "cpu:1"]


async def test_a_load_without_waiting_goes_on_in_the_background(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, [SLOW]).start(nursery)
    node.load_soon("a", None)
    assert loaded(node) == []
    await trio.sleep(6)
    assert loaded(node) == ["cpu:0/a"]


async def test_a_background_load_that_fails_is_logged(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = await NodeWithFakes(tmp_path, [EXITS], restart={"max_restarts": 0}).start(nursery)
    node.load_soon("a", "cpu:0")
    await trio.sleep(1)
    assert any(message.startswith("loading a: ") for message in messages(caplog, "nodeagent.node"))


async def test_a_load_retries_a_model_that_has_failed(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, [EXITS], restart={"max_restarts": 0, "cooldown_s": 300}).start(nursery)
    with pytest.raises(BackendUnavailable):
        await node.load("a", None)
    state = node.state()
    assert (state.status, state.reason_codes) == (NodeStatus.DEGRADED, (NodeReason.SERVER_FAILED,))
    with pytest.raises(BackendUnavailable):
        node.scheduler.place("a")  # a request is refused during the cool-down
    assert await node.load("a", None) == "cpu:0"
    assert node.state().status is NodeStatus.READY


async def test_a_load_on_a_named_device_leaves_the_failures_of_other_devices_alone(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(
        tmp_path, [EXITS], device_ids=["cpu:0", "cpu:1"], restart={"max_restarts": 0, "cooldown_s": 300}
    ).start(nursery)
    with pytest.raises(BackendUnavailable):
        await node.load("a", "cpu:0")
    await node.load("a", "cpu:1")
    assert node.state().reason_codes == (NodeReason.SERVER_FAILED,)
    assert node.scheduler.place("a") == "cpu:1"


async def test_an_unload_waits_for_the_requests_in_flight(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path).start(nursery)
    ticket = await request_in_flight(node, "a")
    unloaded: list[str] = []

    async def unload() -> None:
        unloaded.extend(await node.unload("a", force=False))

    nursery.start_soon(unload, name="unload")
    await trio.sleep(100)
    assert (loaded(node), unloaded) == (["cpu:0/a"], [])
    ticket.close()
    await trio.sleep(1)
    assert (loaded(node), unloaded) == ([], ["cpu:0"])


async def test_a_forced_unload_waits_for_no_request(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path).start(nursery)
    ticket = await request_in_flight(node, "a")
    assert await node.unload("a", force=True) == ["cpu:0"]
    assert loaded(node) == []
    ticket.close()


async def test_an_unload_names_the_devices_that_had_the_model(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, device_ids=["cpu:0", "cpu:1"]).start(nursery)
    assert await node.unload("a", force=False) == []
    for device_id in ("cpu:0", "cpu:1"):
        await node.load("a", device_id)
    assert await node.unload("a", force=False) == ["cpu:0", "cpu:1"]
    assert loaded(node) == []


async def test_an_unload_of_a_failed_model_resets_its_failure(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, [EXITS], restart={"max_restarts": 0}).start(nursery)
    with pytest.raises(BackendUnavailable):
        await node.load("a", None)
    assert await node.unload("a", force=False) == ["cpu:0"]
    assert node.state().status is NodeStatus.READY
    assert node.scheduler.place("a") == "cpu:0"


# The state of the node, and its events.


async def test_a_change_of_state_is_one_event_however_many_transitions_follow(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path, [EXITS], restart={"max_restarts": 0})
    node = await parts.start(nursery)
    with pytest.raises(BackendUnavailable):
        await node.load("a", None)
    await node.load("b", None)
    await node.unload("b", force=False)
    kinds = parts.event_kinds()
    assert kinds[:5] == ["node", "starting", "exited", "failed", "node"]
    assert kinds.count("node") == 2
    failed = node.events.after(3).items[0]
    assert (failed.kind, failed.device_id, failed.model_id, failed.generation) == ("failed", "cpu:0", "a", 1)
    assert failed.reason_code == Cause.EXITED


async def test_every_code_that_is_sent_is_of_its_closed_set(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    fates: list[Fate | OSError] = [
        OSError(2, "no such file"),
        EXITS,
        Fate(ready_after_s=None),
        Fate(ill_after_s=1.0),
        Fate(suspended_after_s=1.0),
        Fate(exits_after_s=1.0, code=-11),
    ]
    liveness = LivenessPolicy(interval_s=1, timeout_s=1, failures=2)
    parts = NodeWithFakes(tmp_path, fates, liveness=liveness, restart={"max_restarts": 100})
    parts.catalogue.unusable["b"] = "no such file"
    node = await parts.start(nursery)
    sent: set[str | None] = set()
    node.load_soon("a", None)
    for _ in range(500):
        await trio.sleep(1)
        beat = node.heartbeat_payload(1)
        sent |= {*beat.reason_codes, *(it.reason_code for device in beat.devices for it in device.servers)}
    node.drain()
    await node.unload("a", force=True)
    node.begin_shutdown()
    sent |= {event.reason_code for event in node.events.after(0).items}
    assert sent >= {"spawn_failed", "exited", "start_timeout", "liveness_failed", "suspended", "killed_by_signal"}
    assert sent >= {"stopped", "model_file_unusable", *NodeReason}
    assert sent - {None} <= {*ReasonCode, *NodeReason}


async def test_what_a_server_prints_is_kept_by_device(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path)
    node = await parts.start(nursery)
    await node.load("a", None)
    parts.spawner.processes[0].output.feed(b"loading\nready\n")
    assert node.log_of("cpu:0").after(0).items == ["loading", "ready"]
    with pytest.raises(NoSuchDevice):
        node.log_of("cpu:1")


# The dispatcher.


async def test_the_dispatcher_gets_a_heartbeat_after_each_transition_and_a_registration_on_request(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path).start(nursery)
    assert not node.register()
    node.dispatcher = client = FakeDispatcherClient()
    await node.load("a", None)
    assert client.calls == ["heartbeat_soon", "heartbeat_soon"]  # starting, ready
    assert node.register()
    assert client.calls[2:] == ["register_again"]


# Snapshots.


async def test_a_snapshot_holds_everything_about_the_node(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    models = [
        {"model_id": "a", "path": "a.gguf", "alias": "planner", "roles": ["plan"], "ctx_size": 512, "parallel": 2},
        {"model_id": "b", "path": "b.gguf"},
    ]
    parts = NodeWithFakes(tmp_path, [SLOW], models=models)
    node = await parts.start(nursery)
    parts.catalogue.unusable["b"] = "no such file"
    await node.load("a", None)
    snapshot = node.snapshot()
    assert (snapshot.node_id, snapshot.base_url, snapshot.incarnation) == ("box", "http://10.0.0.5:8081", "b1d0")
    assert snapshot.now == trio.current_time()
    a, b = snapshot.models
    assert (a.aliases, a.roles, a.ctx_size, a.parallel) == (("planner",), ("plan",), 512, 2)
    assert a.load_time_s == pytest.approx(5, abs=1)
    assert (b.aliases, b.ctx_size, b.size_bytes, b.load_time_s) == ((), None, None, None)
    assert (a.problem, b.problem) == (None, "no such file")
    assert snapshot.devices_with("a", ServerState.READY) == ["cpu:0"]
    assert snapshot.devices_with("b", ServerState.FAILED) == ["cpu:0"]
    [device] = snapshot.devices
    assert (device.ref.device_id, device.metrics, device.lane.in_flight) == ("cpu:0", None, 0)
    assert snapshot.state.reasons == ("b on cpu:0: no such file",)


async def test_the_inventory_is_the_payload_as_json(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path).start(nursery)
    inventory = json.loads(node.inventory_json())
    assert inventory.keys() == Inventory.model_fields.keys()
    assert (inventory["node_id"], inventory["status"]) == ("box", "ready")
    assert node.register_payload().node_id == node.heartbeat_payload(7).node_id == "box"
    assert node.heartbeat_payload(7).sequence == 7


def test_every_model_has_a_card(tmp_path: Path) -> None:
    models = [{"model_id": "a", "path": "a.gguf", "alias": "planner"}, {"model_id": "b", "path": "b.gguf"}]
    node = NodeWithFakes(tmp_path, models=models, max_request_bytes=1000).node
    created = int(node.identity.started_at.timestamp())
    assert node.cards() == [ModelCard("a", ("planner",), created), ModelCard("b", (), created)]
    assert node.cards() is node.cards(), "every request looks for its model there"
    assert (node.node_id, node.max_request_bytes) == ("box", 1000)
    assert node.gate.is_operator(b"token")


def messages(caplog: pytest.LogCaptureFixture, logger: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == logger]


# Preloading.

PRELOADED = [{"model_id": "a", "path": "a.gguf", "preload": True}, {"model_id": "b", "path": "b.gguf"}]


async def test_a_node_is_starting_until_its_preloaded_model_is_ready(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path, [SLOW], models=PRELOADED)
    node = await parts.start(nursery)
    node.preload()
    assert node.state().status is NodeStatus.STARTING
    await trio.sleep(4)
    assert node.state().status is NodeStatus.STARTING
    await trio.sleep(2)
    assert node.state().status is NodeStatus.READY
    assert [event.reason for event in parts.node.events.after(0).items if event.kind == "node"][-1] == "ready"
    await node.unload("a", force=False)
    assert node.state().status is NodeStatus.READY, "unloaded later, it was ready all the same"


async def test_a_preloaded_model_that_is_not_ready_in_time_holds_up_nothing(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    never = Fate(ready_after_s=None)
    node = await NodeWithFakes(tmp_path, [never], models=PRELOADED, preload_ready_timeout_s=3).start(nursery)
    node.preload()
    await trio.sleep(2.9)
    assert node.state().status is NodeStatus.STARTING
    await trio.sleep(0.2)
    assert node.state().status is NodeStatus.READY


async def test_a_preloaded_model_that_has_failed_leaves_the_node_degraded(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path, [EXITS] * 9, models=PRELOADED, restart={"max_restarts": 0})
    node = await parts.start(nursery)
    node.preload()
    await trio.sleep(2)
    assert node.state().status is NodeStatus.DEGRADED


@pytest.mark.parametrize("error", [RuntimeError, RecursionError, OverflowError, UnicodeError])
async def test_an_unforeseen_error_in_the_background_ends_only_what_was_done_there(
    error: type[Exception],
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = await NodeWithFakes(tmp_path, [SLOW], models=PRELOADED).start(nursery)

    async def fails(*_arguments: object) -> None:
        raise error("unforeseen")

    with monkeypatch.context() as patched:
        patched.setattr(node, "load", fails)
        node.load_soon("a", None)
        await trio.sleep(1)
    with monkeypatch.context() as patched:
        patched.setattr(node, "reload", fails)
        node.reload_soon()
        await trio.sleep(1)
    assert "unexpected error while working in the background; the node goes on" in caplog.messages
    assert error.__name__ in caplog.text
    await node.load("a", None)
    assert node.state().status is NodeStatus.READY


@pytest.mark.parametrize(
    ("fates", "device_id", "loaded_on"),
    [([RUNS_OUT], None, "cpu:1"), ([RUNS_OUT], "cpu:0", None), ([RUNS_OUT, RUNS_OUT], None, None)],
)
async def test_an_operators_load_that_runs_out_of_memory_goes_to_another_device_unless_one_is_named(
    fates: list[Fate],
    device_id: str | None,
    loaded_on: str | None,
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    tmp_path: Path,
) -> None:
    node = await NodeWithFakes(tmp_path, fates, device_ids=("cpu:0", "cpu:1")).start(nursery)
    if loaded_on is None:
        with pytest.raises(OutOfDeviceMemory) as caught:
            await node.load("a", device_id)
        assert caught.value.reason.startswith("cpu:0: out of device memory")
        assert node.devices["cpu:0"].lane.is_idle
    else:
        assert await node.load("a", device_id) == loaded_on
