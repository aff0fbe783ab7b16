"""Whatever callers ask of the supervisor and whatever its children do, in any order: it settles.

The real state machine in virtual time, with fake processes.
"""

from itertools import pairwise

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from fakes.child_process import FakeSpawner, Fate, FateProbe
from supervisor.lifecycle import Event, Exited, Started, Stopped, Stopping
from supervisor.probe import LivenessPolicy
from supervisor.restart import RestartPolicy
from supervisor.spec import ChildSpec, StopPolicy
from supervisor.supervisor import ChildState, GivenUp, StartFailed, Supervisor

pytestmark = pytest.mark.virtual

AT_REST = (ChildState.STOPPED, ChildState.FAILED, ChildState.READY)


PROBE = FateProbe()
TIMES = st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0, 20.0])
SOON_OR_NEVER = st.one_of(st.none(), TIMES)
FATES = st.builds(
    Fate, ready_after_s=SOON_OR_NEVER, exits_after_s=SOON_OR_NEVER, code=st.just(1), ignores_sigterm=st.booleans()
)
ORDERS = st.tuples(TIMES, st.sampled_from(["start", "start and leave", "stop", "fail"]), st.sampled_from("ab"))


@given(st.lists(FATES, max_size=10), st.lists(ORDERS, max_size=12), TIMES)
@settings(max_examples=5 * settings().max_examples, deadline=None)
def test_every_child_ends_up_ready_stopped_or_failed(
    fates: list[Fate], orders: list[tuple[float, str, str]], end_after_s: float
) -> None:
    trio.run(_scenario, fates, orders, end_after_s, clock=MockClock(autojump_threshold=0))


async def _scenario(fates: list[Fate], orders: list[tuple[float, str, str]], end_after_s: float) -> None:
    events: list[Event] = []
    spawner = FakeSpawner(fates, afterwards=Fate(ready_after_s=0.01))
    supervisor = Supervisor(on_event=events.append, spawner=spawner)

    def spec(name: str) -> ChildSpec:
        return ChildSpec(
            child_id=name,
            group="group",
            argv=("program",),
            env={},
            probe=PROBE,
            start_timeout_s=5,
            liveness=LivenessPolicy(interval_s=2, timeout_s=1, failures=2),
            restart=RestartPolicy(max_restarts=2, cooldown_s=10),
            stop=StopPolicy(grace_s=1),
        )

    async def obey(at_s: float, order: str, name: str) -> None:
        await trio.sleep(at_s)
        if order == "stop":
            await supervisor.stop(name)
            assert name not in spawner.running or supervisor.snapshot()[name].state is not ChildState.STOPPED
        elif order == "fail":
            snapshot = supervisor.snapshot().get(name)
            if snapshot is not None:
                supervisor.fail(name, snapshot.generation, "reported")
        else:
            with trio.move_on_after(0.3 if order == "start and leave" else 1000):
                try:
                    ready = await supervisor.start(spec(name))
                    assert ready.address == f"address {ready.generation}"
                except (StartFailed, GivenUp):
                    return

    async with trio.open_nursery() as owner:
        await owner.start(supervisor.run)
        with trio.fail_after(5000):
            async with trio.open_nursery() as nursery:
                for order in orders:
                    nursery.start_soon(obey, *order)
            await trio.sleep(end_after_s)
            await trio.sleep(1000)  # by now every start and back-off is over
            assert all(child.state in AT_REST for child in supervisor.snapshot().values())
            for name in ("a", "b"):
                await supervisor.stop(name)
        owner.cancel_scope.cancel()
    assert spawner.running == set()
    assert all(child.state in (ChildState.STOPPED, ChildState.FAILED) for child in supervisor.snapshot().values())
    started = [event.generation for event in events if isinstance(event, Started)]
    assert started == sorted(set(started)), "generations rise"
    assert started == sorted(event.generation for event in events if isinstance(event, Exited))
    for name in ("a", "b"):
        own = [event for event in events if event.child_id == name]
        for event, following in pairwise(own):
            assert not isinstance(event, Stopping) or isinstance(following, Exited | Stopped), "no exit or stop follows"


@given(st.lists(FATES, max_size=6), st.lists(ORDERS, max_size=8), st.floats(0, 10))
@settings(max_examples=3 * settings().max_examples, deadline=None)
def test_cancelling_it_at_any_moment_leaves_no_process(
    fates: list[Fate], orders: list[tuple[float, str, str]], cancel_after_s: float
) -> None:
    async def scenario() -> None:
        with trio.move_on_after(cancel_after_s):
            await _scenario(fates, orders, 0)

    trio.run(scenario, clock=MockClock(autojump_threshold=0))
