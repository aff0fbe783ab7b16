"""Whatever is asked of several devices, and whatever their servers do: every request ends, and nothing leaks."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from fakes.checked_policy import CheckedPolicy
from fakes.servers import FakeServers
from nodeagent.errors import Refusal
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.lease import TicketState
from nodeagent.scheduling.placement import Residency
from nodeagent.scheduling.queueing import FirstCome, Policy, Priority
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.scheduling.seam import Obstacle
from nodeagent.scheduling.swap_aware import SwapAware

MAX_PENDING = 3


@dataclass(frozen=True)
class Visit:
    """A client: when it comes, what it wants, how long it is served, when it loses patience, and whether its server
    dies under it after a while, so that it is tried again."""

    at: float
    model_id: str
    priority: Priority
    service_s: float
    patience_s: float
    retries: bool


TIMES = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 7.0, 20.0])
VISITS = st.builds(
    Visit,
    at=TIMES,
    model_id=st.sampled_from("abc"),
    priority=st.sampled_from(Priority),
    service_s=TIMES,
    patience_s=TIMES,
    retries=st.booleans(),
)


@given(
    visits=st.lists(VISITS, max_size=16),
    devices=st.integers(1, 3),
    load_s=st.sampled_from([0.0, 1.0, 6.0]),
    slots=st.integers(1, 2),
    broken=st.lists(st.sets(st.sampled_from("abc"), max_size=1), min_size=3, max_size=3),
    too_small=st.lists(st.sets(st.sampled_from("abc"), max_size=1), min_size=3, max_size=3),
    policy=st.sampled_from([SwapAware(), SwapAware(1.0, 0.5), FirstCome()]),
)
@settings(max_examples=2 * settings().max_examples, deadline=None)
def test_everything_comes_to_rest(
    visits: list[Visit],
    devices: int,
    load_s: float,
    slots: int,
    broken: list[set[str]],
    too_small: list[set[str]],
    policy: Policy,
) -> None:
    hosts = {
        f"gpu:{number}": FakeServers(
            load_s=load_s,
            slots=slots,
            broken=broken[number],
            obstacles={model_id: Obstacle("too small") for model_id in too_small[number]},
            hesitates_s=0.1 * number,
        )
        for number in range(devices)
    }
    trio.run(partial(_scenario, hosts, visits, policy), clock=MockClock(autojump_threshold=0))


async def _scenario(hosts: dict[str, FakeServers], visits: list[Visit], policy: Policy) -> None:
    rules = LaneRules(max_pending=MAX_PENDING, queue_timeout_s=40, startup_timeout_s=10, policy=CheckedPolicy(policy))
    lanes = {device_id: Lane(device_id, host, rules) for device_id, host in hosts.items()}
    scheduler: Scheduler[str] = Scheduler(lanes, hosts)
    async with trio.open_nursery() as nursery:
        for device_id, host in hosts.items():
            host.on_change = lanes[device_id].nudge
            await nursery.start(lanes[device_id].run)
        with trio.fail_after(1000):
            async with trio.open_nursery() as clients:
                for visit in visits:
                    clients.start_soon(_client, scheduler, hosts, visit)
        assert scheduler.admitted == 0
        assert all(lane.queue() == [] for lane in lanes.values())
        nursery.cancel_scope.cancel()


def costs_at_once(scheduler: Scheduler[str], model_id: str) -> dict[str, float]:
    """Of the devices that serve the model at once, how soon a request would start there by all estimates."""
    devices = [it for it in scheduler.lanes if scheduler._serves_at_once(it, model_id)]
    candidates = [scheduler._candidate(it, model_id) for it in devices]
    assert all(it.residency is Residency.READY and it.obstacle is None and not it.failing for it in candidates)
    return {it.device_id: it.start_s + it.delays_s for it in candidates}


async def _client(scheduler: Scheduler[str], hosts: dict[str, FakeServers], visit: Visit) -> None:
    await trio.sleep(visit.at)
    with suppress(Refusal), trio.move_on_after(visit.patience_s):
        at_once = costs_at_once(scheduler, visit.model_id)
        ticket = scheduler.admit("r", visit.model_id, visit.priority)
        if at_once:
            assert ticket.state is TicketState.GRANTED
            assert at_once.get(ticket.lane.device_id) == 0.0
        try:
            lease = await ticket.granted()
            if visit.retries:
                await trio.sleep(visit.service_s / 2)
                current = hosts[lease.device_id].current
                if current is not None and current.generation == lease.generation and current.endpoint is not None:
                    hosts[lease.device_id].crash()
                scheduler.requeue(ticket)
                lease = await ticket.granted()
            assert lease.model_id == visit.model_id
            assert lease.device_id == ticket.lane.device_id
            assert scheduler.lanes[lease.device_id].admitted <= MAX_PENDING
            await trio.sleep(visit.service_s)
        finally:
            ticket.close()
