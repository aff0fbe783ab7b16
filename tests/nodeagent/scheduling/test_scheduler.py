"""Several lanes in virtual time: where requests go, and where they go when that turns out worse than thought."""

import math

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.servers import FakeServers
from nodeagent.errors import BackendUnavailable, QueueFull
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.lease import TicketState
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.scheduling.seam import Obstacle

RULES = LaneRules(max_pending=8, queue_timeout_s=1000, startup_timeout_s=100)


@pytest.fixture
async def devices() -> dict[str, FakeServers]:
    return {"gpu:0": FakeServers(load_s=5), "gpu:1": FakeServers(load_s=5)}


@pytest.fixture
async def scheduler(devices: dict[str, FakeServers], nursery: trio.Nursery) -> Scheduler[str]:
    lanes = {device_id: Lane(device_id, servers, RULES) for device_id, servers in devices.items()}
    scheduler: Scheduler[str] = Scheduler(lanes, devices)
    for device_id, servers in devices.items():
        servers.on_change = lanes[device_id].nudge
        await nursery.start(lanes[device_id].run)
    return scheduler


async def serve(scheduler: Scheduler[str], model_id: str, for_s: float) -> str:
    """One whole request; returns the device."""
    ticket = scheduler.admit("r", model_id)
    lease = await ticket.granted()
    await trio.sleep(for_s)
    ticket.close()
    return lease.device_id


async def test_two_models_get_a_device_each(scheduler: Scheduler[str], autojump_clock: MockClock) -> None:
    tickets = [scheduler.admit("r", model_id) for model_id in "ab"]
    assert [(await ticket.granted()).device_id for ticket in tickets] == ["gpu:0", "gpu:1"]
    assert trio.current_time() == pytest.approx(5)


async def test_a_model_goes_where_it_is_loaded_while_the_queue_there_is_short(
    scheduler: Scheduler[str], autojump_clock: MockClock
) -> None:
    await serve(scheduler, "a", 1)
    tickets = [scheduler.admit("r", "a") for _ in range(3)]
    assert {ticket.lane.device_id for ticket in tickets} == {"gpu:0"}


async def test_a_long_queue_pays_for_a_second_copy(scheduler: Scheduler[str], autojump_clock: MockClock) -> None:
    await serve(scheduler, "a", 4)  # measured: 5 s a load, 4 s a request
    tickets = [scheduler.admit("r", "a") for _ in range(4)]
    assert [ticket.lane.device_id for ticket in tickets] == ["gpu:0", "gpu:0", "gpu:1", "gpu:0"]


async def test_an_idle_device_takes_over_what_waits_elsewhere_longer_than_expected(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    for lane in scheduler.lanes.values():
        lane.times.served("a", 1)
        lane.times.loaded("a", 5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, scheduler, "b", 20)  # keeps one device
        await trio.sleep(0.1)
        running, waiting, last = (scheduler.admit("r", "a") for _ in range(3))
        assert {ticket.lane.device_id for ticket in (running, waiting, last)} == {"gpu:1"}
        await running.granted()  # and takes very long, so that the others would be better off elsewhere
        lease = await last.granted()
        assert lease.device_id == "gpu:0"
        # b is done, nobody came back for it, and a is loaded in its place.
        assert trio.current_time() == pytest.approx(25 + 5)
        last.close()
        assert (await waiting.granted()).device_id == "gpu:0"
    assert devices["gpu:0"].history == ["start b", "stop b", "start a"]


async def test_nothing_moves_to_a_device_that_can_not_take_it(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    devices["gpu:1"].obstacles["a"] = Obstacle("too small")
    running, waiting = scheduler.admit("r", "a"), scheduler.admit("r", "a")
    await running.granted()
    await serve(scheduler, "b", 1)
    await trio.sleep(50)
    assert waiting.state is TicketState.WAITING
    assert waiting.lane.device_id == "gpu:0"


async def test_nothing_moves_to_where_another_copy_does_not_fit(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    devices["gpu:1"].room = False
    running, waiting = scheduler.admit("r", "a"), scheduler.admit("r", "a")
    await running.granted()
    await trio.sleep(100)
    assert waiting.state is TicketState.WAITING
    assert devices["gpu:1"].history == []


async def test_a_request_whose_server_died_is_tried_again_on_a_device_that_is_free(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    for lane in scheduler.lanes.values():
        lane.preload("a")
    await trio.sleep(6)
    ticket = scheduler.admit("r", "a")
    crashed = devices[(await ticket.granted()).device_id]
    began = trio.current_time()
    crashed.crash()
    scheduler.requeue(ticket)
    assert (await ticket.granted()).device_id == "gpu:1"
    assert trio.current_time() == began


async def test_preloads_have_a_device_each_and_then_share(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    assert scheduler.preload(["a", "b", "c"]) == ["c"]
    for lane in scheduler.lanes.values():
        lane.rules = replace(lane.rules, max_models=2)
    devices["gpu:1"].obstacles["d"] = Obstacle("does not fit")
    assert scheduler.preload(["d", "e", "f"]) == []
    await trio.sleep(60)
    assert devices["gpu:0"].servers.keys() >= {"d"}
    assert all(len(device.servers) == 2 for device in devices.values())


async def test_a_request_for_a_model_that_is_loaded_beside_another_goes_there(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    for lane in scheduler.lanes.values():
        lane.rules = replace(lane.rules, max_models=2, concurrent_models=True)
        lane.preload("a")
    scheduler.lanes["gpu:1"].preload("b")
    await trio.sleep(60)
    busy = [scheduler.admit("", "a") for _device in devices]
    assert scheduler.place("b") == "gpu:1"
    ticket = scheduler.admit("", "b")
    assert ticket.state is TicketState.GRANTED
    for other in (*busy, ticket):
        other.close()


async def test_when_every_lane_is_full_the_soonest_place_is_told(
    scheduler: Scheduler[str], autojump_clock: MockClock
) -> None:
    for lane in scheduler.lanes.values():
        lane.rules = replace(RULES, max_pending=1)
    tickets = [scheduler.admit("r", "a"), scheduler.admit("r", "a")]
    with pytest.raises(QueueFull) as refused:
        scheduler.admit("r", "a")
    assert refused.value.retry_after_s == pytest.approx(2 + 2)
    for ticket in tickets:
        await ticket.granted()


async def test_no_device_at_all_says_why(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    for servers in devices.values():
        servers.obstacles["a"] = Obstacle("too small")
    with pytest.raises(BackendUnavailable, match="gpu:0: too small; gpu:1: too small"):
        scheduler.admit("r", "a")


async def test_a_request_looks_at_the_servers_a_few_times_and_not_at_every_step(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    await serve(scheduler, "a", 1)
    before = devices["gpu:0"].looks
    await serve(scheduler, "a", 1)
    # Once to place it, once in the lane's turn that grants it, once in the turn after its end.
    assert devices["gpu:0"].looks - before <= 3


async def test_an_empty_queue_costs_nothing_to_forecast(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    ticket = scheduler.admit("r", "a")
    await ticket.granted()
    before = devices["gpu:0"].looks
    assert scheduler.lanes["gpu:0"].expected_starts() == []
    assert devices["gpu:0"].looks == before
    ticket.close()


async def test_an_admission_wakes_only_lanes_that_could_serve_the_request(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    devices["gpu:1"].obstacles["a"] = Obstacle("too small")
    woken = []
    idle = scheduler.lanes["gpu:1"]
    idle.on_idle = lambda: woken.append("gpu:1") or math.inf  # type: ignore[func-returns-value]
    await serve(scheduler, "a", 1)
    assert woken == []
    del devices["gpu:1"].obstacles["a"]
    granted = scheduler.admit("r", "a")
    await trio.sleep(0.1)
    assert granted.state is TicketState.GRANTED
    assert woken == [], "nobody needs help"
    scheduler.admit("r", "a")
    await trio.sleep(0.1)
    assert woken == ["gpu:1"]


async def test_of_devices_that_serve_a_request_at_once_the_one_of_its_conversation_is_taken_else_the_least_used(
    scheduler: Scheduler[str], devices: dict[str, FakeServers], autojump_clock: MockClock
) -> None:
    for device_id, servers in devices.items():
        servers.slots = 4
        await scheduler.lanes[device_id].request_load("a").granted()
    scheduler.conversations.served("c", "gpu:1")
    held = [scheduler.admit("r", "a", conversation=conversation) for conversation in ("c", "c", None, None, None)]
    assert [ticket.lane.device_id for ticket in held] == ["gpu:1", "gpu:1", "gpu:0", "gpu:0", "gpu:0"]
    assert all(ticket.state is TicketState.GRANTED for ticket in held)


async def test_a_preload_that_would_evict_another_one_is_left_over(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    servers = {
        "gpu:0": FakeServers(sizes={"a": 3, "b": 3, "c": 2}, total_bytes=5),
        "gpu:1": FakeServers(sizes={"a": 3, "b": 3, "c": 2}, total_bytes=4),
    }
    lanes = {device_id: Lane(device_id, own, replace(RULES, max_models=3)) for device_id, own in servers.items()}
    scheduler: Scheduler[str] = Scheduler(lanes, servers)
    for device_id, lane in lanes.items():
        servers[device_id].on_change = lane.nudge
        await nursery.start(lane.run)
    servers["gpu:0"].sizes["d"] = servers["gpu:1"].sizes["d"] = 3
    assert scheduler.preload(["a", "b", "d", "c"]) == ["d"]
    await trio.sleep(10)
    assert servers["gpu:0"].history == ["start a", "start c"]
    assert servers["gpu:1"].history == ["start b"]
