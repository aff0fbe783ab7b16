"""How the lane of a spanning model takes its devices, keeps them and gives them back."""

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.servers import FakeServers
from fakes.spanning import SpanningNode
from nodeagent.errors import BackendUnavailable, OutOfDeviceMemory
from nodeagent.scheduling.lane import LaneRules
from nodeagent.scheduling.lease import Ticket
from nodeagent.scheduling.queueing import FirstCome, Priority
from nodeagent.scheduling.seam import ServerState
from nodeagent.scheduling.swap_aware import SwapAware

RULES = LaneRules(max_pending=9, queue_timeout_s=90, startup_timeout_s=60, policy=SwapAware(10.0, 1.0))
BOTH = "gpu:0+gpu:1"


def node_of(rules: LaneRules = RULES, **spans: tuple[str, ...]) -> SpanningNode:
    return SpanningNode(rules, spans or {"wide": ("gpu:0", "gpu:1")}, make=FakeServers, count=2)


async def test_a_ready_spanning_model_on_idle_devices_is_granted_at_once(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node = node_of()
    await node.start(nursery)
    first = node.scheduler.admit("first", "wide")
    await first.granted()
    first.close()
    await wait_all_tasks_blocked()
    assert [lane.held_for for lane in node.devices.values()] == [[], []]
    second = node.scheduler.admit("second", "wide")
    assert second.lease is not None
    assert (second.lease.queued_s, second.lease.load_s) == (0, 0)
    assert [lane.held_for for lane in node.devices.values()] == [["wide"], ["wide"]]
    second.close()
    assert node.servers[BOTH].history == ["start wide"]


async def test_the_wait_for_devices_is_no_part_of_the_load(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    node = node_of()
    await node.start(nursery)
    busy = node.lanes["gpu:1"].submit("busy", "a")
    await busy.granted()
    wide = node.scheduler.admit("wide", "wide")
    await trio.sleep(20)
    busy.close()
    lease = await wide.granted()
    assert (lease.queued_s, lease.load_s) == (20, 1)
    assert node.lanes[BOTH].times.load_s("wide") == 1
    wide.close()


async def test_two_groups_that_share_devices_never_wait_for_each_other(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node = node_of(one=("gpu:0", "gpu:1"), other=("gpu:1", "gpu:0"))
    await node.start(nursery)
    blocks = [node.lanes[device_id].submit("busy", "a") for device_id in ("gpu:0", "gpu:1")]
    for block in blocks:
        await block.granted()
    tickets = [node.scheduler.admit(model_id, model_id) for model_id in ("one", "other")]
    await wait_all_tasks_blocked()
    for block in blocks:
        block.close()

    async def serve(ticket: Ticket[str]) -> None:
        await ticket.granted()
        ticket.close()

    with trio.fail_after(5):
        async with trio.open_nursery() as clients:
            for ticket in tickets:
                clients.start_soon(serve, ticket)
    assert [len(node.servers[name].servers) for name in ("gpu:0+gpu:1", "gpu:1+gpu:0")] in ([0, 1], [1, 0])


async def test_when_its_last_request_leaves_while_it_waits_it_gives_back_what_it_holds(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node = node_of()
    await node.start(nursery)
    busy = node.lanes["gpu:1"].submit("busy", "a")
    await busy.granted()
    wide = node.scheduler.admit("wide", "wide")
    await trio.sleep(1)
    assert node.lanes["gpu:0"].held_for == ["wide"]
    other = node.lanes["gpu:0"].submit("other", "b")
    await trio.sleep(1)
    wide.close()
    await other.granted()
    assert node.lanes["gpu:0"].held_for == []
    for ticket in (busy, other):
        ticket.close()


async def test_an_urgent_request_on_one_device_ends_the_spanning_models_turn(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node = node_of()
    await node.start(nursery)
    first = node.scheduler.admit("first", "wide")
    await first.granted()
    urgent = node.lanes["gpu:1"].submit("urgent", "b", Priority.INTERACTIVE)
    second = node.scheduler.admit("second", "wide")
    await trio.sleep(1)
    assert second.lease is None
    first.close()
    await urgent.granted()
    urgent.close()
    await second.granted()
    second.close()


async def test_requests_for_it_pass_older_ones_for_the_fairness_bound_at_most(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node = node_of()
    await node.start(nursery)
    zeroth = node.scheduler.admit("zeroth", "wide")
    await zeroth.granted()
    other = node.lanes["gpu:1"].submit("other", "b")
    began = trio.current_time()

    async def keep_busy() -> None:
        while True:
            ticket = node.scheduler.admit("busy", "wide")
            await ticket.granted()
            await trio.sleep(0.7)
            ticket.close()

    nursery.start_soon(keep_busy)
    await wait_all_tasks_blocked()
    zeroth.close()
    await other.granted()
    # As on one device: once it was passed for a third of the bound, it is more urgent than they are.
    assert 10.0 / 3 <= trio.current_time() - began <= 10.0 / 3 + 2 * 0.7 + 1.0
    nursery.cancel_scope.cancel()


async def test_first_come_is_first_served_across_devices(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    node = node_of(replace(RULES, policy=FirstCome()))
    await node.start(nursery)
    served: list[str] = []

    async def client(name: str, at: float, device_id: str, model_id: str) -> None:
        await trio.sleep(at)
        ticket = node.lanes[device_id].submit(name, model_id)
        await ticket.granted()
        served.append(name)
        await trio.sleep(3)
        ticket.close()

    async with trio.open_nursery() as clients:
        for number, (device_id, model_id) in enumerate(2 * [("gpu:1", "b"), (BOTH, "wide")]):
            clients.start_soon(client, str(number), number / 10, device_id, model_id)
    assert served == ["0", "1", "2", "3"]


async def test_beside_a_spanning_model_another_stays_where_there_is_room_for_both(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node = node_of(replace(RULES, max_models=2, concurrent_models=True))
    await node.start(nursery)
    for device_id, model_id in (("gpu:1", "b"), (BOTH, "wide")):
        ticket = node.lanes[device_id].submit(model_id, model_id)
        await ticket.granted()
        ticket.close()
    wide, beside = node.scheduler.admit("wide", "wide"), node.lanes["gpu:1"].submit("b", "b")
    assert wide.lease is not None
    assert beside.lease is not None, "both serve at once"
    third = node.lanes["gpu:1"].submit("c", "c")
    await trio.sleep(5)
    assert third.lease is None, "both are in use"
    beside.close()
    await third.granted()
    assert node.servers["gpu:1"].history == ["start b", "stop b", "start c"]
    for ticket in (wide, third):
        ticket.close()


async def test_a_spanning_server_that_is_idle_is_unloaded_by_its_own_lane_only(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node = SpanningNode(RULES, {"wide": ("gpu:0", "gpu:1")}, make=lambda: FakeServers(idle_unload_s=5.0), count=2)
    await node.start(nursery)
    ticket = node.scheduler.admit("wide", "wide")
    await ticket.granted()
    await trio.sleep(50)
    assert node.servers[BOTH].servers["wide"].state is ServerState.READY
    ticket.close()
    await trio.sleep(5.1)
    assert node.servers[BOTH].history == ["start wide", "stop wide"]


async def test_a_spanning_model_is_refused_if_a_pinned_one_leaves_no_room_on_a_member(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node = node_of()
    node.servers["gpu:1"].pinned = {"a"}
    await node.start(nursery)
    pinned = node.lanes["gpu:1"].submit("pinned", "a")
    await pinned.granted()
    pinned.close()
    wide = node.scheduler.admit("wide", "wide")
    with pytest.raises(BackendUnavailable, match="gpu:1: pinned models leave no room for it"):
        await wide.granted()
    await trio.sleep(1)
    assert [lane.held_for for lane in node.devices.values()] == [[], []]
    assert node.lanes[BOTH].loading is None
    assert node.lanes[BOTH].admitted == 0


async def test_a_spanning_model_that_runs_out_of_memory_is_refused_and_gives_its_devices_back(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    node = node_of()
    node.servers[BOTH].total_bytes, node.servers[BOTH].needs = 5, {"wide": 7}
    await node.start(nursery)
    wide = node.scheduler.admit("wide", "wide")
    await trio.sleep(0.5)
    narrow = node.lanes["gpu:0"].submit("narrow", "a")
    with pytest.raises(OutOfDeviceMemory):
        await wide.granted()
    await narrow.granted()
    narrow.close()
    assert [lane.held_for for lane in node.devices.values()] == [[], []]
