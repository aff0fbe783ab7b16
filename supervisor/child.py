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
from typing import Literal, Protocol

import trio

from supervisor.lifecycle import (
    Cause,
    Event,
    Exit,
    Exited,
    Failure,
    GaveUp,
    Ready,
    Restarting,
    Started,
    Stopped,
    Stopping,
    Unhealthy,
)
from supervisor.probe import LOOKS_STOPPED, Suspended, wait_ready, watch_liveness
from supervisor.restart import GiveUp, Restart, RestartTracker
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSnapshot:
    """A child now. Times are `trio.current_time()`; `since` is when it came into its state.

    `address` is set while ready; `cause` and `reason` say why it is unhealthy, backing off or failed; `retry_at` when
    it is, or may be, started again. `pid` and `spawned_at` are of the last generation.
    """

    child_id: str
    group: str
    state: ChildState
    generation: int
    since: float
    pid: int | None = None
    spawned_at: float | None = None
    address: str | None = None
    cause: Cause | None = None
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
        self._failure: Failure | None = None
        self._failed = trio.Event()
        self._spawned_at: float | None = None
        self._ready_at: float | None = None
        self._become(ChildState.STOPPED)

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

    def fail(self, failure: Failure) -> None:
        """End this generation, which is ready, because of that failure; then it is restarted, or given up on."""
        if not self._failed.is_set():
            self._failure = failure
            self._failed.set()

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
                    retry_at = trio.current_time() + delay_s
                    self._become(ChildState.BACKING_OFF, cause=end.cause, reason=reason, retry_at=retry_at)
                    self._end_try(error=StartFailed(self.spec.child_id, self._generation, end))
                    self._tell(Restarting, delay_s=delay_s, cause=end.cause, reason=reason)
                    await trio.sleep(delay_s)
                case GiveUp(reason, retry_at):
                    self._become(ChildState.FAILED, cause=end.cause, reason=reason, retry_at=retry_at)
                    self._end_try(error=StartFailed(self.spec.child_id, self._generation, end))
                    self._tell(GaveUp, cause=end.cause, reason=reason, retry_at=retry_at)
                    return

    async def _one_generation(self) -> Exit:
        """From a spawn to the end of the process and all of its group."""
        self._generation = next(self._generations)
        self._spawned_at, self._ready_at = trio.current_time(), None
        self._become(ChildState.STARTING)
        try:
            process = self._spawn()
        except OSError as error:
            end = Exit(code=None, cause=Cause.SPAWN_FAILED, reason=f"can't be spawned: {error}")
            self._tell(Exited, exit=end)
            return end
        ended_for: Failure | Literal[Cause.STOPPED] | None = Cause.STOPPED  # unless it turns out otherwise
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.attend)
                try:
                    self._become(ChildState.STARTING)
                    self._tell(Started, pid=process.pid)
                    ended_for = await self._watch(process)
                finally:
                    with trio.CancelScope(shield=True):
                        await process.terminate(self.spec.stop.grace_s)
        finally:
            end_strays(self._mark)
            end = self._exit(process, ended_for)
            self._tell(Exited, exit=end)
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

    async def _watch(self, process: Process) -> Failure | None:
        """Return when the process has ended by itself (None), or why it has to be ended."""
        failure: Failure | None = None

        async def check_health(done: trio.CancelScope) -> None:
            nonlocal failure
            failure = await self._until_it_fails(process)
            done.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(check_health, nursery.cancel_scope)
            await process.ended.wait()
            nursery.cancel_scope.cancel()
        return failure

    async def _until_it_fails(self, process: Process) -> Failure:
        """See the child through its start and its life; return what is wrong with it."""
        start = await self._until_ready(process)
        if isinstance(start, Failure):
            return start
        await trio.lowlevel.checkpoint_if_cancelled()  # a stop at this very moment was reported first
        self._ready_at = trio.current_time()
        self._failed = trio.Event()
        self._become(ChildState.READY, address=start)
        ready = Ready(child_id=self.spec.child_id, generation=self._generation, at=self._ready_at, address=start)
        self._end_try(ready=ready)
        self._emit(ready)
        failure = await self._until_unhealthy(process)
        await trio.lowlevel.checkpoint_if_cancelled()
        self._become(ChildState.UNHEALTHY, cause=failure.cause, reason=failure.reason)
        self._try = _Try()
        self._tell(Unhealthy, cause=failure.cause, reason=failure.reason)
        return failure

    async def _until_ready(self, process: Process) -> str | Failure:
        """Return the address of the child when it is ready, or why this start has failed."""
        assert self._spawned_at is not None
        spec = self.spec
        stopped_max_s = spec.liveness.interval_s * LOOKS_STOPPED
        with trio.move_on_at(self._spawned_at + spec.start_timeout_s):
            try:
                return await wait_ready(process, spec.probe, spec.probe_interval_s, stopped_max_s=stopped_max_s)
            except Suspended as suspended:
                return Failure(Cause.SUSPENDED, f"not ready: {suspended}")
        return Failure(Cause.START_TIMEOUT, f"not ready {spec.start_timeout_s:g} s after its spawn")

    async def _until_unhealthy(self, process: Process) -> Failure:
        """Return what is wrong with a child that was ready: what its probe sees, or what was reported to `fail`."""
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                self.fail(await watch_liveness(process, self.spec.probe, self.spec.liveness))

            nursery.start_soon(watch)
            await self._failed.wait()
            nursery.cancel_scope.cancel()
        assert self._failure is not None
        return self._failure

    def _exit(self, process: Process, ended_for: Failure | Literal[Cause.STOPPED] | None) -> Exit:
        """How the process ended: `ended_for` is why the supervisor ended it, None if it ended by itself."""
        code, how = process.returncode, _how_it_ended(process.returncode)
        match ended_for:
            case Failure(cause, reason):
                how = f"{reason}; it {how}"
            case Cause():
                cause = ended_for
            case None:
                cause = Cause.KILLED_BY_SIGNAL if code is not None and code < 0 else Cause.EXITED
        ready_s = None if self._ready_at is None else trio.current_time() - self._ready_at
        last_lines = tuple(process.output.lines(_LAST_LINES))
        return Exit(code=code, cause=cause, reason=how, ready_s=ready_s, last_lines=last_lines)

    def _become(
        self,
        state: ChildState,
        *,
        address: str | None = None,
        cause: Cause | None = None,
        reason: str | None = None,
        retry_at: float | None = None,
    ) -> None:
        self.snapshot = ChildSnapshot(
            child_id=self.spec.child_id,
            group=self.spec.group,
            state=state,
            generation=self._generation,
            since=trio.current_time(),
            pid=self.process.pid if self.process else None,
            spawned_at=self._spawned_at,
            address=address,
            cause=cause,
            reason=reason,
            retry_at=retry_at,
        )

    def _end_try(self, *, ready: Ready | None = None, error: Exception | None = None) -> None:
        """Tell those who wait how the try went. A child that was ready before it failed has nobody waiting."""
        if not self._try.over.is_set():
            self._try.ready, self._try.error = ready, error
            self._try.over.set()
        if error is not None:
            self._try = _Try()

    def _tell(self, kind: Callable[..., Event], **facts: object) -> None:
        event = kind(child_id=self.spec.child_id, generation=self._generation, at=trio.current_time(), **facts)
        self._emit(event)


_STOPPED = Exit(code=None, cause=Cause.STOPPED, reason="was stopped")


def _how_it_ended(returncode: int | None) -> str:
    if returncode is None:
        return "would not end"
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"
