"""Whatever clients, loads and crashes do, a lane comes to rest: every request ends, nothing leaks, bounds hold."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from fakes.servers import FakeServers
from nodeagent.errors import ModelLoadTimeout, Refusal
from nodeagent.scheduling.lane import Lane, LaneLimits

LIMITS = LaneLimits(max_pending=3, queue_timeout_s=20, startup_timeout_s=5)


@dataclass(frozen=True)
class Visit:
    """A client: when it comes, what it wants, how long it is served, and when it loses patience."""

    at: float
    model_id: str
    service_s: float
    patience_s: float


TIMES = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 7.0])
VISITS = st.builds(Visit, at=TIMES, model_id=st.sampled_from("abc"), service_s=TIMES, patience_s=TIMES)


@given(
    visits=st.lists(VISITS, max_size=12),
    crashes=st.lists(TIMES, max_size=3),
    load_s=st.sampled_from([0.0, 1.0, 6.0]),
    slots=st.integers(1, 3),
    broken=st.sets(st.sampled_from("abc"), max_size=2),
    unloads=st.lists(st.tuples(TIMES, st.sampled_from("abc")), max_size=3),
    visits_of_operators=st.lists(st.tuples(TIMES, st.sampled_from("abc")), max_size=2),
    idle_unload_s=st.sampled_from([None, 0.0, 0.5]),
)
@settings(max_examples=300, deadline=None)
def test_a_lane_always_comes_to_rest(
    visits: list[Visit],
    crashes: list[float],
    load_s: float,
    slots: int,
    broken: set[str],
    unloads: list[tuple[float, str]],
    visits_of_operators: list[tuple[float, str]],
    idle_unload_s: float | None,
) -> None:
    servers = FakeServers(load_s=load_s, slots=slots, broken=broken, idle_unload_s=idle_unload_s)
    scenario = partial(_scenario, servers, visits, crashes, unloads, visits_of_operators)
    trio.run(scenario, clock=MockClock(autojump_threshold=0))


async def _scenario(
    servers: FakeServers,
    visits: list[Visit],
    crashes: list[float],
    unloads: list[tuple[float, str]],
    visits_of_operators: list[tuple[float, str]],
) -> None:
    slots = servers.slots
    lane: Lane[str] = Lane("cpu:0", servers, LIMITS)
    served = 0
    running: dict[str, int] = {}

    def on_change() -> None:
        lane.nudge()
        current = servers.current
        for model_id, number in running.items():
            crashed = servers.history and servers.history[-1].startswith("crash")
            assert not number or crashed or (current is not None and current.model_id == model_id), (
                "swapped under a lease"
            )

    servers.on_change = on_change

    async def client(number: int, visit: Visit) -> None:
        nonlocal served
        await trio.sleep(visit.at)
        with trio.move_on_after(visit.patience_s):
            try:
                ticket = lane.submit(str(number), visit.model_id)
            except Refusal:
                return
            assert lane.admitted <= LIMITS.max_pending
            try:
                lease = await ticket.granted()
                assert lease.model_id == visit.model_id
                running[visit.model_id] = running.get(visit.model_id, 0) + 1
                assert sum(running.values()) <= slots
                try:
                    await trio.sleep(visit.service_s)
                    served += 1
                finally:
                    running[visit.model_id] -= 1
            except Refusal:
                pass
            finally:
                ticket.close()

    async def crash(at: float) -> None:
        await trio.sleep(at)
        if servers.current is not None and servers.current.endpoint is not None:
            servers.crash()

    async def unload(at: float, model_id: str) -> None:
        await trio.sleep(at)
        await lane.unload(model_id)

    async def load(at: float, model_id: str) -> None:
        await trio.sleep(at)
        ticket = lane.visit(model_id)
        with suppress(Refusal):
            await ticket.granted()
        ticket.close()

    async with trio.open_nursery() as nursery:
        await nursery.start(lane.run)
        with trio.fail_after(1000):
            async with trio.open_nursery() as clients:
                for number, visit in enumerate(visits):
                    clients.start_soon(client, number, visit)
                for at in crashes:
                    clients.start_soon(crash, at)
                for order in unloads:
                    clients.start_soon(unload, *order)
                for order in visits_of_operators:
                    clients.start_soon(load, *order)
            assert lane.admitted == 0
            servers.broken.clear()
            await _is_served_in_the_end(lane)
        view = lane.view()
        assert (view.in_flight, view.waiting, view.tickets) == (0, 0, ())
        nursery.cancel_scope.cancel()


async def _is_served_in_the_end(lane: Lane[str]) -> None:
    """A client that comes back when told to is served: the lane is not wedged."""
    for _try in range(3):
        ticket = lane.submit("last", "a")
        try:
            await ticket.granted()
        except ModelLoadTimeout as refusal:
            await trio.sleep(refusal.retry_after_s)
        else:
            return
        finally:
            ticket.close()
    raise AssertionError("refused three times")
