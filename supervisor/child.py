"""One child's whole life: spawned, ready, watched, ended, started again.

    STOPPED ──start──> STARTING ──probe passes──> READY ──fails its liveness──> UNHEALTHY
                          ▲ │                       │                              │
                          │ └──────exits, or is never ready, or dies───────────────┤
                          │                                                        ▼
                          └──delay over── BACKING_OFF <──restart── (tracker) ──give up──> FAILED ──start──> STARTING

Any state but FAILED ──stop──> STOPPING ──gone──> STOPPED.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import trio

from supervisor.lifecycle import Event, Exited, GaveUp, Ready, Restarting, Started, Stopped, Stopping, Unhealthy
from supervisor.probe import LOOKS_STOPPED, NotReady, wait_ready, watch_liveness
from supervisor.restart import Exit, GiveUp, Restart, RestartTracker
from supervisor.spawn import Process, spawn
from supervisor.spec import ChildSpec
from supervisor.strays import end_strays, marked

_LAST_LINES = 20


class ChildState(Enum):
    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    STOPPING = "stopping"
    BACKING_OFF = "backing_off"
    FAILED = "failed"
    STOPPED = "stopped"


class StartFailed(Exception):
    """This try to start the child failed; the child goes on as its restart policy says."""

    def __init__(self, child_id: str, generation: int, exit: Exit) -> None:
        self.child_id = child_id
        self.generation = generation
        self.exit = exit
        super().__init__(f"{child_id} (generation {generation}): {exit.reason}")


class GivenUp(Exception):
    """The child failed too often, and no start is made before `retry_at` (`trio.current_time()`; None: ever)."""

    def __init__(self, child_id: str, reason: str, retry_at: float | None) -> None:
        self.child_id = child_id
        self.reason = reason
        self.retry_at = retry_at
        super().__init__(f"{child_id}: {reason}")


@dataclass(frozen=True, slots=True)
class ChildSnapshot:
    """A child now. Times are `trio.current_time()`; `since` is when it came into its state.

    `address` is set while ready; `reason` says why it is unhealthy, backing off or failed; `retry_at` when it is, or
    may be, started again. `pid` and `spawned_at` are of the last generation.
    """

    child_id: str
    group: str
    state: ChildState
    generation: int
    since: float
    pid: int | None = None
    spawned_at: float | None = None
    address: str | None = None
    reason: str | None = None
    retry_at: float | None = None


class Spawner(Protocol):
    """How a process is started; `supervisor.spawn.spawn` is how it really is."""

    def __call__(
        self,
        name: str,
        generation: int,
        argv: Sequence[str],
        /,
        *,
        env: Mapping[str, str],
        cwd: Path | None,
        cpus: frozenset[int] | None,
        on_line: Callable[[str], None],
    ) -> Process: ...


class _Try:
    """One try to become ready, for those who wait for it."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.ready: Ready | None = None
        self.error: Exception | None = None


class Child:
    """A child and its state. Its own task writes the state, and `stop` on the way to that task's end."""

    def __init__(
        self,
        spec: ChildSpec,
        generations: Iterator[int],
        emit: Callable[[Event], None],
        on_line: Callable[[str, int, str], None],
        spawner: Spawner = spawn,
    ) -> None:
        self.spec = spec
        self._spawner = spawner
        self.tracker = RestartTracker(spec.restart)
        self.process: Process | None = None
        self._generations = generations
        self._emit = emit
        self._on_line = on_line
        self._try = _Try()
        self._living = trio.CancelScope()
        self._over = trio.Event()
        self._generation = 0
        self._mark = ""
        self._failed_because = ""
        self._judged = trio.Event()
        self._spawned_at: float | None = None
        self._ready_at: float | None = None
        self.snapshot = ChildSnapshot(spec.child_id, spec.group, ChildState.STOPPED, 0, trio.current_time())

    @property
    def runs(self) -> bool:
        """Its task lives: it has a process, or is about to."""
        return self.snapshot.state not in (ChildState.STOPPED, ChildState.FAILED)

    def begin(self) -> None:
        """Make ready for `run`, which is to follow without a checkpoint in between."""
        self._try, self._living, self._over = _Try(), trio.CancelScope(), trio.Event()
        self._become(ChildState.STARTING)

    async def run(self) -> None:
        """Keep the child alive until it is stopped or given up on. Cancelling ends its processes first."""
        try:
            with self._living:
                await self._live()
        finally:
            if self.runs:
                self._become(ChildState.STOPPED)
                self._end_try(error=StartFailed(self.spec.child_id, self._generation, _STOPPED))
                self._tell(Stopped)
            self._over.set()

    async def ready(self) -> Ready:
        """Wait for the try under way, or about to be: its Ready, or StartFailed or GivenUp raised."""
        this = self._try
        await this.over.wait()
        if this.ready is None:
            assert this.error is not None
            raise this.error
        return this.ready

    def fail(self, reason: str) -> None:
        """End this generation because of something that its probe can't see; what follows is as after any failure."""
        self._failed_because = reason
        self._judged.set()

    async def stop(self) -> None:
        """End the child in whatever state; return when its process group is gone. Cancelling only stops waiting."""
        if self.runs:
            if self.snapshot.state is not ChildState.STOPPING:
                self._become(ChildState.STOPPING)
                self._tell(Stopping)
            self._living.cancel()
            await self._over.wait()

    async def _live(self) -> None:
        """The story."""
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()  # it may have been stopped before this task began
            end = await self._one_generation()
            await trio.lowlevel.checkpoint_if_cancelled()  # the end of a child that is being stopped counts for nothing
            match self.tracker.decide(end, trio.current_time()):
                case Restart(delay_s, reason):
                    self._become(ChildState.BACKING_OFF, reason=reason, retry_at=trio.current_time() + delay_s)
                    self._end_try(error=StartFailed(self.spec.child_id, self._generation, end))
                    self._tell(Restarting, delay_s, reason)
                    await trio.sleep(delay_s)
                case GiveUp(reason, retry_at):
                    self._become(ChildState.FAILED, reason=reason, retry_at=retry_at)
                    self._end_try(error=StartFailed(self.spec.child_id, self._generation, end))
                    self._tell(GaveUp, reason, retry_at)
                    return

    async def _one_generation(self) -> Exit:
        """From a spawn to the end of the process and all of its group."""
        self._generation = next(self._generations)
        self._spawned_at, self._ready_at = trio.current_time(), None
        self._become(ChildState.STARTING)
        try:
            process = self._spawn()
        except OSError as error:
            end = Exit(None, f"can't be spawned: {error}", None)
            self._tell(Exited, end)
            return end
        verdict: str | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.attend)
                try:
                    self._become(ChildState.STARTING)
                    self._tell(Started, process.pid)
                    verdict = await self._watch(process)
                finally:
                    with trio.CancelScope(shield=True):
                        await process.terminate(self.spec.stop.grace_s)
        finally:
            end_strays(self._mark)
            end = self._exit(process, verdict)
            self._tell(Exited, end)
        return end

    def _spawn(self) -> Process:
        spec, generation = self.spec, self._generation
        env, self._mark = marked(spec.env)
        self.process = self._spawner(
            spec.child_id,
            generation,
            spec.argv,
            env=env,
            cwd=spec.cwd,
            cpus=spec.cpus,
            on_line=lambda line: self._on_line(spec.child_id, generation, line),
        )
        return self.process

    async def _watch(self, process: Process) -> str | None:
        """Return when the process has ended by itself (None), or why it has to be ended."""
        verdict: str | None = None

        async def judge(done: trio.CancelScope) -> None:
            nonlocal verdict
            verdict = await self._judge(process)
            done.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(judge, nursery.cancel_scope)
            await process.ended.wait()
            nursery.cancel_scope.cancel()
        return verdict

    async def _judge(self, process: Process) -> str:
        """See the child through its start and its life; return what is wrong with it."""
        assert self._spawned_at is not None
        stopped_max_s = self.spec.liveness.interval_s * LOOKS_STOPPED
        with trio.move_on_at(self._spawned_at + self.spec.start_timeout_s) as starting:
            try:
                address = await wait_ready(
                    process, self.spec.probe, self.spec.probe_interval_s, stopped_max_s=stopped_max_s
                )
            except NotReady as fault:
                return f"not ready: {fault}"
        if starting.cancelled_caught:
            return f"not ready {self.spec.start_timeout_s:g} s after its spawn"
        await trio.lowlevel.checkpoint_if_cancelled()  # a stop of this very moment has been told already
        self._ready_at = trio.current_time()
        self._become(ChildState.READY, address=address)
        ready = Ready(self.spec.child_id, self._generation, self._ready_at, address)
        self._end_try(ready=ready)
        self._emit(ready)
        reason = await self._unwell(process)
        await trio.lowlevel.checkpoint_if_cancelled()
        self._become(ChildState.UNHEALTHY, reason=reason)
        self._try = _Try()
        self._tell(Unhealthy, reason)
        return reason

    async def _unwell(self, process: Process) -> str:
        """Return what is wrong with a child that was ready: what its probe sees, or what `fail` was told."""
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                self.fail(await watch_liveness(process, self.spec.probe, self.spec.liveness))

            self._judged = trio.Event()
            nursery.start_soon(watch)
            await self._judged.wait()
            nursery.cancel_scope.cancel()
        return self._failed_because

    def _exit(self, process: Process, verdict: str | None) -> Exit:
        ready_s = None if self._ready_at is None else trio.current_time() - self._ready_at
        how = _how_it_ended(process.returncode)
        reason = f"{verdict}; it {how}" if verdict else how
        return Exit(process.returncode, reason, ready_s, tuple(process.output.lines(_LAST_LINES)))

    def _become(
        self,
        state: ChildState,
        *,
        address: str | None = None,
        reason: str | None = None,
        retry_at: float | None = None,
    ) -> None:
        self.snapshot = ChildSnapshot(
            self.spec.child_id,
            self.spec.group,
            state,
            self._generation,
            trio.current_time(),
            self.process.pid if self.process else None,
            self._spawned_at,
            address,
            reason,
            retry_at,
        )

    def _end_try(self, *, ready: Ready | None = None, error: Exception | None = None) -> None:
        """Tell those who wait how the try went. A child that was ready before it failed has nobody waiting."""
        if not self._try.over.is_set():
            self._try.ready, self._try.error = ready, error
            self._try.over.set()
        if error is not None:
            self._try = _Try()

    def _tell(self, kind: Callable[..., Event], *facts: object) -> None:
        self._emit(kind(self.spec.child_id, self._generation, trio.current_time(), *facts))


_STOPPED = Exit(None, "was stopped", None)


def _how_it_ended(returncode: int | None) -> str:
    if returncode is None:
        return "would not end"
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"
