"""The running children on disk, so that the next run can kill those that a killed supervisor left behind.

A record is (pid, start time, argv). A process is killed only if it matches all three, since pids are reused.
"""

import json
import logging
import os
import signal
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import trio

from supervisor.output import printable

logger = logging.getLogger(__name__)

# psutil computes start times from clock ticks (10 ms) and the boot time, which moves when the wall clock is set.
_START_TOLERANCE_S = 2.0
# What Linux allows at most (PID_MAX_LIMIT); others allow less.
_PID_MAX = 2**22
# The year 33,658: what is beyond it is no time.
_STARTED_MAX = 1e12
# When one child ends another often starts: the file is written once for both.
_SETTLE_S = 0.02
# Twenty children with long command lines take some 100 KB.
_BYTES_MAX = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Record:
    """A process: `started_at` is psutil's create_time, seconds since the epoch."""

    pid: int
    started_at: float
    argv: tuple[str, ...]


class Records:
    """The records of one supervisor, in a file that nothing else writes.

    What changes: `_running` in `add` and `remove`, the file in `run` and `write`. If the file can't be written, that is
    logged once as a warning, and the children run on unrecorded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._running: dict[int, Record] = {}
        self._changed = trio.Event()

    def add(self, pid: int, argv: tuple[str, ...]) -> None:
        try:
            started_at = psutil.Process(pid).create_time()
        except (psutil.Error, OSError):
            return  # it has already exited, or no file descriptor is free
        self._running[pid] = Record(pid, started_at, argv)
        self._changed.set()

    def remove(self, pid: int) -> None:
        if self._running.pop(pid, None) is not None:
            self._changed.set()

    async def run(self) -> None:
        """Write the file after each change, until cancelled."""
        failing = False
        while True:
            await self._changed.wait()
            await trio.sleep(_SETTLE_S)
            self._changed = trio.Event()
            # In a thread: a disk can hang.
            error = await self._write_in_thread()
            if error is not None and not failing:
                logger.warning("running children can't be recorded in %s: %s", self._path, error)
            failing = error is not None

    async def _write_in_thread(self) -> str | None:
        try:
            return await trio.to_thread.run_sync(self.write, abandon_on_cancel=True)
        except RuntimeError as error:  # no thread can be started
            return str(error)

    def write(self) -> str | None:
        """Write the file; return what went wrong, None if nothing did."""
        scratch = self._path.with_suffix(".new")
        try:
            scratch.write_text(json.dumps([asdict(record) for record in list(self._running.values())]))
            scratch.replace(self._path)
        except OSError as error:
            return error.strerror or str(error)
        except Exception as error:  # whatever it is, the children run on unrecorded
            return repr(error)
        return None


def sweep(path: Path) -> list[int]:
    """Kill the processes that a dead supervisor recorded in this file and that still run; return their pids.

    The caller must know, for instance by a lock, that no supervisor uses the file.
    """
    killed = []
    for record in _read(path):
        if _still_runs(record):
            program = printable(record.argv[0])
            logger.warning("killing process %d, left behind by an earlier run: %s", record.pid, program)
            _kill(record.pid)
            killed.append(record.pid)
    return killed


def _kill(pid: int) -> None:
    """Kill the process group that the process leads; if it no longer leads one, the process alone."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError) as error:
            logger.debug("process %d can't be killed by %s: %s", pid, kill.__name__, error)
        else:
            return


def _read(path: Path) -> list[Record]:
    """The records in the file, which may be damaged, or made to do harm."""
    try:
        entries = json.loads(_content(path))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s can't be read, so no left-over process is killed: %s", path, printable(str(error)))
        return []
    if not isinstance(entries, list):
        logger.warning("%s holds no list, so no left-over process is killed", path)
        return []
    records = [record for entry in entries if (record := _record(entry)) is not None]
    if len(records) < len(entries):
        damaged = len(entries) - len(records)
        logger.warning("%s: %d records are damaged; no left-over process is killed for them", path, damaged)
    return records


def _content(path: Path) -> str:
    # A pipe without a writer would block the opening, a device might never end.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(_BYTES_MAX + 1)
    if len(content) > _BYTES_MAX:
        raise ValueError(f"it has more than {_BYTES_MAX} bytes")
    return content.decode("utf-8")


def _record(entry: object) -> Record | None:
    """The record, if it is one of a process that may be killed: never ourselves, our group, or the first process."""
    match entry:
        case {"pid": int(pid), "started_at": int() | float() as started_at, "argv": [str(), *_] as argv}:
            pass
        case _:
            return None
    untouchable = {os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0)}
    if isinstance(pid, bool) or not 1 < pid <= _PID_MAX or pid in untouchable:
        return None
    if not all(isinstance(argument, str) for argument in argv) or not abs(started_at) < _STARTED_MAX:
        return None
    return Record(pid, float(started_at), tuple(argv))


def _still_runs(record: Record) -> bool:
    try:
        process = psutil.Process(record.pid)
        same_start = abs(process.create_time() - record.started_at) < _START_TOLERANCE_S
        # The program's name may have been resolved to a path.
        return same_start and tuple(process.cmdline()[1:]) == record.argv[1:]
    except (psutil.Error, OSError) as error:
        logger.debug("process %d can't be looked at: %s", record.pid, error)
        return False
