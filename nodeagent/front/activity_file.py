"""The records of activity in an SQLite file: they last over restarts, and other programs can read them.

The file is written in a thread, at most once a second. If it can't be, a warning says so once; requests go on.
"""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec
import trio

from nodeagent.containment import Containment
from nodeagent.front.activity import Activity, Record

logger = logging.getLogger(__name__)

MAX_ROWS: Final = 100_000
_WRITE_S: Final = 1.0
# What waits for a disk that hangs.
_MOST_WAITING: Final = 10_000
_BUSY_S: Final = 5.0

_FIELDS: Final = Record.__struct_fields__
_CREATE: Final = f"CREATE TABLE IF NOT EXISTS activity ({', '.join(('id INTEGER PRIMARY KEY', *_FIELDS[1:]))})"
_INSERT: Final = f"INSERT OR REPLACE INTO activity ({', '.join(_FIELDS)}) VALUES ({', '.join('?' * len(_FIELDS))})"
_SELECT: Final = f"SELECT {', '.join(_FIELDS)} FROM activity ORDER BY id DESC LIMIT ?"
_PRUNE: Final = "DELETE FROM activity WHERE id <= (SELECT max(id) FROM activity) - ?"


class ActivityFile:
    """Writes each new record of an activity into a file. What changes: `_waiting`, in `_take` and `_write`."""

    def __init__(self, path: Path, activity: Activity, *, max_rows: int = MAX_ROWS) -> None:
        self._path = path
        self._activity = activity
        self._max_rows = max_rows
        self._waiting: list[Record] = []
        self._lost = 0
        self._can_write = True
        self._containment = Containment("writing the activity")

    def open(self) -> None:
        """Read the last records of earlier runs into the activity. Blocks. A file that is damaged is set aside."""
        try:
            try:
                records = self._read()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                aside = self._path.with_name(f"{self._path.name}.damaged")
                logger.warning("%s is damaged (%s): it is set aside as %s", self._path, error, aside.name)
                self._path.replace(aside)
                records = self._read()
        except (OSError, sqlite3.Error) as error:
            logger.warning("%s can't be used, so the activity is kept in memory only: %s", self._path, error)
            return
        self._activity.recall(reversed(records))
        self._activity.sink = self._take

    async def run(
        self, *, write_s: float = _WRITE_S, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Write what is new until cancelled, then a last time."""
        task_status.started()
        try:
            while True:
                await trio.sleep(write_s)
                with self._containment:
                    records, self._waiting = self._waiting, []
                    if records:
                        await trio.to_thread.run_sync(self._write, records)
        finally:
            if self._waiting:
                self._write(self._waiting)

    def _take(self, record: Record) -> None:
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(record)

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=_BUSY_S)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(_CREATE)
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _read(self) -> list[Record]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as database:
            rows = database.execute(_SELECT, (self._activity.max_records,)).fetchall()
        try:
            return [msgspec.convert(dict(zip(_FIELDS, row, strict=True)), Record, strict=False) for row in rows]
        except msgspec.ValidationError as error:
            raise sqlite3.DatabaseError(f"it holds other values: {error}") from error

    def _write(self, records: list[Record]) -> None:
        try:
            with closing(self._connect()) as database, database:
                database.executemany(_INSERT, [msgspec.structs.astuple(record) for record in records])
                database.execute(_PRUNE, (self._max_rows,))
        except sqlite3.Error as error:
            if self._can_write:
                logger.warning("%s can't be written, so some activity is in memory only: %s", self._path, error)
            self._can_write = False
        else:
            self._can_write = True
