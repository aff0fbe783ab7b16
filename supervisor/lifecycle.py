"""What happens to children: why they fail, how they end, and one event for each transition."""

from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """Why a child failed or ended, as a closed set of codes for programs; the `reason` beside it is for people."""

    EXITED = "exited"
    """It exited by itself, with any code."""
    KILLED_BY_SIGNAL = "killed_by_signal"
    """A signal ended it that the supervisor did not send."""
    SPAWN_FAILED = "spawn_failed"
    """The operating system could not start it."""
    START_TIMEOUT = "start_timeout"
    """It was not ready within its `start_timeout_s`."""
    LIVENESS_FAILED = "liveness_failed"
    """It was ready, and then too many liveness probes in a row failed."""
    SUSPENDED = "suspended"
    """It was held by a stop signal (SIGSTOP)."""
    STALLED = "stalled"
    """It was reported through `Supervisor.fail`."""
    STOPPED = "stopped"
    """It was asked to stop."""
    OUT_OF_MEMORY = "out_of_memory"
    """The kernel killed it for want of memory, or it said so itself and exited."""
    OUT_OF_DEVICE_MEMORY = "out_of_device_memory"
    """It said that the memory of a device (a GPU) ran out, and exited."""
    OWN_SHORTAGE = "own_shortage"
    """The supervisor itself was out of file descriptors, processes or memory: no fault of the child."""
    INTERNAL_ERROR = "internal_error"
    """A probe or a callback raised an error that nobody foresaw."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the supervisor ends a child that still runs."""

    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How one generation of a child ended.

    `code` is the exit code, or minus the number of the signal that ended it; None if it could not be spawned, or did
    not even end on SIGKILL. `cause` is why it ended: if the supervisor ended it, why it did so. `reason` is the same
    for people. `ready_s` is how long it had been ready, None if it never was. `last_lines` is the end of its output.
    """

    code: int | None
    cause: Cause
    reason: str
    ready_s: float | None = None
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened to a child. `at` is `trio.current_time()`; `generation` counts the spawns in its group."""

    child_id: str
    generation: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """It was spawned; it is not ready yet."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(Event):
    """Its probe passed; it answers at `address`."""

    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unhealthy(Event):
    """It was ready and still runs, but something is wrong with it; it is about to be ended."""

    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping(Event):
    """It was asked to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited(Event):
    """The process and everything in its process group is gone, or could not be spawned."""

    exit: Exit


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarting(Event):
    """It will be started again in `delay_s`."""

    delay_s: float
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GaveUp(Event):
    """It is not restarted. From `retry_at` on, `Supervisor.start` starts it again (None: no time is set)."""

    cause: Cause
    reason: str
    retry_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """It was stopped as requested."""
