"""A lane in virtual time, over servers that are a table."""

from collections.abc import Collection

import pytest
import trio
import trio.testing
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.servers import FakeServers
from nodeagent.errors import BackendUnavailable, ModelLoadTimeout, QueueFull, QueueTimeout, RequestCancelled
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.lease import Ticket, TicketState
from nodeagent.scheduling.queueing import FirstCome, Priority
from nodeagent.scheduling.seam import MakeRoom

RULES = LaneRules(max_pending=3, queue_timeout_s=100, startup_timeout_s=30)


@pytest.fixture
async def servers() -> FakeServers:
    return FakeServers()


@pytest.fixture
async def lane(servers: FakeServers, nursery: trio.Nursery) -> Lane[str]:
    lane = Lane("cpu:0", servers, RULES)
    servers.on_change = lane.nudge
    await nursery.start(lane.run)
    return lane


async def serve(ticket: Ticket[str], for_s: float) -> None:
    await ticket.granted()
    await trio.sleep(for_s)
    ticket.close()


async def test_the_first_request_loads_its_model_and_is_granted(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    ticket = lane.submit("r1", "a")
    lease = await ticket.granted()
    assert (lease.device_id, lease.model_id, lease.generation, lease.endpoint) == ("cpu:0", "a", 1, "a#1")
    assert trio.current_time() == pytest.approx(1.0)
    assert lease.load_s == pytest.approx(1.0)
    assert lease.queued_s == pytest.approx(0.0)


async def test_a_request_is_granted_as_it_is_submitted_if_nothing_is_in_its_way(
    servers: FakeServers, lane: Lane[str], autojump_clock: MockClock
) -> None:
    servers.slots = 2
    await lane.submit("r1", "a").granted()
    beside = lane.submit("r2", "a")
    assert (beside.state, lane.view().in_flight) == (TicketState.GRANTED, 2)
    no_slot = lane.submit("r3", "a")
    assert no_slot.state is TicketState.WAITING
    no_slot.close()
    await trio.testing.wait_all_tasks_blocked()
    looks = servers.looks
    beside.close()
    await trio.testing.wait_all_tasks_blocked()
    assert servers.looks == looks, "its task has nothing to do while another request runs on the model"


async def test_a_request_that_needs_no_slot_waits_for_none_and_keeps_its_server(
    servers: FakeServers, lane: Lane[str], autojump_clock: MockClock
) -> None:
    lane.rules = replace(RULES, max_pending=9)
    running = lane.submit("r1", "a")
    await running.granted()
    count = lane.submit("r2", "a", slots=0)
    assert count.state is TicketState.GRANTED
    waiting = lane.submit("r2", "a")
    another = lane.submit("r2", "a", slots=0)
    assert (waiting.state, another.state) == (TicketState.WAITING, TicketState.GRANTED)
    assert waiting.passed_since is None
    for ticket in (waiting, another):
        ticket.close()
    running.close()
    other = lane.submit("r3", "b")
    await trio.sleep(5)
    assert (other.state, servers.history) == (TicketState.WAITING, ["start a"])
    served_s = lane.times.service_s("a")
    count.close()
    assert lane.times.service_s("a") == served_s, "it says nothing of how long a slot is in use"
    await other.granted()


async def test_a_request_that_could_be_granted_does_not_pass_those_that_are_queued(
    servers: FakeServers, lane: Lane[str], autojump_clock: MockClock
) -> None:
    servers.slots = 2
    lane.rules = replace(RULES, policy=FirstCome())
    await lane.submit("r1", "a").granted()
    queued, later = lane.submit("r2", "b"), lane.submit("r3", "a")
    await trio.testing.wait_all_tasks_blocked()
    assert (queued.state, later.state) == (TicketState.WAITING, TicketState.WAITING)


async def test_one_is_in_flight_and_the_others_follow_in_order(lane: Lane[str], autojump_clock: MockClock) -> None:
    order: list[str] = []

    async def client(name: str) -> None:
        ticket = lane.submit(name, "a")
        await ticket.granted()
        order.append(name)
        assert lane.view().in_flight == 1
        await trio.sleep(1)
        ticket.close()

    async with trio.open_nursery() as clients:
        for name in ("r1", "r2", "r3"):
            clients.start_soon(client, name)
            await trio.sleep(0.01)
    assert order == ["r1", "r2", "r3"]
    assert lane.admitted == 0


async def test_the_bound_counts_before_the_lanes_task_has_run(lane: Lane[str], autojump_clock: MockClock) -> None:
    tickets = [lane.submit(f"r{number}", "a") for number in range(3)]  # no await between: one scheduling turn
    with pytest.raises(QueueFull) as refused:
        lane.submit("r4", "a")
    assert refused.value.limit == 3
    tickets[0].close()
    lane.submit("r5", "a")


async def test_slots_of_the_model_run_side_by_side(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.slots = 2
    tickets = [lane.submit(f"r{number}", "a") for number in range(3)]
    await tickets[0].granted()
    await tickets[1].granted()
    await trio.testing.wait_all_tasks_blocked()
    assert tickets[2].state is TicketState.WAITING
    tickets[1].close()
    await tickets[2].granted()


async def test_a_swap_waits_for_the_request_in_flight(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    first, second = lane.submit("r1", "a"), lane.submit("r2", "b")
    async with trio.open_nursery() as clients:
        clients.start_soon(serve, first, 10)
        lease = await second.granted()
    assert servers.history == ["start a", "stop a", "start b"]
    assert servers.prepared == ["b"], "once, while it waited"
    assert trio.current_time() == pytest.approx(12.0)
    assert lease.queued_s == pytest.approx(11.0)
    assert lease.load_s == pytest.approx(1.0)


async def test_first_come_first_served_alternates_models_in_the_order_asked_for(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    lane.rules = replace(RULES, policy=FirstCome())
    async with trio.open_nursery() as clients:
        for number, model_id in enumerate("aba"):
            clients.start_soon(serve, lane.submit(f"r{number}", model_id), 1)
    assert servers.history == ["start a", "stop a", "start b", "stop b", "start a"]


async def test_the_loaded_models_requests_pass_and_who_was_passed_is_next(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    first, other, last = (lane.submit(f"r{number}", model_id) for number, model_id in enumerate("aba"))
    async with trio.open_nursery() as clients:
        for ticket in (first, other, last):
            clients.start_soon(serve, ticket, 1)
        await last.granted()
        assert other.passed_since == trio.current_time()
    assert servers.history == ["start a", "stop a", "start b"]


async def test_an_urgent_request_is_served_before_those_who_came_first(
    lane: Lane[str], autojump_clock: MockClock
) -> None:
    running = lane.submit("r1", "a")
    await running.granted()
    waiting, urgent = lane.submit("r2", "a", Priority.BATCH), lane.submit("r3", "a", Priority.INTERACTIVE)
    running.close()
    await urgent.granted()
    assert waiting.state is TicketState.WAITING


async def test_a_load_that_everyone_has_left_goes_on_for_the_grace_and_then_ends(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.load_s = 60
    lane.rules = replace(RULES, startup_timeout_s=100, abandoned_load_grace_s=20)
    ticket = lane.submit("r1", "a")
    await trio.sleep(5)
    ticket.close()
    await trio.sleep_until(24.9)
    assert servers.history == ["start a"]
    await trio.sleep_until(25.1)
    assert servers.history == ["start a", "stop a"]
    assert lane.is_idle


async def test_a_client_that_comes_back_in_time_finds_the_load_going_on(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.load_s = 60
    lane.rules = replace(RULES, startup_timeout_s=100, abandoned_load_grace_s=20)
    impatient = lane.submit("r1", "a")
    await trio.sleep(5)
    impatient.close()
    await trio.sleep(15)
    await lane.submit("r2", "a").granted()
    assert trio.current_time() == pytest.approx(60)
    assert servers.history == ["start a"]


async def test_a_load_that_everyone_has_left_gives_way_at_once_to_another_model(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.load_s = 60
    impatient = lane.submit("r1", "a")
    await trio.sleep(5)
    impatient.close()
    servers.load_s = 2
    await lane.submit("r2", "b").granted()
    assert trio.current_time() == pytest.approx(7)


async def test_the_queue_is_told_in_the_order_in_which_it_is_expected_to_start(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    await serve(lane.submit("r0", "a"), 4)
    tickets = [lane.submit(f"r{number}", model_id) for number, model_id in enumerate("aba", start=1)]
    await tickets[0].granted()
    await trio.sleep(1)
    queue = lane.queue()
    told = [(it.request_id, it.state, it.position) for it in queue]
    assert told == [("r1", "granted", None), ("r3", "waiting", 1), ("r2", "waiting", 2)]
    # a takes 4 s; of b nothing is measured, so that its load counts as 2 s.
    assert queue[0].starts_in_s is None
    assert [it.starts_in_s for it in queue[1:]] == pytest.approx([3, 3 + 4 + 2])


async def test_a_request_handed_over_keeps_its_age_and_frees_its_place(
    lane: Lane[str], servers: FakeServers, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    other_servers = FakeServers()
    other: Lane[str] = Lane("cpu:1", other_servers, RULES)
    other_servers.on_change = other.nudge
    await nursery.start(other.run)
    running, moved = lane.submit("r1", "a"), lane.submit("r2", "b")
    await running.granted()
    lane.hand_over(moved, other)
    assert (lane.admitted, other.admitted) == (1, 1)
    lease = await moved.granted()
    assert lease.device_id == "cpu:1"
    assert lease.queued_s == pytest.approx(1)
    moved.close()
    assert (lane.admitted, other.admitted) == (1, 0)


async def test_a_model_that_was_loaded_for_somebody_who_comes_back_is_not_unloaded_before_that(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.idle_unload_s, servers.load_s = 0, 35
    with pytest.raises(ModelLoadTimeout) as refused:
        await lane.submit("r1", "a").granted()
    await trio.sleep(refused.value.retry_after_s + 10)
    await serve(lane.submit("r2", "a"), 1)
    await trio.sleep(1)
    assert servers.history == ["start a", "stop a"]


async def test_a_queued_request_is_refused_from_outside_and_one_that_runs_is_not(
    lane: Lane[str], autojump_clock: MockClock
) -> None:
    running, waiting = lane.submit("r1", "a"), lane.submit("r2", "b")
    await running.granted()
    for ticket in (running, waiting):
        lane.refuse(ticket, RequestCancelled(ticket.model_id))
    with pytest.raises(RequestCancelled):
        await waiting.granted()
    assert (lane.admitted, set(lane.wanted), (await running.granted()).model_id) == (1, set(), "a")
    for ticket in (running, waiting):
        ticket.close()
    assert lane.admitted == 0


async def test_a_request_that_leaves_frees_its_place_at_once(lane: Lane[str], autojump_clock: MockClock) -> None:
    running, waiting, last = (lane.submit(f"r{number}", "a") for number in range(3))
    await running.granted()
    waiting.close()
    assert lane.admitted == 2
    running.close()
    await last.granted()
    last.close()
    last.close()
    assert lane.admitted == 0


async def test_a_start_that_fails_is_told_to_all_who_wait_for_that_model_and_no_other(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.broken = {"a"}
    tickets = [lane.submit("r1", "a"), lane.submit("r2", "b"), lane.submit("r3", "a")]
    for ticket in (tickets[0], tickets[2]):
        with pytest.raises(BackendUnavailable, match="exited with code 1"):
            await ticket.granted()
    assert lane.admitted == 1
    assert (await tickets[1].granted()).model_id == "b"


async def test_a_slow_start_refuses_those_who_wait_and_goes_on(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.load_s = 45
    impatient = lane.submit("r1", "a")
    with pytest.raises(ModelLoadTimeout) as refused:
        await impatient.granted()
    assert trio.current_time() == pytest.approx(30)
    assert refused.value.timeout_s == 30
    retried = lane.submit("r2", "a")
    await retried.granted()
    assert trio.current_time() == pytest.approx(45)
    assert servers.history == ["start a"]


async def test_a_slow_start_that_nobody_waits_for_gives_way_to_another_model(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.load_s = 45
    with pytest.raises(ModelLoadTimeout):
        await lane.submit("r1", "a").granted()
    servers.load_s = 2
    await lane.submit("r2", "b").granted()
    assert trio.current_time() == pytest.approx(32)
    assert servers.history == ["start a", "stop a", "start b"]


async def test_waiting_for_a_turn_ends_at_the_queue_timeout(lane: Lane[str], autojump_clock: MockClock) -> None:
    running, waiting = lane.submit("r1", "a"), lane.submit("r2", "a")
    await running.granted()
    with pytest.raises(QueueTimeout) as refused:
        await waiting.granted()
    assert refused.value.waited_s == pytest.approx(100)
    assert lane.admitted == 1


async def test_a_request_whose_server_died_is_tried_again_before_those_who_wait(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    first, second = lane.submit("r1", "a"), lane.submit("r2", "a")
    await first.granted()
    servers.crash()
    first.requeue()
    lease = await first.granted()
    assert lease.generation == 2
    assert second.state is TicketState.WAITING
    assert lane.admitted == 2


async def test_a_crash_while_nobody_is_served_delays_the_next_request_by_the_restart(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    await serve(lane.submit("r1", "a"), 1)
    servers.crash()
    lease = await lane.submit("r2", "a").granted()
    assert lease.generation == 2
    assert servers.history == ["start a", "crash a"]


async def test_a_preloaded_model_is_ready_before_anybody_asks(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    lane.preload("a")
    await trio.sleep(1.5)
    await lane.submit("r1", "a").granted()
    assert trio.current_time() == pytest.approx(1.5)


async def test_a_fault_of_our_own_in_a_load_is_told_and_does_not_end_the_lane(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    real_ensure = servers.ensure

    async def faulty(model_id: str, beside: Collection[str] = (), make_room: MakeRoom | None = None) -> None:
        raise ZeroDivisionError(model_id)

    servers.ensure = faulty  # type: ignore[method-assign]
    with pytest.raises(BackendUnavailable, match="internal error"):
        await lane.submit("r1", "a").granted()
    assert "ZeroDivisionError" in caplog.text
    servers.ensure = real_ensure  # type: ignore[method-assign]
    await lane.submit("r2", "a").granted()


async def test_the_estimate_of_the_next_free_place_follows_what_was_measured(
    lane: Lane[str], autojump_clock: MockClock
) -> None:
    await serve(lane.submit("r1", "a"), 8)
    ticket = lane.submit("r2", "a")
    await ticket.granted()
    await trio.sleep(3)
    assert lane.place_free_in_s() == pytest.approx(5)
    assert lane.view().estimated_wait_s == pytest.approx(5)


async def test_unloading_waits_for_the_requests_in_flight_and_grants_no_more_until_it_is_done(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    running = lane.submit("r1", "a")
    await running.granted()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.unload, "a")
        await trio.sleep(1)
        waiting = lane.submit("r2", "a")
        nursery.start_soon(serve, waiting, 0)
        await trio.sleep(1)
        assert waiting.state is TicketState.WAITING
        assert servers.history == ["start a"]
        running.close()
    assert servers.history == ["start a", "stop a", "start a"]


async def test_a_forced_unloading_does_not_wait(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    ticket = lane.submit("r1", "a")
    await ticket.granted()
    await lane.unload("a", force=True)
    assert servers.history == ["start a", "stop a"]
    ticket.close()


async def test_an_idle_model_is_unloaded_after_its_time_and_no_sooner(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.idle_unload_s = 10
    await serve(lane.submit("r1", "a"), 5)  # from 1 to 6
    await trio.sleep_until(15)
    await serve(lane.submit("r2", "a"), 0)
    await trio.sleep_until(24.9)
    assert servers.history == ["start a"]
    await trio.sleep_until(25.1)
    assert servers.history == ["start a", "stop a"]
    await serve(lane.submit("r3", "a"), 0)
    assert servers.history == ["start a", "stop a", "start a"]


async def test_a_visit_loads_a_model_in_its_turn_and_takes_up_no_place(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    tickets = [lane.submit(f"r{number}", "a") for number in range(3)]
    operator = lane.request_load("b")
    assert lane.admitted == 3
    async with trio.open_nursery() as nursery:
        for ticket in tickets:
            nursery.start_soon(serve, ticket, 1)
        await operator.granted()
        operator.close()
    assert servers.history == ["start a", "stop a", "start b"]
    assert lane.admitted == 0


async def test_order_holds_whatever_is_between_the_channel_and_the_lane(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    # The first is handed to the waiting task, the others are collected past it.
    tickets = [lane.submit(f"r{number}", "a") for number in range(3)]
    order: list[str] = []

    async def take(ticket: Ticket[str]) -> None:
        await ticket.granted()
        order.append(ticket.request_id)
        ticket.close()

    async with trio.open_nursery() as nursery:
        for ticket in tickets:
            nursery.start_soon(take, ticket)
    assert order == ["r0", "r1", "r2"]


async def test_who_waits_for_a_load_that_an_operator_ends_has_it_loaded_again(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    ticket = lane.submit("r1", "a")
    await trio.sleep(0.5)
    await lane.unload("a")
    await ticket.granted()
    assert servers.history == ["start a", "stop a", "start a"]


async def test_an_operator_who_wants_a_model_that_is_ready_waits_for_no_slot(
    lane: Lane[str], autojump_clock: MockClock
) -> None:
    busy, waiting = lane.submit("r1", "a"), lane.submit("r2", "a")
    await busy.granted()
    operator = lane.request_load("a")
    await operator.granted()
    operator.close()
    assert trio.current_time() == pytest.approx(1)
    assert (lane.view().in_flight, waiting.state, waiting.passed_since) == (1, TicketState.WAITING, None)


async def test_a_model_that_can_not_be_loaded_is_refused_while_another_is_still_in_use(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.missing = {"b"}
    busy = lane.submit("r1", "a")
    await busy.granted()
    for _try in range(2):
        with pytest.raises(BackendUnavailable, match="no such file"):
            await lane.submit("r2", "b").granted()
    assert trio.current_time() == pytest.approx(1)
    assert lane.admitted == 1


async def test_a_lane_shows_its_load_in_its_repr(lane: Lane[str], autojump_clock: MockClock) -> None:
    assert repr(lane) == "<Lane cpu:0: 0 in flight, 0 waiting, limit 3>"
    first, _second = lane.submit("r1", "a"), lane.submit("r2", "a")
    await trio.sleep(0.5)
    assert repr(lane) == "<Lane cpu:0: 0 in flight, 2 waiting, limit 3, loading a>"
    await first.granted()
    assert repr(lane) == "<Lane cpu:0: 1 in flight, 1 waiting, limit 3>"


async def test_a_request_for_several_completions_takes_as_many_slots(
    lane: Lane[str], servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.slots = 4
    lane.rules = replace(RULES, max_pending=10)
    wide, wider, narrow = lane.submit("r1", "a", slots=3), lane.submit("r2", "a", slots=99), lane.submit("r3", "a")
    await wide.granted()
    await trio.testing.wait_all_tasks_blocked()
    assert [ticket.state for ticket in (wider, narrow)] == [TicketState.WAITING, TicketState.WAITING]
    wide.close()
    await wider.granted()
    await trio.testing.wait_all_tasks_blocked()
    assert narrow.state is TicketState.WAITING, "no slot is left beside a request that takes all of them"
    wider.close()
    await narrow.granted()
    narrow.close()
