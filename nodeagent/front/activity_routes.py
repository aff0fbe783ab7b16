"""`/v1/node/activity`: the records of requests that have ended, filtered, as a list or as they come, and one of them
with its bodies."""

from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import msgspec
import trio
from quart import Blueprint, Response, request

from nodeagent.errors import NoSuchRecord
from nodeagent.front import bodies
from nodeagent.front.activity import Activity, Record, as_json
from nodeagent.front.streams import follows, stream_response
from nodeagent.front.whole_numbers import MOST, whole_number

_LIMIT: Final = 100
_LIMIT_MAX: Final = 1000
_PING_S: Final = 15.0

Wanted = Callable[[Record], bool]


def add_routes(routes: Blueprint, activity: Activity) -> None:
    """Add the routes to a blueprint for operators."""

    @routes.get("/v1/node/activity")
    async def show() -> Response | dict[str, Any]:
        wanted = _filter()
        limit = _number("limit", _LIMIT, low=1, high=_LIMIT_MAX)
        if follows():
            return stream_response(_Stream(activity, _last_seen(activity), wanted), "text/event-stream")
        records = activity.newest(wanted, limit=limit, since=_number("since", 0))
        return {"activity": [_line(activity, record) for record in records]}

    @routes.get("/v1/node/activity/<int:number>")
    async def show_one(number: int) -> dict[str, Any]:
        record = activity.find(number)
        if record is None:
            raise NoSuchRecord(number)
        return as_json(record) | bodies.shown(activity.bodies.find(number))


def _line(activity: Activity, record: Record) -> dict[str, Any]:
    """A record among others: it only says whether its bodies are kept."""
    return as_json(record) | {"has_bodies": record.id in activity.bodies}


def _filter() -> Wanted:
    """Which records the request asks for."""
    args = request.args
    model_id, key_name = args.get("model_id"), args.get("key")
    status = _number("status", 0, low=100, high=599) if "status" in args else None

    def wanted(record: Record) -> bool:
        return (
            model_id in (None, record.model_id)
            and key_name in (None, record.key_name)
            and status in (None, record.status)
        )

    return wanted


def _last_seen(activity: Activity) -> int:
    """The record after which a stream goes on."""
    header = request.headers.get("Last-Event-ID")
    return _number("since", activity.last_id) if header is None else whole_number("Last-Event-ID", header)


def _number(name: str, default: int, *, low: int = 0, high: int = MOST) -> int:
    text = request.args.get(name)
    return default if text is None else whole_number(name, text, low, high)


class _Stream(AsyncIterator[bytes]):
    """Each record after a given one as a server-sent event, without end."""

    def __init__(self, activity: Activity, since: int, wanted: Wanted) -> None:
        self._activity = activity
        self._seen = since if since <= activity.last_id else 0  # a higher one is from another file
        self._wanted = wanted
        self._has_begun = False

    async def __anext__(self) -> bytes:
        if self._has_begun:
            with trio.move_on_after(_PING_S):
                await self._activity.more_than(self._seen)
        # What came before was missed if there are more; the ids show that.
        found = self._activity.newest(self._wanted, limit=_LIMIT_MAX, since=self._seen)
        self._seen = self._activity.last_id
        self._has_begun = True
        events = [
            b"id: %d\nevent: request\ndata: %s\n\n" % (record.id, msgspec.json.encode(_line(self._activity, record)))
            for record in reversed(found)
        ]
        return b"".join(events) or b": nothing new\n\n"  # the head is sent with the first bytes
