"""Whatever is asked of the supervisor and whatever its children do, in whatever order: it comes to rest.

The real state machine in virtual time, over processes that are a table.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from supervisor.lifecycle import Event, Exited, Started, Stopped, Stopping
from supervisor.probe import NotReady
from supervisor.restart import RestartPolicy
from supervisor.spawn import Output, Process
from supervisor.spec import ChildSpec, LivenessPolicy, StopPolicy
from supervisor.supervisor import ChildState, GivenUp, StartFailed, Supervisor

AT_REST = (ChildState.STOPPED, ChildState.FAILED, ChildState.READY)


@dataclass(frozen=True)
class Fate:
    """What becomes of a process: ready after a while or never, dead after a while or never, deaf to SIGTERM."""

    ready_after_s: float | None
    dies_after_s: float | None
    deaf: bool


@dataclass
class FakeProcess:
    """A process by the table: as `supervisor.spawn.Process`, without one."""

    name: str
    generation: int
    fate: Fate
    born_at: float
    on_end: Callable[[], None]
    returncode: int | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    killed: trio.Event = field(default_factory=trio.Event)
    output: Output = field(default_factory=lambda: Output(lambda _line: None))
    pid: int = 1

    def is_stopped(self) -> bool:
        return False

    async def attend(self) -> None:
        with trio.CancelScope(shield=True):
            lifetime_s = self.fate.dies_after_s
            with trio.move_on_at(float("inf") if lifetime_s is None else self.born_at + lifetime_s):
                await self.killed.wait()
            self.returncode = -9 if self.killed.is_set() else 1
            self.on_end()
            self.ended.set()

    async def terminate(self, grace_s: float) -> None:
        if self.fate.deaf:
            with trio.move_on_after(grace_s):
                await self.ended.wait()
        self.killed.set()
        await self.ended.wait()


class ByTheTable:
    """Ready is: its time has come."""

    async def check(self, process: Process) -> str:
        fake = cast(FakeProcess, process)
        ready_after_s = fake.fate.ready_after_s
        if ready_after_s is None or trio.current_time() < fake.born_at + ready_after_s:
            raise NotReady("not yet")
        return "here"


PROBE = ByTheTable()
TIMES = st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0, 20.0])
FATES = st.builds(Fate, st.one_of(st.none(), TIMES), st.one_of(st.none(), TIMES), st.booleans())
ORDERS = st.tuples(TIMES, st.sampled_from(["start", "start and leave", "stop", "fail"]), st.sampled_from("ab"))


@given(st.lists(FATES, max_size=10), st.lists(ORDERS, max_size=12), TIMES)
@settings(max_examples=5 * settings().max_examples, deadline=None)
def test_it_comes_to_rest(fates: list[Fate], orders: list[tuple[float, str, str]], end_after_s: float) -> None:
    trio.run(_scenario, fates, orders, end_after_s, clock=MockClock(autojump_threshold=0))


async def _scenario(fates: list[Fate], orders: list[tuple[float, str, str]], end_after_s: float) -> None:
    alive: dict[str, int] = {"a": 0, "b": 0}
    fate_of = iter(fates)
    events: list[Event] = []

    def spawner(name: str, generation: int, _argv: object, **_more: Any) -> Process:
        alive[name] += 1
        assert alive[name] == 1, "two processes of one child at a time"

        def on_end() -> None:
            alive[name] -= 1

        fate = next(fate_of, Fate(0.01, None, deaf=False))
        return cast(Process, FakeProcess(name, generation, fate, trio.current_time(), on_end))

    supervisor = Supervisor(on_event=events.append, spawner=spawner)

    def spec(name: str) -> ChildSpec:
        return ChildSpec(
            name,
            "group",
            ("program",),
            {},
            PROBE,
            start_timeout_s=5,
            liveness=LivenessPolicy(interval_s=2, timeout_s=1, failures=2),
            restart=RestartPolicy(max_restarts=2, cooldown_s=10),
            stop=StopPolicy(grace_s=1),
        )

    async def obey(at_s: float, order: str, name: str) -> None:
        await trio.sleep(at_s)
        if order == "stop":
            await supervisor.stop(name)
            assert not alive[name] or supervisor.snapshot()[name].state is not ChildState.STOPPED
        elif order == "fail":
            snapshot = supervisor.snapshot().get(name)
            if snapshot is not None:
                supervisor.fail(name, snapshot.generation, "told so")
        else:
            with trio.move_on_after(0.3 if order == "start and leave" else 1000):
                try:
                    ready = await supervisor.start(spec(name))
                    assert ready.address == "here"
                except (StartFailed, GivenUp):
                    return

    async with trio.open_nursery() as owner:
        await owner.start(supervisor.run)
        with trio.fail_after(5000):
            async with trio.open_nursery() as nursery:
                for order in orders:
                    nursery.start_soon(obey, *order)
            await trio.sleep(end_after_s)
            await trio.sleep(1000)  # whatever still backs off or starts has come to its end by now
            assert all(child.state in AT_REST for child in supervisor.snapshot().values())
            for name in ("a", "b"):
                await supervisor.stop(name)
        owner.cancel_scope.cancel()
    assert alive == {"a": 0, "b": 0}
    assert all(child.state in (ChildState.STOPPED, ChildState.FAILED) for child in supervisor.snapshot().values())
    started = [event.generation for event in events if isinstance(event, Started)]
    assert started == sorted(set(started)), "generations rise"
    assert started == sorted(event.generation for event in events if isinstance(event, Exited))
    for name in ("a", "b"):
        own = [event for event in events if event.child_id == name]
        for event, following in pairwise(own):
            assert not isinstance(event, Stopping) or isinstance(following, Exited | Stopped), "not the last word"


@given(st.lists(FATES, max_size=6), st.lists(ORDERS, max_size=8), st.floats(0, 10))
@settings(max_examples=3 * settings().max_examples, deadline=None)
def test_cancelling_it_at_any_moment_leaves_nothing(
    fates: list[Fate], orders: list[tuple[float, str, str]], cancel_after_s: float
) -> None:
    async def scenario() -> None:
        with trio.move_on_after(cancel_after_s):
            await _scenario(fates, orders, 0)

    trio.run(scenario, clock=MockClock(autojump_threshold=0))
