"""A lane whose device has several models loaded, in virtual time, over servers that are a table."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.checked_policy import CheckedPolicy
from fakes.servers import FakeServers
from nodeagent.errors import BackendUnavailable
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.lease import TicketState
from nodeagent.scheduling.queueing import FirstCome, Policy
from nodeagent.scheduling.swap_aware import SwapAware

RULES = LaneRules(
    max_pending=20,
    queue_timeout_s=1000,
    startup_timeout_s=30,
    max_models=2,
    concurrent_models=True,
    policy=CheckedPolicy(SwapAware()),
)

Start = Callable[..., Awaitable[tuple[Lane[str], FakeServers]]]


@pytest.fixture
def start(nursery: trio.Nursery) -> Start:
    async def started(servers: FakeServers | None = None, **rules: object) -> tuple[Lane[str], FakeServers]:
        servers = servers or FakeServers()
        lane: Lane[str] = Lane("cpu:0", servers, replace(RULES, **rules))
        servers.on_change = lane.nudge
        await nursery.start(lane.run)
        return lane, servers

    return started


async def serve(lane: Lane[str], model_id: str, for_s: float) -> float:
    """One request; returns how long it waited."""
    began = trio.current_time()
    ticket = lane.submit("", model_id)
    try:
        await ticket.granted()
        waited_s = trio.current_time() - began
        await trio.sleep(for_s)
    finally:
        ticket.close()
    return waited_s


@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize("policy", [SwapAware(), FirstCome()])
async def test_models_that_are_loaded_are_not_loaded_again(
    start: Start, concurrent: bool, policy: Policy, autojump_clock: MockClock
) -> None:
    lane, servers = await start(concurrent_models=concurrent, policy=CheckedPolicy(policy))
    for _round in range(5):
        await serve(lane, "a", 0.1)
        await serve(lane, "b", 0.1)
    assert servers.history == ["start a", "start b"]


@pytest.mark.parametrize("policy", [SwapAware(), FirstCome()])
async def test_a_request_for_one_model_does_not_wait_for_a_long_one_on_another(
    start: Start, policy: Policy, autojump_clock: MockClock
) -> None:
    lane, _servers = await start(policy=CheckedPolicy(policy))
    await serve(lane, "embed", 0.1)
    chat = lane.submit("", "chat")
    await chat.granted()
    assert await serve(lane, "embed", 0.1) == 0


@pytest.mark.parametrize("policy", [SwapAware(), FirstCome()])
async def test_by_default_one_model_at_a_time_is_in_use(
    start: Start, policy: Policy, autojump_clock: MockClock
) -> None:
    lane, servers = await start(policy=CheckedPolicy(policy), concurrent_models=False)
    for model_id in ("embed", "chat"):
        await serve(lane, model_id, 0.1)
    chat = lane.submit("", "chat")
    await chat.granted()
    embed = lane.submit("", "embed")
    with trio.move_on_after(5):
        await embed.granted()
    assert embed.state is TicketState.WAITING
    chat.close()
    await embed.granted()
    assert servers.history == ["start embed", "start chat"]


async def test_in_turn_models_that_are_both_loaded_go_by_the_order_of_their_requests(
    start: Start, autojump_clock: MockClock
) -> None:
    lane, _servers = await start(FakeServers(slots=2), concurrent_models=False)
    for model_id in ("a", "b"):
        await serve(lane, model_id, 0.1)
    order: list[str] = []

    async def client(name: str, model_id: str) -> None:
        await serve(lane, model_id, 1.0)
        order.append(name)

    async with trio.open_nursery() as clients:
        for number, model_id in enumerate("abab"):
            clients.start_soon(client, f"{model_id}{number}", model_id)
            await wait_all_tasks_blocked()
    assert order == ["a0", "b1", "a2", "b3"]


async def test_the_model_that_was_idle_the_longest_gives_way(start: Start, autojump_clock: MockClock) -> None:
    lane, servers = await start()
    for model_id in ("a", "b", "a", "c", "b"):
        await serve(lane, model_id, 0.1)
        await trio.sleep(10)
    assert servers.history == ["start a", "start b", "stop b", "start c", "stop a", "start b"]


async def test_a_model_that_does_not_fit_beside_the_others_takes_the_place_of_one(
    start: Start, autojump_clock: MockClock
) -> None:
    lane, servers = await start(FakeServers(sizes={"a": 2, "b": 2, "big": 3}, total_bytes=5), max_models=9)
    for model_id in ("a", "b", "big"):
        await serve(lane, model_id, 0.1)
        await trio.sleep(1)
    assert servers.history == ["start a", "start b", "stop a", "start big"]


async def test_a_pinned_model_stays(start: Start, autojump_clock: MockClock) -> None:
    lane, servers = await start(FakeServers(pinned={"a"}))
    for model_id in ("a", "b", "c", "a"):
        await serve(lane, model_id, 0.1)
        await trio.sleep(10)
    assert servers.history == ["start a", "start b", "stop b", "start c"]


async def test_a_load_does_not_hold_up_those_who_are_loaded(start: Start, autojump_clock: MockClock) -> None:
    lane, servers = await start(FakeServers(load_s=10))
    await serve(lane, "a", 0.1)
    load = lane.submit("", "b")
    await trio.sleep(1)
    assert lane.loading == "b"
    assert await serve(lane, "a", 0.1) == 0
    await load.granted()
    assert servers.history == ["start a", "start b"]


async def test_a_load_that_a_request_waits_for_is_not_called_off_for_another(
    start: Start, autojump_clock: MockClock
) -> None:
    lane, servers = await start(FakeServers(load_s=10), max_models=3)
    async with trio.open_nursery() as clients:
        for model_id in ("a", "b", "c"):
            clients.start_soon(serve, lane, model_id, 0.1)
            await trio.sleep(1)
    assert servers.history == ["start a", "start b", "start c"]


async def test_nothing_more_is_granted_on_models_that_have_to_give_way(start: Start, autojump_clock: MockClock) -> None:
    """Two residents that are kept busy in turns, so that at no time both are idle: the third is served all the same."""
    lane, servers = await start(FakeServers(slots=2, sizes={"big": 4, "a": 2, "b": 2}, total_bytes=4))
    waited_s: list[float] = []

    async def keep_busy(model_id: str) -> None:
        while not waited_s:
            await serve(lane, model_id, 3.0)

    async with trio.open_nursery() as clients:
        for model_id in ("a", "b"):
            for _client in range(2):
                clients.start_soon(keep_busy, model_id)
                await trio.sleep(1.5)
        waited_s.append(await serve(lane, "big", 0.1))
    turn_s = 8 * servers.load_s
    assert waited_s[0] <= turn_s + 3.0 + servers.load_s + 0.1


async def test_the_expected_starts_count_what_is_loaded(start: Start, autojump_clock: MockClock) -> None:
    lane, _servers = await start()
    lane.times.loaded("c", 4.0)
    for model_id in ("a", "b"):
        await serve(lane, model_id, 1.0)
    running = lane.submit("", "a")
    await running.granted()
    waiting = [lane.submit("", "a"), lane.submit("", "c")]
    await wait_all_tasks_blocked()
    starts = {ticket.model_id: starts_in_s for ticket, starts_in_s in lane.expected_starts()}
    assert starts == {"a": pytest.approx(1.0), "c": pytest.approx(4.0)}, "b gives way to c at once"
    for ticket in waiting:
        ticket.close()


async def test_a_model_that_was_displaced_returns_once_the_other_one_was_idle_for_its_time(
    start: Start, autojump_clock: MockClock
) -> None:
    lane, servers = await start(FakeServers(returning={"home"}), max_models=1)
    for model_id in ("home", "big"):
        await serve(lane, model_id, 0.1)
    await trio.sleep(1000)
    assert servers.history == ["start home", "stop home", "start big"], "big has no limit"
    servers.idle_unload_s = 10
    for model_id in ("other", "big"):  # in this order, so that both know their limit
        await serve(lane, model_id, 0.1)
    await trio.sleep(1000)
    assert servers.history[-3:] == ["stop big", "start home", "stop home"], "it has a limit too, and was not used"
    assert lane.is_idle


async def test_a_displaced_model_that_a_request_has_loaded_again_is_not_loaded_twice(
    start: Start, autojump_clock: MockClock
) -> None:
    lane, servers = await start(FakeServers(returning={"home"}, idle_unload_s=10), max_models=1)
    for model_id in ("home", "big", "home"):
        await serve(lane, model_id, 0.1)
    await trio.sleep(1000)
    assert servers.history == ["start home", "stop home", "start big", "stop big", "start home", "stop home"]


async def test_preloads_go_where_there_is_room(start: Start, autojump_clock: MockClock) -> None:
    lane, servers = await start()
    lane.preload("a")
    lane.preload("b")
    await trio.sleep(5)
    assert servers.history == ["start a", "start b"]


@pytest.mark.parametrize("policy", [SwapAware(), FirstCome()])
async def test_of_two_models_that_are_kept_busy_one_gives_way_to_a_third(
    start: Start, policy: Policy, autojump_clock: MockClock
) -> None:
    """Which of the two it is must not change each time that a request on one of them ends: then neither became idle."""
    lane, servers = await start(FakeServers(slots=2), policy=CheckedPolicy(policy))
    for model_id in ("a", "b"):
        await serve(lane, model_id, 0.1)
    served = trio.Event()

    async def keep_busy(model_id: str) -> None:
        while not served.is_set():
            await serve(lane, model_id, 4.0)

    async with trio.open_nursery() as clients:
        for delay_s, model_id in ((1.0, "a"), (1.0, "b"), (1.0, "a"), (1.0, "b")):
            clients.start_soon(keep_busy, model_id)
            await trio.sleep(delay_s)
        with trio.move_on_after(100):
            waited_s = await serve(lane, "c", 0.1)
            served.set()
        assert served.is_set(), "never served"
        clients.cancel_scope.cancel()
    turn_s = 8 * servers.load_s
    assert waited_s <= turn_s + 4.0 + servers.load_s + 0.1


@pytest.mark.parametrize("policy", [SwapAware(), FirstCome()])
@pytest.mark.parametrize("concurrent", [True, False])
async def test_a_request_that_a_pinned_model_has_come_before_is_refused_at_once(
    start: Start, policy: Policy, concurrent: bool, autojump_clock: MockClock
) -> None:
    lane, _servers = await start(
        FakeServers(pinned={"a"}), max_models=1, concurrent_models=concurrent, policy=CheckedPolicy(policy)
    )
    async with trio.open_nursery() as clients:
        clients.start_soon(serve, lane, "a", 5.0)
        await wait_all_tasks_blocked()
        b = lane.submit("", "b")  # it could have been first
        with pytest.raises(BackendUnavailable) as caught:
            await b.granted()
        b.close()
        assert trio.current_time() < 5
    assert caught.value.reason == "cpu:0: pinned models leave no room for it"
    assert await serve(lane, "a", 0.1) == 0


async def test_a_request_that_pinned_models_leave_no_memory_for_is_refused_at_once(
    start: Start, autojump_clock: MockClock
) -> None:
    lane, servers = await start(FakeServers(sizes={"a": 2, "b": 3}, total_bytes=6, pinned={"a"}))
    await serve(lane, "a", 0.1)
    servers.total_bytes = 4  # another program takes memory
    with pytest.raises(BackendUnavailable):
        await serve(lane, "b", 0.1)
    assert trio.current_time() < 5
    servers.total_bytes = 6
    await serve(lane, "b", 0.1)


async def test_once_fewer_models_may_be_loaded_those_that_are_too_many_go_when_they_are_idle(
    start: Start, autojump_clock: MockClock
) -> None:
    lane, servers = await start(FakeServers(pinned={"home"}), max_models=4)
    for model_id in ("home", "a", "b", "c"):
        await serve(lane, model_id, 0.1)
        await trio.sleep(1)
    busy = lane.submit("", "a")
    await busy.granted()
    lane.rules = replace(lane.rules, max_models=2)
    lane.nudge()
    await trio.sleep(10)
    assert set(servers.servers) == {"home", "a"}, "a is in use"
    lane.rules = replace(lane.rules, max_models=1)
    lane.nudge()
    await trio.sleep(10)
    assert set(servers.servers) == {"home", "a"}
    busy.close()
    await trio.sleep(10)
    assert set(servers.servers) == {"home"}
