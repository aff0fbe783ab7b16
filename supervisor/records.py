"""The children that run, on disk: so that a later life can end what a killed one left behind.

A record is (pid, start time, argv). Only what matches all three is ended: pids are used again.
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

# psutil computes start times from clock ticks (10 ms) and the boot time, which moves with the wall clock's corrections.
_START_TOLERANCE_S = 2.0


@dataclass(frozen=True, slots=True)
class Record:
    """A process: `started_at` is psutil's create_time, seconds since the epoch."""

    pid: int
    started_at: float
    argv: tuple[str, ...]


class Records:
    """The records of one supervisor, in one file that is its alone.

    What changes: `_running` in `add` and `remove`, the file in `run` and `write`. A disk that is full or gone costs a
    warning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._running: dict[int, Record] = {}
        self._changed = trio.Event()

    def add(self, pid: int, argv: tuple[str, ...]) -> None:
        try:
            started_at = psutil.Process(pid).create_time()
        except (psutil.Error, OSError):
            return  # it has ended already, or no descriptor is left to look with
        self._running[pid] = Record(pid, started_at, argv)
        self._changed.set()

    def remove(self, pid: int) -> None:
        if self._running.pop(pid, None) is not None:
            self._changed.set()

    async def run(self) -> None:
        """Keep the file in step until cancelled."""
        troubled = False
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            # In a thread: a disk can hang.
            fault = await trio.to_thread.run_sync(self.write, abandon_on_cancel=True)
            if fault is not None and not troubled:
                logger.warning("the children can't be recorded in %s: %s; going on without", self._path, fault)
            troubled = fault is not None

    def write(self) -> str | None:
        """Write down those that run now; return what went wrong, None if nothing did."""
        scratch = self._path.with_suffix(".new")
        try:
            scratch.write_text(json.dumps([asdict(record) for record in list(self._running.values())]))
            scratch.replace(self._path)
        except OSError as error:
            return error.strerror or str(error)
        return None


def sweep(path: Path) -> list[int]:
    """End what a dead supervisor recorded in this file and what still runs; return the pids. The caller holds whatever
    lock says that it is dead."""
    ended = []
    for record in _read(path):
        if _still_runs(record):
            logger.warning("ending process %d, left behind by an earlier life: %s", record.pid, record.argv[0])
            _end(record.pid)
            ended.append(record.pid)
    return ended


def _end(pid: int) -> None:
    """Its group, which it leads; what does not any more is ended alone. It may end by itself at any moment."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError) as error:
            logger.debug("process %d can't be ended by %s: %s", pid, kill.__name__, error)
        else:
            return


def _read(path: Path) -> list[Record]:
    try:
        return [Record(it["pid"], it["started_at"], tuple(it["argv"])) for it in json.loads(path.read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s can't be read, so nothing is swept: %s", path, error)
        return []


def _still_runs(record: Record) -> bool:
    try:
        process = psutil.Process(record.pid)
        same_start = abs(process.create_time() - record.started_at) < _START_TOLERANCE_S
        # The first word may have been resolved to a path.
        return same_start and tuple(process.cmdline()[1:]) == record.argv[1:] and len(record.argv) > 0
    except psutil.Error:
        return False
