"""The supervisor: children by their ids, each in a task of its own. The public face of this package."""

import itertools
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import trio

from supervisor.child import Child
from supervisor.errors import GivenUp, StartFailed
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
    Unhealthy,
)
from supervisor.records import Records
from supervisor.reserve import DescriptorReserve
from supervisor.snapshot import ChildSnapshot, ChildState
from supervisor.spawn import spawn
from supervisor.spawner import Spawner
from supervisor.spec import ChildSpec
from supervisor.strays import become_subreaper

__all__ = ["ChildSnapshot", "ChildState", "GivenUp", "StartFailed", "Supervisor"]

logger = logging.getLogger(__name__)

# The end of the output that is searched for the line that says why a child ended.
_LINES_SEARCHED = 100
_ALL_KILLED = Exit(code=None, cause=Cause.STOPPED, reason="the supervisor has killed all children")


class Supervisor:
    """Keeps children alive. `run` must be running before anything else is called.

    `on_event` is called with each transition, after the snapshot shows it; `on_line` with each line that a child prints
    (child id, generation, line). Both run in the event loop and must not block. `records` keeps the running children on
    disk, for `supervisor.records.sweep` in the next run. `may_restart` is asked, with the child's id, right before a
    child that has ended is spawned again: if it says no, the child is stopped instead. `last_words` picks from the last
    lines of a child that ended by itself the one that the log shows (None if none says anything); by default that is
    the last line. `spawner` starts the processes, and `rng` gives the back-off its jitter.

    While `run` runs, it holds a few file descriptors in reserve, so that a child can be spawned and probed although
    everything else in this process has used up the rest (`supervisor.reserve`).

    What changes: `_children` in `start` and `forget`, `_generations` with each spawn, `_nursery` in `run`,
    `_killed` in `kill_all`.
    """

    def __init__(
        self,
        *,
        on_event: Callable[[Event], None] = lambda _event: None,
        on_line: Callable[[str, int, str], None] = lambda _child_id, _generation, _line: None,
        records: Records | None = None,
        may_restart: Callable[[str], bool] = lambda _child_id: True,
        last_words: Callable[[Sequence[str]], str | None] = lambda lines: next(reversed(lines), None),
        spawner: Spawner = spawn,
        rng: random.Random | None = None,
    ) -> None:
        self._on_event = on_event
        self._on_line = on_line
        self._records = records
        self._may_restart = may_restart
        self._last_words = last_words
        self._spawner = spawner
        self._rng = rng
        self._children: dict[str, Child] = {}
        self._generations: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
        self._nursery: trio.Nursery | None = None
        self._killed = False
        self._reserve = DescriptorReserve()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the children until cancelled; return when each of them has been terminated."""
        become_subreaper()
        try:
            async with trio.open_nursery() as recording:
                if self._records is not None:
                    recording.start_soon(self._records.run, name="records")
                self._reserve.fill()
                async with trio.open_nursery() as self._nursery:
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self._reserve.close()
            if self._records is not None:
                self._records.write()  # the "records" task ended before the last children did

    async def start(self, spec: ChildSpec) -> Ready:
        """Start the child, or join the start or restart in progress; return when it is ready.

        Raises StartFailed as soon as this attempt has failed, with the exit and the last lines; the child is then
        restarted as its policy says. Raises GivenUp while the child cools down after failing too often with the same
        spec, and ValueError if it runs with a different spec. Cancelling only ends the waiting; `stop` ends the child.
        """
        # A loop, since another call of `start` may have been faster after each wait.
        while (child := self._children.get(spec.child_id)) and child.snapshot.state is ChildState.STOPPING:
            await child.stop()
        if child is None or not child.is_active:
            child = self._start_child(spec, child)
        elif child.spec != spec:
            raise ValueError(f"{spec.child_id} runs with a different spec: stop it first")
        return await child.ready()

    async def stop(self, child_id: str) -> None:
        """End the child, in any state; return when its whole process group is gone.

        A child that was given up on stays failed. Cancelling only ends the waiting: the child is ended all the same.
        """
        child = self._children.get(child_id)
        if child is not None:
            await child.stop()

    async def kill_all(self) -> None:
        """End every child at once, by SIGKILL to its process group, and with them `run`; return when all are gone.

        For a second signal, while children are stopping: it cuts their grace. It may be called any number of times, at
        any time. Later starts raise StartFailed. Cancelling only ends the waiting: the signals are sent before it.
        """
        self._killed = True
        children = list(self._children.values())
        for child in children:
            child.kill()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        for child in children:
            await child.stop()

    def fail(self, child_id: str, generation: int, reason: str) -> None:
        """Replace a ready child for a reason that its probe can't see, with cause `stalled`.

        Does nothing unless exactly that generation is ready now.
        """
        child = self._children.get(child_id)
        if child is not None and child.snapshot.state is ChildState.READY and child.snapshot.generation == generation:
            child.fail(Failure(Cause.STALLED, reason))

    def forget(self, child_id: str) -> None:
        """Drop a failed or stopped child with its history, so that it can be started at once. Does nothing if it is
        active."""
        child = self._children.get(child_id)
        if child is not None and not child.is_active:
            del self._children[child_id]

    def snapshot(self) -> dict[str, ChildSnapshot]:
        """Every child that was ever started and not forgotten, as it is now."""
        return {child_id: child.snapshot for child_id, child in self._children.items()}

    def child(self, child_id: str) -> ChildSnapshot | None:
        """That child as it is now, None if it was never started, or forgotten."""
        child = self._children.get(child_id)
        return child.snapshot if child is not None else None

    def lines(self, child_id: str, last: int = 1000) -> list[str]:
        """The last lines that the child's latest generation printed, oldest first."""
        child = self._children.get(child_id)
        return child.process.output.lines(last) if child is not None and child.process is not None else []

    def _start_child(self, spec: ChildSpec, previous: Child | None) -> Child:
        if self._killed:
            raise StartFailed(spec.child_id, 0, _ALL_KILLED)
        assert self._nursery is not None, "Supervisor.run is not running"

        def others() -> list[int]:
            running = [it.process.pid for it in self._children.values() if it.process is not None and it.is_active]
            return [pid for pid in running if child.process is None or pid != child.process.pid]

        child = Child(
            spec,
            self._generations[spec.group],
            self._emit,
            self._on_line,
            self._spawner,
            self._rng,
            may_restart=self._may_restart,
            reserve=self._reserve,
            other_pids=others,
        )
        if previous is not None and previous.spec == spec:  # a different spec starts with a clean record
            child.tracker = previous.tracker
            self._half_open(previous)
        self._children[spec.child_id] = child
        child.prepare()
        self._nursery.start_soon(child.run, name=f"child {spec.child_id}")
        return child

    def _half_open(self, previous: Child) -> None:
        """If the child was given up on, allow one start once it has cooled down; raise GivenUp before that."""
        given_up = previous.snapshot
        if given_up.state is not ChildState.FAILED:
            return
        if given_up.retry_at is not None and trio.current_time() < given_up.retry_at:
            raise GivenUp(given_up.child_id, given_up.reason or "failed", given_up.retry_at)
        previous.tracker.half_open()

    def _emit(self, event: Event) -> None:
        """Log, record and pass on the event. Each is done although another raises; the child contains the errors."""
        errors = []
        for step in (self._log, self._record, self._on_event):
            try:
                step(event)
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("handlers of an event", errors)

    def _record(self, event: Event) -> None:
        records = self._records
        if records is None:
            return
        child = self._children[event.child_id]
        match event:
            case Started(pid=pid):
                records.add(pid, child.spec.argv)
            case Exited() if child.process is not None:
                records.remove(child.process.pid)

    def _log(self, event: Event) -> None:
        extra = {"child": event.child_id, "generation": event.generation}
        match event:
            case Started(pid=pid):
                logger.info("%s is starting, pid %d", event.child_id, pid, extra=extra)
            case Ready(address=address):
                logger.info("%s is ready at %s", event.child_id, address, extra=extra)
            case Unhealthy(reason=reason):
                logger.warning("%s is unhealthy: %s", event.child_id, reason, extra=extra)
            case Exited(exit=exit):
                said = self._said(event.child_id, exit) or "(none)"
                logger.info("%s ended: %s; last words: %s", event.child_id, exit.reason, said, extra=extra)
            case Restarting(reason=reason):
                logger.warning("%s: %s", event.child_id, reason, extra=extra)
            case GaveUp(reason=reason):
                logger.error("%s has failed: %s", event.child_id, reason, extra=extra)
            case Stopped():
                logger.info("%s has stopped", event.child_id, extra=extra)

    def _said(self, child_id: str, exit: Exit) -> str | None:
        if exit.cause is Cause.STOPPED or not exit.last_lines:  # without output it may be one that never came to life
            return next(reversed(exit.last_lines), None)
        return self._last_words(self.lines(child_id, _LINES_SEARCHED))
