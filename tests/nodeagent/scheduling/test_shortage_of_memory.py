"""A load that runs out of a device's memory: others make room for one more try, or another device takes over."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.checked_policy import CheckedPolicy
from fakes.servers import FakeServers
from nodeagent.errors import OutOfDeviceMemory
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.queueing import FirstCome, Policy
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.scheduling.swap_aware import SwapAware

RULES = LaneRules(
    max_pending=20,
    queue_timeout_s=1000,
    startup_timeout_s=30,
    max_models=4,
    concurrent_models=True,
    policy=CheckedPolicy(SwapAware()),
)

Start = Callable[..., Awaitable[Scheduler[str]]]


@pytest.fixture
def start(nursery: trio.Nursery) -> Start:
    async def started(*devices: FakeServers, **rules: object) -> Scheduler[str]:
        own = replace(RULES, **rules)
        lanes = {f"gpu:{number}": Lane(f"gpu:{number}", servers, own) for number, servers in enumerate(devices)}
        scheduler: Scheduler[str] = Scheduler(lanes, dict(zip(lanes, devices, strict=True)))
        for lane, servers in zip(lanes.values(), devices, strict=True):
            servers.on_change = lane.nudge
            await nursery.start(lane.run)
        return scheduler

    return started


def gpu(needs: int) -> FakeServers:
    """10 GB; `small` and `other` take 3 and 2, and `big` is thought to take 4 beside them."""
    return FakeServers(sizes={"small": 3, "other": 2, "big": 4}, needs={"big": needs}, total_bytes=10)


async def serve(scheduler: Scheduler[str], model_id: str, for_s: float = 0.1) -> str:
    """One whole request; returns the device."""
    ticket = scheduler.admit("r", model_id)
    try:
        device_id = (await ticket.granted()).device_id
        await trio.sleep(for_s)
    finally:
        ticket.close()
    return device_id


async def load_small_and_other(scheduler: Scheduler[str]) -> None:
    for model_id in ("small", "other"):
        await serve(scheduler, model_id)
        await trio.sleep(1)


@pytest.mark.parametrize("policy", [SwapAware(), FirstCome()])
@pytest.mark.parametrize("concurrent", [True, False])
async def test_the_smallest_set_that_is_enough_gives_way_and_the_load_is_tried_once_more(
    start: Start, policy: Policy, concurrent: bool, autojump_clock: MockClock
) -> None:
    servers = gpu(needs=7)
    scheduler = await start(servers, policy=CheckedPolicy(policy), concurrent_models=concurrent)
    await load_small_and_other(scheduler)
    assert await serve(scheduler, "big") == "gpu:0"
    tried = ["start big", "big runs out of memory", "stop small", "start big"]
    assert servers.history == ["start small", "start other", *tried]


async def test_a_second_try_that_fails_is_the_last_one(start: Start, autojump_clock: MockClock) -> None:
    servers = gpu(needs=11)
    scheduler = await start(servers)
    await load_small_and_other(scheduler)
    with pytest.raises(OutOfDeviceMemory) as caught:
        await serve(scheduler, "big")
    assert caught.value.reason == "out of device memory: 8 free"
    assert servers.history.count("big runs out of memory") == 2
    assert await serve(scheduler, "other") == "gpu:0"
    assert "stop other" not in servers.history, "no more of them than looked like enough"


async def test_a_model_that_ran_out_with_the_device_to_itself_is_not_tried_again(
    start: Start, autojump_clock: MockClock
) -> None:
    servers = gpu(needs=11)
    scheduler = await start(servers)
    with pytest.raises(OutOfDeviceMemory):
        await serve(scheduler, "big")
    assert servers.history == ["start big", "big runs out of memory"]


async def test_models_in_use_and_pinned_ones_do_not_give_way(start: Start, autojump_clock: MockClock) -> None:
    servers = gpu(needs=6)
    servers.pinned.add("other")
    scheduler = await start(servers)
    await load_small_and_other(scheduler)
    async with trio.open_nursery() as clients:
        clients.start_soon(serve, scheduler, "small", 50.0)
        await trio.sleep(1)
        assert await serve(scheduler, "big") == "gpu:0"
        assert trio.current_time() > 50, "it waited for the end of the request"
    assert servers.history[-3:] == ["big runs out of memory", "stop small", "start big"]


async def test_all_requests_for_the_model_go_on_waiting_and_others_are_served_meanwhile(
    start: Start, autojump_clock: MockClock
) -> None:
    servers = gpu(needs=7)
    scheduler = await start(servers)
    await load_small_and_other(scheduler)
    served: list[str] = []

    async def client(model_id: str) -> None:
        served.append(await serve(scheduler, model_id))

    async with trio.open_nursery() as clients:
        for model_id in ("big", "big", "other", "big"):
            clients.start_soon(client, model_id)
    assert served == ["gpu:0"] * 4
    assert servers.history.count("start big") == 2


async def test_another_device_takes_over_the_requests_if_nothing_can_give_way(
    start: Start, autojump_clock: MockClock
) -> None:
    first, second = gpu(needs=11), gpu(needs=11)
    second.total_bytes = 20
    scheduler = await start(first, second)
    devices: list[str] = []

    async def client() -> None:
        devices.append(await serve(scheduler, "big"))

    async with trio.open_nursery() as clients:
        clients.start_soon(client)
        clients.start_soon(client)
    assert devices == ["gpu:1", "gpu:1"]
    assert (first.history, second.history) == (["start big", "big runs out of memory"], ["start big"])
    assert all(lane.is_idle for lane in scheduler.lanes.values())


async def test_a_device_that_has_less_than_the_model_is_known_to_need_is_not_tried(
    start: Start, autojump_clock: MockClock
) -> None:
    first, second = gpu(needs=11), gpu(needs=11)
    second.total_bytes = 9
    scheduler = await start(first, second)
    with pytest.raises(OutOfDeviceMemory):
        await serve(scheduler, "big")
    assert second.history == []


async def test_an_operators_load_makes_room_too_and_stays_on_its_device(
    start: Start, autojump_clock: MockClock
) -> None:
    first, second = gpu(needs=7), gpu(needs=7)
    scheduler = await start(first, second)
    await load_small_and_other(scheduler)
    for lane in scheduler.lanes.values():
        load = lane.request_load("big")
        await load.granted()
        load.close()
    first.needs["big"], first.sizes["big"] = 11, 4
    await first.stop("big")
    load = scheduler.lanes["gpu:0"].request_load("big")
    with pytest.raises(OutOfDeviceMemory):
        await load.granted()
    load.close()
    assert "start big" in second.history


async def test_a_preload_that_runs_out_of_memory_unloads_nobody(start: Start, autojump_clock: MockClock) -> None:
    servers = gpu(needs=7)
    scheduler = await start(servers)
    await load_small_and_other(scheduler)
    scheduler.lanes["gpu:0"].preload("big")
    await trio.sleep(10)
    assert servers.history[-2:] == ["start big", "big runs out of memory"]
