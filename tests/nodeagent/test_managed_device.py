"""One device of the node: how it looks, and what a new configuration changes for it."""

from pathlib import Path

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.child_process import Fate
from fakes.node_with_fakes import NodeWithFakes
from nodeagent.devices.values import DeviceRef
from nodeagent.managed_device import ManagedDevice, lane_rules
from nodeagent.scheduling.queueing import Decision, FirstCome, LaneSnapshot
from nodeagent.scheduling.seam import LaneView, ServerState
from nodeagent.scheduling.swap_aware import SwapAware
from supervisor.lifecycle import Stopped


def device_of(parts: NodeWithFakes) -> ManagedDevice:
    return parts.node.devices["cpu:0"]


async def test_its_repr_shows_its_lane(autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path) -> None:
    parts = NodeWithFakes(tmp_path, [Fate(ready_after_s=5.0)], max_pending_requests_per_device=3)
    node = await parts.start(nursery)
    device = device_of(parts)
    assert repr(device) == "<ManagedDevice cpu:0: <Lane cpu:0: 0 in flight, 0 waiting, limit 3>>"
    node.load_soon("a", None)
    ticket = node.scheduler.admit("request", "a")
    await trio.sleep(1)
    assert repr(device) == "<ManagedDevice cpu:0: <Lane cpu:0: 0 in flight, 1 waiting, limit 3, loading a>>"
    await ticket.granted()
    assert repr(device) == "<ManagedDevice cpu:0: <Lane cpu:0: 1 in flight, 0 waiting, limit 3>>"
    ticket.close()


async def test_its_status_has_its_lane_and_its_servers(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path)
    node = await parts.start(nursery)
    await node.load("a", None)
    await wait_all_tasks_blocked()  # the load's own task ends after the caller has the device
    [status] = node.snapshot().devices
    assert status.ref is device_of(parts).ref
    assert status.lane == LaneView(0, 0, 2, 0.0)
    assert [(server.model_id, server.state) for server in status.servers] == [("a", ServerState.READY)]


async def test_a_new_configuration_replaces_the_lanes_rules_and_names_the_servers_to_stop(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path)
    node = await parts.start(nursery)
    await node.load("a", None)
    device = device_of(parts)
    assert device.reconfigure(parts.write_config(max_pending_requests_per_device=9)) == []
    assert device.lane.limit == 9
    changed = parts.write_config(models=[{"model_id": "a", "path": "a.gguf", "ctx_size": 512}])
    assert device.reconfigure(changed) == ["a"]


class CountingPolicy:
    """First come, first served; counts the turns of its lane."""

    def __init__(self) -> None:
        self.turns = 0

    def decide(self, lane: LaneSnapshot) -> Decision:
        self.turns += 1
        return FirstCome().decide(lane)


async def test_its_lane_takes_a_turn_after_each_event_of_a_server(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path)
    await parts.start(nursery)
    await wait_all_tasks_blocked()  # the turns of the start are over
    device, policy = device_of(parts), CountingPolicy()
    device.lane.rules = replace(device.lane.rules, policy=policy)
    await wait_all_tasks_blocked()
    assert policy.turns == 0
    device.handle(Stopped(child_id="cpu:0/a", generation=1, at=trio.current_time()))
    await wait_all_tasks_blocked()
    assert policy.turns == 1


@pytest.mark.parametrize(("scheduling", "policy"), [("fifo", FirstCome), ("swap_aware", SwapAware)])
def test_a_lane_follows_the_configuration(tmp_path: Path, scheduling: str, policy: type) -> None:
    config = NodeWithFakes(
        tmp_path,
        scheduling=scheduling,
        max_pending_requests_per_device=7,
        queue_timeout_s=11,
        llama_server_startup_timeout_s=13,
        abandoned_load_grace_s=17,
        swap_fairness_s=19,
        min_residency_s=1,
    ).config
    rules = lane_rules(config, DeviceRef(device_id="cpu:0", backend="cpu", index=0, name="CPU"))
    assert (rules.max_pending, rules.queue_timeout_s) == (7, 11)
    assert (rules.startup_timeout_s, rules.abandoned_load_grace_s) == (13, 17)
    assert isinstance(rules.policy, policy)
    if scheduling == "swap_aware":
        assert rules.policy == SwapAware(19, 1)
