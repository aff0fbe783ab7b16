"""What each request for inference took, one record for each that has ended.

`Activity` keeps the last ones; `activity_file.py` writes them into a file, where one is configured. Bodies are in no
record and no file: `bodies.py` keeps them beside the records, where that is configured.
"""

from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import trio

from nodeagent.front.bodies import Bodies, KeptBodies
from nodeagent.timestamps import rfc3339

DEFAULT_RECORDS: Final = 1000
_USER_AGENT_CHARS: Final = 200
# To how many places of decimals figures are shown.
_PLACES: Final = {"queue_ms": 1, "load_ms": 1, "first_token_ms": 1, "duration_ms": 1, "tokens_per_s": 2}


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request. `began_at` is in seconds since the epoch. `status` is HTTP's, 499 if the client left before its
    answer was complete. `error` is the code of a refusal, or why the answer is not complete. What is unknown is None.
    """

    id: int
    request_id: str
    began_at: float
    path: str
    key_name: str | None = None
    model_id: str | None = None
    device_id: str | None = None
    queue_ms: float | None = None
    load_ms: float | None = None
    first_token_ms: float | None = None
    duration_ms: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    tokens_per_s: float | None = None
    status: int
    error: str | None = None
    streamed: bool = False
    user_agent: str | None = None


class Activity:
    """The last `max_records` records. Each gets a number that rises with each, also over restarts of the agent.

    `bodies` are those of some of them. `settle` is called before anything is looked at: it adds what has not been added
    yet. What changes: `_records` and `_last_id` in `add` and `recall`; once each, by their owners, `settle` and `sink`,
    which gets each new record.
    """

    def __init__(self, max_records: int = DEFAULT_RECORDS) -> None:
        self.max_records = max_records
        self.bodies = Bodies()
        self.sink: Callable[[Record], None] | None = None
        self.settle: Callable[[], None] = lambda: None
        self._records: deque[Record] = deque(maxlen=max_records)
        self._last_id = 0
        self._more: trio.Event | None = None

    @property
    def last_id(self) -> int:
        """The number of the newest record, 0 if there was none yet. The next one has the number that follows."""
        self.settle()
        return self._last_id

    @property
    def is_watched(self) -> bool:
        """Whether somebody waits for the next record."""
        return self._more is not None or self.sink is not None

    def recall(self, records: Iterable[Record]) -> None:
        """Take over the records of earlier runs, the oldest first."""
        self._records.extend(records)
        if self._records:
            self._last_id = self._records[-1].id

    def add(self, record: Record, kept: KeptBodies | None = None) -> None:
        """Keep one more record, whose number follows `last_id`, and its bodies if there are any."""
        self._last_id = record.id
        self._records.append(record)
        if kept is not None:
            self.bodies.keep(record.id, kept, oldest=self._records[0].id)
        if self.sink is not None:
            self.sink(record)
        if self._more is not None:
            self._more.set()
            self._more = None

    def newest(self, wanted: Callable[[Record], bool], *, limit: int, since: int = 0) -> list[Record]:
        """The newest records with a number above `since` that are wanted, the newest first, at most `limit`."""
        self.settle()
        found: list[Record] = []
        for record in reversed(self._records):
            if record.id <= since or len(found) == limit:
                break
            if wanted(record):
                found.append(record)
        return found

    def find(self, number: int) -> Record | None:
        """The record with that number, None if there is none (any more)."""
        self.settle()
        return next((record for record in reversed(self._records) if record.id == number), None)

    async def more_than(self, number: int) -> None:
        """Return once there is a record with a higher number."""
        while self.last_id <= number:
            if self._more is None:
                self._more = trio.Event()
            await self._more.wait()


def as_json(record: Record) -> dict[str, Any]:
    """A record as `/v1/node/activity` shows it."""
    shown = {field: getattr(record, field) for field in record.__struct_fields__}
    for field, places in _PLACES.items():
        if shown[field] is not None:
            shown[field] = round(shown[field], places)
    time = rfc3339(datetime.fromtimestamp(shown.pop("began_at"), UTC))
    return {"id": shown.pop("id"), "request_id": shown.pop("request_id"), "time": time, **shown}


def user_agent_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The client's program by its headers (names in lower case), shortened, without control characters."""
    for name, value in headers:
        if name == b"user-agent":
            text = value.decode("latin-1")[:_USER_AGENT_CHARS]
            return text if text.isprintable() else "".join(one if one.isprintable() else "?" for one in text)
    return None
