"""One child's whole life: spawned, ready, watched, ended, restarted.

    STOPPED ──start──> STARTING ──probe passes──> READY ──liveness fails, or `fail`──> UNHEALTHY
                          ▲ │                       │                                      │
                          │ └──exits, or is not ready in time, or exits later──────────────┤
                          │                                                                ▼
                          └──delay over── BACKING_OFF <──restart── (tracker) ──give up──> FAILED ──start──> STARTING

BACKING_OFF ──delay over, but it may not be restarted──> STOPPED
Every state but FAILED ──stop──> STOPPING ──process group gone──> STOPPED.

An unforeseen error in a child's task (its probe, a callback, its records) fails that generation, and nothing else.
"""

import random
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from functools import partial

import trio

from supervisor.attempt import StartAttempt
from supervisor.containment import Containment, described, own_shortage
from supervisor.errors import StartFailed
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
from supervisor.memory import says_out_of_device_memory, says_out_of_memory
from supervisor.output import printable
from supervisor.probe import SUSPENDED_PROBES, wait_ready, watch_liveness
from supervisor.reserve import DescriptorReserve, ProbeWithReserve
from supervisor.restart import GiveUp, Restart, RestartTracker
from supervisor.snapshot import ChildSnapshot, ChildState
from supervisor.spawner import ChildProcess, Spawner
from supervisor.spec import ChildSpec

_LAST_LINES = 20
# A program that aborts may print a backtrace of tens of lines after its reason.
_LINES_OF_AN_ABORT = 100
_STOPPED = Exit(code=None, cause=Cause.STOPPED, reason="was stopped")
_STOPPED_ON_REQUEST = Failure(Cause.STOPPED, "stopped")


class Child:
    """A child and its state.

    What changes: everything, in the task that runs `run`; besides, `prepare` resets what belongs to one run, `stop`
    and `kill` set STOPPING on the way to the end of that task, and `fail` sets `_failure`.
    """

    def __init__(
        self,
        spec: ChildSpec,
        generations: Iterator[int],
        emit: Callable[[Event], None],
        on_line: Callable[[str, int, str], None],
        spawner: Spawner,
        rng: random.Random | None = None,
        *,
        may_restart: Callable[[str], bool] = lambda _child_id: True,
        reserve: DescriptorReserve | None = None,
        other_pids: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.spec = spec
        self.tracker = RestartTracker(spec.restart, rng)
        self.process: ChildProcess | None = None
        self._spawner = spawner
        self._may_restart = may_restart
        self._reserve = reserve or DescriptorReserve(0)
        self._probe = ProbeWithReserve(spec.probe, self._reserve)
        self._other_pids = other_pids
        self._errors = Containment(spec.child_id)
        self._generations = generations
        self._emit = emit
        self._on_line = on_line
        self._attempt = StartAttempt()
        self._scope = trio.CancelScope()
        self._finished = trio.Event()
        self._generation = 0
        self._failure: Failure | None = None
        self._over = trio.Event()
        self._spawned_at: float | None = None
        self._ready_at: float | None = None
        self._set_state(ChildState.STOPPED)

    def __repr__(self) -> str:
        child = self.snapshot
        return f"<Child {child.child_id} {child.state.value} generation={child.generation} pid={child.pid}>"

    @property
    def is_active(self) -> bool:
        """Whether its task runs: the child has a process or is about to get one."""
        return self.snapshot.is_active

    def prepare(self) -> None:
        """Prepare for `run`, which must follow without a checkpoint in between."""
        self._attempt, self._scope, self._finished = StartAttempt(), trio.CancelScope(), trio.Event()
        self._set_state(ChildState.STARTING)

    async def run(self) -> None:
        """Keep the child alive until it is stopped or given up on. If cancelled, end its process first."""
        try:
            with self._scope, self._errors.contained("its supervision", self._give_up):
                await self._run_generations()
        finally:
            if self.is_active:
                self._set_state(ChildState.STOPPED)
                self._fail_attempt(_STOPPED)
                self._report(Stopped)
            self._finished.set()

    async def ready(self) -> Ready:
        """Wait for the current start attempt: return its Ready event, or raise StartFailed."""
        return await self._attempt.outcome()

    def fail(self, failure: Failure) -> None:
        """End this generation because of that failure. The restart policy decides what follows."""
        if not self._over.is_set():
            self._failure = failure
            self._over.set()

    async def stop(self) -> None:
        """End the child in any state; return when its process group is gone. Cancelling only ends the waiting."""
        if self.is_active:
            self._begin_stop()
            await self._finished.wait()

    def kill(self) -> None:
        """End the child at once, by SIGKILL to its process group; `stop` returns when it is gone."""
        if self.is_active:
            self._begin_stop()
            if self.process is not None:
                self.process.kill()

    def _begin_stop(self) -> None:
        if self.snapshot.state is not ChildState.STOPPING:
            self._set_state(ChildState.STOPPING)
            self._report(Stopping)
        self._scope.cancel()

    async def _run_generations(self) -> None:
        """Spawn the child and, whenever it has exited, again, until the tracker gives up."""
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()  # it may have been stopped before this task began
            exit = await self._run_generation()
            await trio.lowlevel.checkpoint_if_cancelled()  # the tracker doesn't count the exit of a stopped child
            match self.tracker.decide(exit, trio.current_time()):
                case Restart(delay_s, reason):
                    retry_at = trio.current_time() + delay_s
                    self._set_state(ChildState.BACKING_OFF, cause=exit.cause, reason=reason, retry_at=retry_at)
                    self._fail_attempt(exit)
                    self._report(Restarting, delay_s=delay_s, cause=exit.cause, reason=reason)
                    await trio.sleep(delay_s)
                    if not self._may_restart(self.spec.child_id):
                        return
                case GiveUp(reason, retry_at):
                    self._set_state(ChildState.FAILED, cause=exit.cause, reason=reason, retry_at=retry_at)
                    self._fail_attempt(exit)
                    self._report(GaveUp, cause=exit.cause, reason=reason, retry_at=retry_at)
                    return

    def _give_up(self, error: Exception) -> None:
        reason = f"unexpected error in its supervision: {described(error)}"
        self._set_state(ChildState.FAILED, cause=Cause.INTERNAL_ERROR, reason=reason)
        self._fail_attempt(Exit(code=None, cause=Cause.INTERNAL_ERROR, reason=reason))
        self._report(GaveUp, cause=Cause.INTERNAL_ERROR, reason=reason, retry_at=None)

    async def _run_generation(self) -> Exit:
        """From the spawn until the process and all of its group are gone."""
        self._generation = next(self._generations)
        self._spawned_at, self._ready_at = trio.current_time(), None
        self._failure, self._over = None, trio.Event()
        self._set_state(ChildState.STARTING)
        process = self._spawn()
        if isinstance(process, Exit):
            self._report(Exited, exit=process)
            return process
        failure: Failure | None = _STOPPED_ON_REQUEST  # unless `_watch` returns
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._attend, process, name=f"attend {process}")
                try:
                    self._set_state(ChildState.STARTING)
                    self._report(Started, pid=process.pid)
                    failure = await self._watch(process)
                finally:
                    await self._end(process)
        finally:
            with self._errors.contained("the search for what it left behind"):
                process.reap_strays(self._other_pids())
            exit = self._exit(process, failure)
            self._report(Exited, exit=exit)
        return exit

    async def _end(self, process: ChildProcess) -> None:
        """End the process, in the grace that its spec gives it; return when it is gone, or it has been killed."""
        contained = self._errors.contained("its termination", lambda _error: process.kill())
        with trio.CancelScope(shield=True), contained:
            await process.terminate(self.spec.stop.grace_s)

    def _spawn(self) -> ChildProcess | Exit:
        """The process, or why there is none."""
        try:
            with self._reserve.released():
                self.process = process = self._spawned()
        except (OSError, ValueError) as error:  # ValueError: an argument has a NUL byte, or can't be encoded
            shortage = own_shortage(error, while_spawning=True)
            cause = Cause.SPAWN_FAILED if shortage is None else Cause.OWN_SHORTAGE
            return Exit(code=None, cause=cause, reason=f"could not be spawned: {printable(str(error))}")
        except Exception as error:
            self._errors.report("its spawn", error)
            cause = Cause.SPAWN_FAILED if own_shortage(error) is None else Cause.OWN_SHORTAGE
            return Exit(code=None, cause=cause, reason=f"could not be spawned: {described(error)}")
        return process

    def _spawned(self) -> ChildProcess:
        spec, generation = self.spec, self._generation
        return self._spawner(
            spec.child_id,
            generation,
            spec.argv,
            env=spec.env,
            cwd=spec.cwd,
            cpus=spec.cpus,
            on_line=self._handle_line,
        )

    def _handle_line(self, line: str) -> None:
        try:
            self._on_line(self.spec.child_id, self._generation, line)
        except Exception as error:  # without `_contained`, which takes longer than most lines do
            place = "the handler of its output"
            self._errors.report(place, error)
            self._fail_in(place, error)

    def _contained(self, place: str) -> AbstractContextManager[None]:
        """An unforeseen error of the block fails this generation."""
        return self._errors.contained(place, partial(self._fail_in, place))

    def _fail_in(self, place: str, error: Exception) -> None:
        self.fail(Failure(Cause.INTERNAL_ERROR, f"unexpected error in {place}: {described(error)}"))

    async def _attend(self, process: ChildProcess) -> None:
        with self._contained("its attendance"):
            await process.attend()
        self._over.set()

    async def _watch(self, process: ChildProcess) -> Failure | None:
        """Return why the process has to be ended, or None once it has exited by itself."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._check_health, process, name=f"check health of {process}")
            await self._over.wait()
            nursery.cancel_scope.cancel()
        if self._failure is not None and self.snapshot.state is ChildState.READY:
            await trio.lowlevel.checkpoint_if_cancelled()  # a stop at this very moment comes first
            self._become_unhealthy(self._failure)
        return self._failure

    async def _check_health(self, process: ChildProcess) -> None:
        """Follow the process through its start and its time as ready, until something is wrong with it."""
        with self._contained("its probe"):
            start = await self._until_ready(process)
            await trio.lowlevel.checkpoint_if_cancelled()  # a stop at this very moment comes first
            if self._over.is_set():
                return  # it has just exited, or failed
            if isinstance(start, str):
                self._become_ready(start)
                start = await watch_liveness(process, self._probe, self.spec.liveness, self._errors)
            self.fail(start)

    async def _until_ready(self, process: ChildProcess) -> str | Failure:
        """Return the child's address once it is ready, or why this start has failed."""
        assert self._spawned_at is not None
        spec = self.spec
        return await wait_ready(
            process,
            self._probe,
            spec.probe_interval_s,
            timeout_s=spec.start_timeout_s,
            timeout_at=self._spawned_at + spec.start_timeout_s,
            suspended_max_s=spec.liveness.interval_s * SUSPENDED_PROBES,
        )

    def _become_ready(self, address: str) -> None:
        self._ready_at = trio.current_time()
        self._set_state(ChildState.READY, address=address)
        ready = Ready(child_id=self.spec.child_id, generation=self._generation, at=self._ready_at, address=address)
        self._attempt.succeed(ready)
        with self._contained("a handler of its events"):
            self._emit(ready)

    def _become_unhealthy(self, failure: Failure) -> None:
        self._set_state(ChildState.UNHEALTHY, cause=failure.cause, reason=failure.reason)
        self._attempt = StartAttempt()
        self._report(Unhealthy, cause=failure.cause, reason=failure.reason)

    def _exit(self, process: ChildProcess, failure: Failure | None) -> Exit:
        """How the process exited; `failure` is why the supervisor ended it, None if it exited by itself."""
        code, reason = process.returncode, _how_it_exited(process.returncode)
        if failure is None:
            cause, reason = _own_end(process, code, reason)
        else:
            cause, reason = failure.cause, f"{failure.reason}; it {reason}"
        ready_s = None if self._ready_at is None else trio.current_time() - self._ready_at
        last_lines = tuple(process.output.lines(_LAST_LINES))
        return Exit(code=code, cause=cause, reason=reason, ready_s=ready_s, last_lines=last_lines)

    def _set_state(
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

    def _fail_attempt(self, exit: Exit) -> None:
        """Tell the callers that wait how the start failed; later ones wait for the next attempt."""
        self._attempt.fail(StartFailed(self.spec.child_id, self._generation, exit))
        self._attempt = StartAttempt()

    def _report(self, kind: Callable[..., Event], **facts: object) -> None:
        event = kind(child_id=self.spec.child_id, generation=self._generation, at=trio.current_time(), **facts)
        with self._contained("a handler of its events"):
            self._emit(event)


def _own_end(process: ChildProcess, code: int | None, how: str) -> tuple[Cause, str]:
    """Why a process ended that the supervisor did not end."""
    limit = process.out_of_memory() if code == -signal.SIGKILL else None
    if limit is not None:
        return Cause.OUT_OF_MEMORY, f"out of memory ({limit}): it {how}"
    lines = process.output.lines(_LINES_OF_AN_ABORT) if code != 0 else []
    if says_out_of_device_memory(lines):
        return Cause.OUT_OF_DEVICE_MEMORY, f"out of device memory: it {how}"
    if says_out_of_memory(lines):
        return Cause.OUT_OF_MEMORY, f"out of memory: it {how}"
    return (Cause.KILLED_BY_SIGNAL if code is not None and code < 0 else Cause.EXITED), how


def _how_it_exited(returncode: int | None) -> str:
    if returncode is None:
        return "did not exit after SIGKILL"
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
