"""A child's life in virtual time: each transition at its exact moment, with its cause."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from fakes.child_process import FakeSpawner, Fate, FateProbe
from supervisor.child import Child
from supervisor.errors import GivenUp, NotReady, StartFailed, SupervisorError, Suspended
from supervisor.lifecycle import (
    Cause,
    Event,
    Exited,
    GaveUp,
    Ready,
    Restarting,
    Started,
    Stopped,
    Stopping,
    Unhealthy,
)
from supervisor.probe import LivenessPolicy
from supervisor.records import Records
from supervisor.restart import RestartPolicy
from supervisor.snapshot import ChildState
from supervisor.spec import ChildSpec, StopPolicy
from supervisor.supervisor import Supervisor

NEVER_READY = Fate(ready_after_s=None)
READY = Fate()
LONG_S = 10_000.0


class NoJitter(random.Random):
    """Every back-off delay is at its longest."""

    def uniform(self, _a: float, b: float) -> float:
        return b


class Watched:
    """A supervisor of fake processes, and what it reports."""

    def __init__(
        self,
        *fates: Fate | Exception,
        on_event: Callable[[Event], None] = lambda _event: None,
        may_restart: Callable[[str], bool] = lambda _child_id: True,
        **more: Any,
    ) -> None:
        self.events: list[Event] = []
        self.probe = FateProbe()
        self.spawner = FakeSpawner(fates)
        self._on_event = on_event
        self.supervisor = Supervisor(
            on_event=self._record, may_restart=may_restart, spawner=self.spawner, rng=NoJitter(), **more
        )

    def _record(self, event: Event) -> None:
        self.events.append(event)
        self._on_event(event)

    def spec(self, child_id: str = "child", **more: Any) -> ChildSpec:
        defaults: dict[str, Any] = {
            "start_timeout_s": 30.0,
            "liveness": LivenessPolicy(interval_s=5.0, timeout_s=2.0, failures=3),
            "restart": RestartPolicy(max_restarts=3, period_s=60.0, cooldown_s=100.0),
            "stop": StopPolicy(grace_s=4.0),
        }
        facts: dict[str, Any] = {"child_id": child_id, "group": "group", "argv": ("program",), "env": {}}
        return ChildSpec(**facts, probe=self.probe, **(defaults | more))

    async def start(self, **more: Any) -> Ready:
        return await self.supervisor.start(self.spec(**more))

    async def fails_to_start(self, **more: Any) -> StartFailed:
        with pytest.raises(StartFailed) as failed:
            await self.start(**more)
        return failed.value

    @property
    def state(self) -> ChildState:
        return self.supervisor.snapshot()["child"].state

    def times(self, kind: type[Event]) -> list[float]:
        return [round(event.at, 6) for event in self.events if isinstance(event, kind)]

    def story(self) -> list[tuple[type[Event], Cause | None]]:
        """Each event's kind, with its cause."""
        return [(type(event), cause_of(event)) for event in self.events]


def cause_of(event: Event) -> Cause | None:
    match event:
        case Exited(exit=exit):
            return exit.cause
        case Unhealthy(cause=cause) | Restarting(cause=cause) | GaveUp(cause=cause):
            return cause
        case _:
            return None


async def watch(nursery: trio.Nursery, *fates: Fate | Exception, **more: Any) -> Watched:
    watched = Watched(*fates, **more)
    await nursery.start(watched.supervisor.run)
    return watched


# Starts


async def test_probes_of_a_starting_child_come_quickly_at_first_then_at_the_interval(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ready_after_s=2.0))
    ready = await watched.start(probe_interval_s=0.5)
    called_at = [round(at, 6) for at in watched.probe.called_at]
    assert called_at == [0.0, 0.01, 0.03, 0.07, 0.15, 0.31, 0.63, 1.13, 1.63, 2.13]
    assert ready.at == trio.current_time() == watched.probe.called_at[-1]
    assert (ready.address, ready.generation) == ("address 1", 1)
    assert watched.times(Started) == [0.0]
    child = watched.supervisor.snapshot()["child"]
    assert (child.state, child.address, child.since, child.spawned_at) == (ChildState.READY, "address 1", ready.at, 0.0)
    assert (child.pid, child.cause, child.reason, child.retry_at) == (101, None, None, None)


async def test_a_starting_child_is_probed_at_once_when_it_prints_a_line(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ready_after_s=7.0))
    nursery.start_soon(partial(watched.start, probe_interval_s=5.0))
    await trio.sleep(7.3)
    before = watched.probe.called_at[-1]
    assert watched.state is ChildState.STARTING
    watched.spawner.processes[0].output.feed(b"listening\n")
    await trio.testing.wait_all_tasks_blocked()
    assert before < 7.0
    assert watched.times(Ready) == [7.3]


async def test_a_probe_without_an_answer_is_repeated_after_five_seconds_while_the_child_starts(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(hangs_after_s=0.0), Fate())
    failed = await watched.fails_to_start(start_timeout_s=12.0)
    assert [round(at, 6) for at in watched.probe.called_at[:3]] == [0.0, 5.01, 10.03]
    assert failed.exit.cause is Cause.START_TIMEOUT
    assert watched.times(Exited) == [12.0]


async def test_a_child_that_is_not_ready_in_time_is_ended_and_its_start_has_failed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, NEVER_READY)
    failed = await watched.fails_to_start(start_timeout_s=30.0)
    assert trio.current_time() == 30.0
    assert failed.exit.reason == "not ready 30 s after its spawn: not yet; it was killed by SIGTERM"
    assert (failed.exit.cause, failed.exit.code, failed.exit.ready_s) == (Cause.START_TIMEOUT, -15, None)


async def test_a_start_during_a_start_joins_it_and_both_callers_get_the_same_failure(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ready_after_s=None, exits_after_s=3.0, code=7))
    failures: list[StartFailed] = []

    async def start() -> None:
        failures.append(await watched.fails_to_start())

    async with trio.open_nursery() as callers:
        callers.start_soon(start)
        await trio.sleep(1.0)
        callers.start_soon(start)
    assert trio.current_time() == 3.0
    assert [failure.exit.code for failure in failures] == [7, 7]
    assert [failure.generation for failure in failures] == [1, 1]


async def test_a_start_while_the_child_backs_off_waits_for_its_next_attempt(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, OSError("no memory"), READY)
    failed = await watched.fails_to_start()
    assert failed.exit.reason == "could not be spawned: no memory"
    child = watched.supervisor.snapshot()["child"]
    assert (child.state, child.cause, child.retry_at) == (ChildState.BACKING_OFF, Cause.SPAWN_FAILED, 1.0)
    assert (await watched.start()).at == 1.0


async def test_a_start_while_the_child_stops_begins_when_it_is_gone(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ignores_sigterm=True), READY)
    await watched.start()
    nursery.start_soon(watched.supervisor.stop, "child")
    await trio.sleep(1.0)
    assert watched.state is ChildState.STOPPING
    ready = await watched.start()
    assert (ready.at, ready.generation) == (4.0, 2)


async def test_a_start_with_a_different_spec_is_refused_while_the_child_runs(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery)
    await watched.start()
    with pytest.raises(ValueError, match="stop it first"):
        await watched.start(start_timeout_s=1.0)


# Liveness


async def test_a_child_is_unhealthy_after_three_failed_probes_in_a_row_and_a_passed_one_resets_the_count(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ill_after_s=1.0))
    await watched.start()
    process = watched.spawner.processes[0]
    await trio.sleep(11.0)  # failed at 5 and 10
    process.fate = READY
    await trio.sleep(5.0)  # passed at 15
    process.fate = Fate(ill_after_s=0.0)
    await trio.sleep(14.5)  # failed at 20, 25 and 30
    assert watched.times(Unhealthy) == [30.0]
    [unhealthy] = [event for event in watched.events if isinstance(event, Unhealthy)]
    assert unhealthy.reason == "3 liveness probes in a row failed, the last: ill"


async def test_a_probe_without_an_answer_counts_as_failed_at_its_timeout(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(hangs_after_s=1.0))
    await watched.start()
    await trio.sleep(21.5)  # probed at 5, 12 and 19, for 2 s each
    assert watched.times(Unhealthy) == [21.0]
    assert "no answer within 2 s" in next(event.reason for event in watched.events if isinstance(event, Unhealthy))


async def test_a_child_found_suspended_twice_is_killed_at_once_and_not_probed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(suspended_after_s=7.0))
    await watched.start()
    await trio.sleep(15.5)
    assert watched.times(Unhealthy) == watched.times(Exited) == [15.0]
    assert [at for at in watched.probe.called_at if 7.0 < at < 15.0] == []
    assert next(event.exit.code for event in watched.events if isinstance(event, Exited)) == -9


async def test_a_child_found_suspended_once_goes_on(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watched = await watch(nursery, Fate(suspended_after_s=4.0))
    await watched.start()
    await trio.sleep(6.0)
    watched.spawner.processes[0].fate = READY
    await trio.sleep(LONG_S)
    assert watched.state is ChildState.READY
    assert watched.times(Started) == [0.0]


async def test_a_child_that_is_suspended_while_it_starts_has_failed_after_two_intervals(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ready_after_s=None, suspended_after_s=0.0))
    failed = await watched.fails_to_start()
    assert failed.exit.reason == "not ready: suspended by a stop signal; it was killed by SIGKILL"
    assert 10.0 <= trio.current_time() <= 10.5


async def test_an_infinite_interval_switches_liveness_probes_off(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ill_after_s=1.0))
    await watched.start(liveness=LivenessPolicy(interval_s=float("inf")))
    await trio.sleep(LONG_S)
    assert watched.state is ChildState.READY
    assert watched.probe.called_at == [0.0]


async def test_a_reported_failure_replaces_that_generation_only_while_it_is_ready(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ready_after_s=2.0))
    nursery.start_soon(watched.start)
    await trio.sleep(1.0)
    watched.supervisor.fail("child", 1, "still starting")
    watched.supervisor.fail("stranger", 1, "unknown")
    await trio.sleep(2.0)
    watched.supervisor.fail("child", 2, "another generation")
    assert watched.state is ChildState.READY
    watched.supervisor.fail("child", 1, "no progress")
    watched.supervisor.fail("child", 1, "a second report")
    await trio.sleep(0.5)
    [unhealthy] = [event for event in watched.events if isinstance(event, Unhealthy)]
    assert (unhealthy.at, unhealthy.cause, unhealthy.reason) == (3.0, Cause.STALLED, "no progress")


async def test_a_failure_reported_by_the_handler_of_the_ready_event_counts(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    def report(event: Event) -> None:
        if isinstance(event, Ready) and event.generation == 1:
            watched.supervisor.fail("child", 1, "refused")

    watched = await watch(nursery, on_event=report)
    assert (await watched.start()).generation == 1
    await trio.sleep(1.0)
    assert [event.reason for event in watched.events if isinstance(event, Unhealthy)] == ["refused"]
    assert watched.times(Ready) == [0.0, 0.0]


# Restarts


async def test_the_first_restart_is_immediate_and_later_ones_wait_1_s_and_then_twice_as_long(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, *[Fate(exits_after_s=2.0)] * 4)
    await watched.start(restart=RestartPolicy(max_restarts=10))
    await trio.sleep(100.0)
    delays = [event.delay_s for event in watched.events if isinstance(event, Restarting)]
    assert delays == [0.0, 1.0, 2.0, 4.0]
    assert watched.times(Exited) == [2.0, 4.0, 7.0, 11.0]
    assert watched.times(Started) == [0.0, 2.0, 5.0, 9.0, 15.0]
    assert [event.generation for event in watched.events if isinstance(event, Started)] == [1, 2, 3, 4, 5]


async def test_a_child_that_may_not_be_restarted_when_its_back_off_is_over_is_stopped(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    asked: list[tuple[str, float]] = []
    allowed = True

    def may_restart(child_id: str) -> bool:
        asked.append((child_id, trio.current_time()))
        return allowed

    watched = await watch(nursery, *[Fate(exits_after_s=2.0)] * 2, may_restart=may_restart)
    await watched.start(restart=RestartPolicy(max_restarts=10))
    await trio.sleep(4.5)  # the immediate restart was allowed, and the next one is due in half a second
    allowed = False
    await trio.sleep(100.0)
    assert asked == [("child", 2.0), ("child", 5.0)]
    assert watched.times(Started) == [0.0, 2.0]
    assert watched.times(Stopped) == [5.0]
    states = [watched.state]
    await watched.start(restart=RestartPolicy(max_restarts=10))
    assert [*states, watched.state] == [ChildState.STOPPED, ChildState.READY]


async def test_a_start_that_failed_is_repeated_after_a_back_off(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ready_after_s=None, exits_after_s=2.0))
    await watched.fails_to_start()
    await trio.sleep(1.5)
    assert watched.times(Started) == [0.0, 3.0]


async def test_more_exits_than_the_restart_intensity_fail_the_child_until_a_start_after_the_cool_down(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    crash = Fate(exits_after_s=1.0)
    broken = Fate(ready_after_s=None, exits_after_s=1.0)
    watched = await watch(nursery, crash, crash, crash, broken, READY)
    once = RestartPolicy(max_restarts=2, cooldown_s=100.0)
    await watched.start(restart=once)
    await trio.sleep(50.0)
    # Exits at 1, 2 (restarted at once) and 4 (after 1 s).
    assert watched.times(Exited) == [1.0, 2.0, 4.0]
    child = watched.supervisor.snapshot()["child"]
    assert (child.state, child.cause, child.retry_at) == (ChildState.FAILED, Cause.EXITED, 104.0)
    assert child.reason == "exited with code 1; given up: 3 exits in 60 s"
    with pytest.raises(GivenUp) as given_up:
        await watched.start(restart=once)
    assert (given_up.value.retry_at, given_up.value.reason) == (104.0, child.reason)
    # Half-open: the one start fails, and that is enough.
    await trio.sleep_until(104.0)
    await watched.fails_to_start(restart=once)
    assert watched.supervisor.snapshot()["child"].retry_at == 205.0
    assert "the start after the cool-down failed" in (watched.supervisor.snapshot()["child"].reason or "")
    with pytest.raises(GivenUp):
        await watched.start(restart=once)
    await trio.sleep_until(205.0)
    assert (await watched.start(restart=once)).generation == 5


async def test_a_failed_child_starts_at_once_with_a_different_spec_or_when_it_is_forgotten(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, OSError("one"), OSError("two"), OSError("three"))
    never = RestartPolicy(max_restarts=0)
    await watched.fails_to_start(restart=never)
    await watched.fails_to_start(restart=never, start_timeout_s=31.0)
    watched.supervisor.forget("child")
    watched.supervisor.forget("stranger")
    assert watched.supervisor.snapshot() == {}
    await watched.fails_to_start(restart=never, start_timeout_s=31.0)
    assert trio.current_time() == 0.0


async def test_an_active_child_is_not_forgotten(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watched = await watch(nursery)
    await watched.start()
    watched.supervisor.forget("child")
    assert watched.state is ChildState.READY


async def test_a_transient_child_that_exits_with_0_is_not_restarted_but_may_be_started(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(exits_after_s=1.0, code=0))
    await watched.start(restart=RestartPolicy(mode="transient"))
    await trio.sleep(LONG_S)
    child = watched.supervisor.snapshot()["child"]
    assert (child.state, child.retry_at) == (ChildState.FAILED, None)
    assert child.reason == "exited with code 0; not restarted, its restart mode is transient"
    assert (await watched.start(restart=RestartPolicy(mode="transient"))).generation == 2


# Stops


async def stops_in(watched: Watched, state: ChildState) -> float:
    """Stop the child, which is in that state; return how long that took."""
    assert watched.state is state
    before = trio.current_time()
    await watched.supervisor.stop("child")
    return trio.current_time() - before


async def test_a_stop_while_starting_ends_the_process_and_fails_the_start_that_waits(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, NEVER_READY)
    failures: list[StartFailed] = []

    async def start() -> None:
        failures.append(await watched.fails_to_start())

    nursery.start_soon(start)
    await trio.sleep(1.0)
    assert await stops_in(watched, ChildState.STARTING) == 0.0
    await trio.testing.wait_all_tasks_blocked()
    assert watched.state is ChildState.STOPPED
    assert [(failure.exit.cause, failure.exit.reason) for failure in failures] == [(Cause.STOPPED, "was stopped")]
    assert watched.story() == [(Started, None), (Stopping, None), (Exited, Cause.STOPPED), (Stopped, None)]


async def test_a_stop_while_ready_takes_the_grace_at_most(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watched = await watch(nursery, Fate(ignores_sigterm=True))
    await watched.start()
    assert await stops_in(watched, ChildState.READY) == 4.0
    assert next(event.exit for event in watched.events if isinstance(event, Exited)).reason == (
        "stopped; it was killed by SIGKILL"
    )
    assert await stops_in(watched, ChildState.STOPPED) == 0.0
    assert watched.story()[1:] == [(Ready, None), (Stopping, None), (Exited, Cause.STOPPED), (Stopped, None)]


async def test_a_stop_while_unhealthy_waits_for_the_end_and_prevents_the_restart(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ill_after_s=1.0, ignores_sigterm=True))
    await watched.start()
    await trio.sleep(16.0)  # unhealthy at 15, killed at 19
    assert await stops_in(watched, ChildState.UNHEALTHY) == 3.0
    await trio.sleep(LONG_S)
    assert watched.state is ChildState.STOPPED
    assert watched.story()[2:] == [
        (Unhealthy, Cause.LIVENESS_FAILED),
        (Stopping, None),
        (Exited, Cause.LIVENESS_FAILED),
        (Stopped, None),
    ]


async def test_a_second_stop_joins_the_first(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watched = await watch(nursery, Fate(ignores_sigterm=True))
    await watched.start()
    nursery.start_soon(watched.supervisor.stop, "child")
    await trio.sleep(1.0)
    assert await stops_in(watched, ChildState.STOPPING) == 3.0
    assert watched.times(Stopping) == [0.0]


async def test_a_cancelled_stop_only_ends_the_waiting(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watched = await watch(nursery, Fate(ignores_sigterm=True))
    await watched.start()
    with trio.move_on_after(1.0):
        await watched.supervisor.stop("child")
    assert watched.state is ChildState.STOPPING
    await trio.sleep(3.5)
    assert watched.times(Stopped) == [4.0]


async def test_a_stop_while_backing_off_is_immediate_and_prevents_the_restart(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, OSError("no memory"))
    await watched.fails_to_start()
    assert await stops_in(watched, ChildState.BACKING_OFF) == 0.0
    await trio.sleep(LONG_S)
    assert watched.state is ChildState.STOPPED
    assert watched.times(Started) == []


async def test_a_failed_child_stays_failed_when_it_is_stopped(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watched = await watch(nursery, OSError("no memory"))
    await watched.fails_to_start(restart=RestartPolicy(max_restarts=0))
    assert await stops_in(watched, ChildState.FAILED) == 0.0
    await watched.supervisor.stop("stranger")
    assert watched.state is ChildState.FAILED
    assert watched.times(Stopped) == []


async def test_cancelling_the_supervisor_ends_every_child_and_fails_the_starts_that_wait(
    autojump_clock: MockClock,
) -> None:
    watched = Watched(Fate(ignores_sigterm=True), NEVER_READY)
    failures: list[StartFailed] = []

    async def start_other() -> None:
        failures.append(await watched.fails_to_start(child_id="other"))

    async with trio.open_nursery() as callers:
        async with trio.open_nursery() as owner:
            await owner.start(watched.supervisor.run)
            await watched.start()
            callers.start_soon(start_other)
            await trio.sleep(1.0)
            owner.cancel_scope.cancel()
        assert trio.current_time() == 5.0
    assert watched.spawner.running == set()
    assert {child.state for child in watched.supervisor.snapshot().values()} == {ChildState.STOPPED}
    assert [failure.exit.cause for failure in failures] == [Cause.STOPPED]
    assert [cause_of(event) for event in watched.events if isinstance(event, Exited)] == [Cause.STOPPED] * 2


async def test_kill_all_cuts_the_grace_and_prevents_each_restart(autojump_clock: MockClock) -> None:
    watched = Watched(Fate(ignores_sigterm=True), OSError("no memory"))
    async with trio.open_nursery() as owner:
        await owner.start(watched.supervisor.run)
        await watched.start()
        await watched.fails_to_start(child_id="backing off")
        owner.start_soon(watched.supervisor.stop, "child")
        await trio.sleep(0.5)
        await watched.supervisor.kill_all()
        assert trio.current_time() == 0.5
        assert {child.state for child in watched.supervisor.snapshot().values()} == {ChildState.STOPPED}
        await watched.supervisor.kill_all()
        assert (await watched.fails_to_start(child_id="other")).exit.cause is Cause.STOPPED
    assert watched.spawner.running == set()
    assert len(watched.spawner.processes) == 1
    assert watched.times(Stopped) == [0.5, 0.5]


async def test_kill_all_works_while_the_supervisor_is_being_cancelled(autojump_clock: MockClock) -> None:
    watched = Watched(Fate(ignores_sigterm=True))

    async def kill_soon() -> None:
        await trio.sleep(1.0)
        await watched.supervisor.kill_all()

    async with trio.open_nursery() as owner, trio.open_nursery() as killing:
        await owner.start(watched.supervisor.run)
        await watched.start()
        killing.start_soon(kill_soon)
        watched.supervisor._nursery.cancel_scope.cancel()  # type: ignore[union-attr]
    assert trio.current_time() == 1.0
    assert watched.times(Stopped) == [1.0]


# Causes


@pytest.mark.parametrize(
    ("fate", "cause"),
    [
        (OSError("no memory"), Cause.SPAWN_FAILED),
        (Fate(ready_after_s=None, exits_after_s=1.0, code=0), Cause.EXITED),
        (Fate(ready_after_s=None, exits_after_s=1.0, code=3), Cause.EXITED),
        (Fate(ready_after_s=None, exits_after_s=1.0, code=-11), Cause.KILLED_BY_SIGNAL),
        (NEVER_READY, Cause.START_TIMEOUT),
        (Fate(ready_after_s=None, ignores_sigterm=True), Cause.START_TIMEOUT),
        (Fate(ready_after_s=None, suspended_after_s=0.0), Cause.SUSPENDED),
        (ValueError("embedded null byte"), Cause.SPAWN_FAILED),
        (UnicodeEncodeError("utf-8", "\udc80", 0, 1, "surrogates not allowed"), Cause.SPAWN_FAILED),
    ],
)
async def test_the_cause_of_a_failed_start(
    fate: Fate | Exception, cause: Cause, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, fate, fate)
    one = RestartPolicy(max_restarts=1)
    assert (await watched.fails_to_start(restart=one)).exit.cause is cause
    assert watched.supervisor.snapshot()["child"].cause is cause
    assert (await watched.fails_to_start(restart=one)).exit.cause is cause
    assert (watched.state, watched.supervisor.snapshot()["child"].cause) == (ChildState.FAILED, cause)
    ends = [(Exited, cause), (Restarting, cause), (Exited, cause), (GaveUp, cause)]
    assert [fact for fact in watched.story() if fact != (Started, None)] == ends


@pytest.mark.parametrize(
    ("fate", "cause", "unhealthy_first"),
    [
        (Fate(exits_after_s=3.0, code=0), Cause.EXITED, False),
        (Fate(exits_after_s=3.0, code=-6), Cause.KILLED_BY_SIGNAL, False),
        (Fate(exits_after_s=3.0, code=-63), Cause.KILLED_BY_SIGNAL, False),
        (Fate(ill_after_s=1.0), Cause.LIVENESS_FAILED, True),
        (Fate(ill_after_s=1.0, ignores_sigterm=True), Cause.LIVENESS_FAILED, True),
        (Fate(suspended_after_s=1.0), Cause.SUSPENDED, True),
    ],
)
async def test_the_cause_of_the_end_of_a_ready_child(
    fate: Fate, cause: Cause, unhealthy_first: bool, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, fate)
    await watched.start(restart=RestartPolicy(max_restarts=0))
    await trio.sleep(50.0)
    unhealthy = [(Unhealthy, cause)] if unhealthy_first else []
    assert watched.story() == [(Started, None), (Ready, None), *unhealthy, (Exited, cause), (GaveUp, cause)]


async def test_a_signal_without_a_name_is_reported_by_its_number(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ready_after_s=None, exits_after_s=1.0, code=-200))
    assert (await watched.fails_to_start()).exit.reason == "was killed by signal 200"


async def test_a_process_that_does_not_even_exit_on_sigkill_is_reported_without_a_code(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ready_after_s=None, hangs_in_a_driver=True))
    failed = await watched.fails_to_start(start_timeout_s=2.0)
    assert failed.exit.reason == "not ready 2 s after its spawn: not yet; it did not exit after SIGKILL"
    assert (failed.exit.code, failed.exit.cause) == (None, Cause.START_TIMEOUT)


async def test_the_cause_of_an_unhealthy_child_is_in_its_snapshot_and_gone_once_it_is_ready_again(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    watched = await watch(nursery, Fate(ill_after_s=1.0, ignores_sigterm=True))
    await watched.start()
    await trio.sleep(16.0)
    child = watched.supervisor.snapshot()["child"]
    assert (child.state, child.cause, child.address) == (ChildState.UNHEALTHY, Cause.LIVENESS_FAILED, None)
    await trio.sleep(10.0)
    child = watched.supervisor.snapshot()["child"]
    assert (child.state, child.cause, child.reason, child.generation) == (ChildState.READY, None, None, 2)


def test_causes_are_a_closed_set() -> None:
    assert {str(cause) for cause in Cause} == {
        "exited",
        "killed_by_signal",
        "spawn_failed",
        "start_timeout",
        "liveness_failed",
        "suspended",
        "stalled",
        "stopped",
        "out_of_memory",
        "out_of_device_memory",
        "own_shortage",
        "internal_error",
    }


# What people see of it


async def test_a_child_shows_its_id_state_generation_and_pid(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watched = await watch(nursery)
    child = Child(watched.spec("cpu:0/planner"), iter([7]), watched.events.append, lambda *_line: None, watched.spawner)
    assert repr(child) == "<Child cpu:0/planner stopped generation=0 pid=None>"
    child.prepare()
    nursery.start_soon(child.run)
    await child.ready()
    assert repr(child) == "<Child cpu:0/planner ready generation=7 pid=101>"


async def test_every_task_of_a_child_is_named(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    names: set[str] = set()
    watched = Watched()
    async with trio.open_nursery() as owner:
        await owner.start(watched.supervisor.run, name="supervisor")
        await watched.start(child_id="cpu:0/planner")
        await trio.testing.wait_all_tasks_blocked()
        [supervisor] = [task for task in owner.child_tasks if task.name == "supervisor"]
        tasks = [supervisor]
        while tasks:
            children = [child for nursery in tasks.pop().child_nurseries for child in nursery.child_tasks]
            names.update(child.name for child in children)
            tasks.extend(children)
        owner.cancel_scope.cancel()
    process = "cpu:0/planner (generation 1, pid 101)"
    assert names == {
        "child cpu:0/planner",
        f"attend {process}",
        f"check health of {process}",
    }


async def test_the_task_that_writes_the_records_is_named(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    supervisor = Supervisor(records=Records(tmp_path / "children.json"))
    await nursery.start(partial(supervisor.run), name="supervisor")
    [task] = nursery.child_tasks
    [recording, _children] = task.child_nurseries
    assert [child.name for child in recording.child_tasks] == ["records"]


async def test_the_last_lines_are_in_the_exit_and_can_be_read_while_the_child_runs(
    autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "supervisor")
    watched = await watch(nursery, Fate(exits_after_s=5.0))
    assert watched.supervisor.lines("child") == []
    await watched.start()
    watched.spawner.processes[0].output.feed(b"one\ntwo\n")
    assert watched.supervisor.lines("child") == ["one", "two"]
    assert watched.supervisor.lines("child", last=1) == ["two"]
    await trio.sleep(5.5)
    assert next(event.exit for event in watched.events if isinstance(event, Exited)).last_lines == ("one", "two")
    assert "child ended: exited with code 1; last words: two" in caplog.text
    assert "restart in 0.0 s: 1 of 3 in 60 s" in caplog.text


async def test_the_log_shows_the_line_that_its_user_picks_unless_the_child_was_stopped(
    autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "supervisor")
    watched = Watched(Fate(exits_after_s=5.0), Fate(), last_words=lambda lines: lines[0])
    await nursery.start(watched.supervisor.run)
    await watched.start()
    watched.spawner.processes[0].output.feed(b"".join(b"line %d\n" % number for number in range(90)))
    await trio.sleep(5.5)
    assert "child ended: exited with code 1; last words: line 0\n" in caplog.text
    caplog.clear()
    await watched.start()
    watched.spawner.processes[1].output.feed(b"error\nbye\n")
    await watched.supervisor.stop("child")
    assert "; last words: bye\n" in caplog.text


def test_every_error_of_the_supervisor_has_one_root() -> None:
    for error in (StartFailed, GivenUp, NotReady, Suspended):
        assert issubclass(error, SupervisorError)
