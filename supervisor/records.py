"""The running children on disk, so that the next run can kill those that a killed supervisor left behind.

A record is (pid, start time, argv). A process is killed only if it matches all three, since pids are reused.
"""

import json
import logging
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import trio

logger = logging.getLogger(__name__)

# psutil computes start times from clock ticks (10 ms) and the boot time, which moves when the wall clock is set.
_START_TOLERANCE_S = 2.0


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
            self._changed = trio.Event()
            # In a thread: a disk can hang.
            error = await trio.to_thread.run_sync(self.write, abandon_on_cancel=True)
            if error is not None and not failing:
                logger.warning("running children can't be recorded in %s: %s", self._path, error)
            failing = error is not None

    def write(self) -> str | None:
        """Write the file; return what went wrong, None if nothing did."""
        scratch = self._path.with_suffix(".new")
        try:
            scratch.write_text(json.dumps([asdict(record) for record in list(self._running.values())]))
            scratch.replace(self._path)
        except OSError as error:
            return error.strerror or str(error)
        return None


def sweep(path: Path) -> list[int]:
    """Kill the processes that a dead supervisor recorded in this file and that still run; return their pids.

    The caller must know, for instance by a lock, that no supervisor uses the file.
    """
    killed = []
    for record in _read(path):
        if _still_runs(record):
            logger.warning("killing process %d, left behind by an earlier run: %s", record.pid, record.argv[0])
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
    try:
        return [Record(it["pid"], it["started_at"], tuple(it["argv"])) for it in json.loads(path.read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s can't be read, so no left-over process is killed: %s", path, error)
        return []


def _still_runs(record: Record) -> bool:
    try:
        process = psutil.Process(record.pid)
        same_start = abs(process.create_time() - record.started_at) < _START_TOLERANCE_S
        # The program's name may have been resolved to a path.
        return same_start and tuple(process.cmdline()[1:]) == record.argv[1:] and len(record.argv) > 0
    except psutil.Error:
        return False
