"""The supervisor: children by their ids, in one nursery."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator

import trio

from supervisor.child import Child, ChildSnapshot, ChildState, GivenUp, Spawner, StartFailed
from supervisor.lifecycle import (
    Cause,
    Event,
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
from supervisor.spawn import spawn
from supervisor.spec import ChildSpec
from supervisor.strays import become_subreaper

__all__ = ["ChildSnapshot", "ChildState", "GivenUp", "StartFailed", "Supervisor"]

logger = logging.getLogger(__name__)


class Supervisor:
    """Keeps children alive. `run` has to be running for anything else to work.

    `on_event` is told each transition after the state shows it; `on_line` (child id, generation, line) each line that
    a child prints. Both are called in the event loop and must not block. `records` keeps the children on disk, for
    `supervisor.records.sweep` of a later life. `spawner` starts the processes.
    """

    def __init__(
        self,
        *,
        on_event: Callable[[Event], None] = lambda _event: None,
        on_line: Callable[[str, int, str], None] = lambda _child_id, _generation, _line: None,
        records: Records | None = None,
        spawner: Spawner = spawn,
    ) -> None:
        self._on_event = on_event
        self._on_line = on_line
        self._records = records
        self._spawner = spawner
        self._children: dict[str, Child] = {}
        self._generations: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the children until cancelled; then every one is terminated before this returns."""
        become_subreaper()
        try:
            async with trio.open_nursery() as recording:
                if self._records is not None:
                    recording.start_soon(self._records.run)
                async with trio.open_nursery() as self._nursery:
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            if self._records is not None:
                self._records.write()  # the children's ends came after that of `recording`'s task

    async def start(self, spec: ChildSpec) -> Ready:
        """Return when the child is ready; join its start or restart if one is under way.

        Raises StartFailed as soon as this try failed, with the exit and the last lines (the child is then started
        again as its policy says), GivenUp while it cools down, having failed too often with this very spec, ValueError
        if it runs with another one. Cancelling only stops the waiting: `stop` ends the child.
        """
        # Again after each wait: another start may have been first.
        while (child := self._children.get(spec.child_id)) and child.snapshot.state is ChildState.STOPPING:
            await child.stop()
        if child is None or not child.runs:
            child = self._begin(spec, child)
        elif child.spec != spec:
            raise ValueError(f"{spec.child_id} runs with another spec: stop it first")
        return await child.ready()

    async def stop(self, child_id: str) -> None:
        """End the child, in any state; return when all of its process group is gone.

        A child that was given up on stays failed. Cancelling only stops the waiting: the child ends all the same.
        """
        child = self._children.get(child_id)
        if child is not None:
            await child.stop()

    def fail(self, child_id: str, generation: int, reason: str) -> None:
        """Replace a ready child for a reason that its probe can't see; nothing if that generation is not ready now."""
        child = self._children.get(child_id)
        if child is not None and child.snapshot.state is ChildState.READY and child.snapshot.generation == generation:
            child.fail(Failure(Cause.STALLED, reason))

    def forget(self, child_id: str) -> None:
        """Drop a child that was given up on or stopped, with its past: it can be started at once, and afresh. Nothing
        if it runs."""
        child = self._children.get(child_id)
        if child is not None and not child.runs:
            del self._children[child_id]

    def snapshot(self) -> dict[str, ChildSnapshot]:
        """Every child that was ever started and is not forgotten, as it is now."""
        return {child_id: child.snapshot for child_id, child in self._children.items()}

    def lines(self, child_id: str, last: int = 1000) -> list[str]:
        """The last lines that the child's last generation printed, the oldest first."""
        child = self._children.get(child_id)
        return child.process.output.lines(last) if child is not None and child.process is not None else []

    def _begin(self, spec: ChildSpec, before: Child | None) -> Child:
        assert self._nursery is not None, "Supervisor.run is not running"
        child = Child(spec, self._generations[spec.group], self._emit, self._on_line, self._spawner)
        if before is not None and before.spec == spec:  # another spec has no past
            child.tracker = before.tracker
            self._half_open(before)
        self._children[spec.child_id] = child
        child.begin()
        self._nursery.start_soon(child.run)
        return child

    def _half_open(self, before: Child) -> None:
        """One start is allowed after a child was given up on, once it has cooled down."""
        given_up = before.snapshot
        if given_up.state is not ChildState.FAILED:
            return
        if given_up.retry_at is not None and trio.current_time() < given_up.retry_at:
            raise GivenUp(given_up.child_id, given_up.reason or "failed", given_up.retry_at)
        before.tracker.try_again()

    def _emit(self, event: Event) -> None:
        _log(event)
        if self._records is not None:
            self._record(self._records, event)
        self._on_event(event)

    def _record(self, records: Records, event: Event) -> None:
        child = self._children[event.child_id]
        match event:
            case Started(pid=pid):
                records.add(pid, child.spec.argv)
            case Exited() if child.process is not None:
                records.remove(child.process.pid)


def _log(event: Event) -> None:
    extra = {"child": event.child_id, "generation": event.generation}
    match event:
        case Started(pid=pid):
            logger.info("%s is starting, pid %d", event.child_id, pid, extra=extra)
        case Ready(address=address):
            logger.info("%s is ready at %s", event.child_id, address, extra=extra)
        case Unhealthy(reason=reason):
            logger.warning("%s is unhealthy and is replaced: %s", event.child_id, reason, extra=extra)
        case Exited(exit=end):
            last = end.last_lines[-1] if end.last_lines else "nothing"
            logger.info("%s %s; it last printed: %s", event.child_id, end.reason, last, extra=extra)
        case Restarting(reason=reason):
            logger.warning("%s %s", event.child_id, reason, extra=extra)
        case GaveUp(reason=reason):
            logger.error("%s has failed: %s", event.child_id, reason, extra=extra)
        case Stopped():
            logger.info("%s has stopped", event.child_id, extra=extra)
