"""The requests for inference that are queued or in flight: to look at, and to end one of them."""

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import trio

from nodeagent.access.gate import Account
from nodeagent.errors import NoSuchRequest
from nodeagent.front.accounts import account_var
from nodeagent.front.first_bytes import FirstBytes
from nodeagent.timestamps import rfc3339


class Running:
    """Such requests by number. A client may choose its request's id, so that is none of its own.

    What changes: `_requests`, in `add` and `ended`.
    """

    def __init__(self) -> None:
        self._requests: dict[int, tuple[FirstBytes, Account | None]] = {}
        self._numbers = count(1)

    def add(self, first_bytes: FirstBytes) -> int:
        """A request is queued; its number is for `ended`."""
        number = next(self._numbers)
        self._requests[number] = first_bytes, account_var.get()
        return number

    def ended(self, number: int) -> None:
        """A request has ended: its connection to the server is closed, if it is still open."""
        self._requests.pop(number)[0].close()

    def shown(self) -> list[dict[str, Any]]:
        """All of them as JSON, the oldest first."""
        now, wall = trio.current_time(), datetime.now(UTC)
        return [_json(number, it, account, now, wall) for number, (it, account) in self._requests.items()]

    def cancel(self, number: int) -> dict[str, Any]:
        """End a request; its client gets an error that says so. Returns how it was. Raises NoSuchRequest."""
        if number not in self._requests:
            raise NoSuchRequest(number)
        first_bytes, account = self._requests[number]
        shown = _json(number, first_bytes, account, trio.current_time(), datetime.now(UTC))
        first_bytes.cancel()
        return shown


def _json(number: int, first_bytes: FirstBytes, account: Account | None, now: float, wall: datetime) -> dict[str, Any]:
    request, ticket, lease = first_bytes.request, first_bytes.ticket, first_bytes.lease
    age_s = now - ticket.admitted_at
    return {
        "id": number,
        "request_id": request.request_id,
        "key_name": None if account is None else account.name,
        "path": request.client_path or request.path,
        "model_id": request.model_id,
        "device_id": ticket.lane.device_id,
        "priority": request.priority.name.lower(),
        "state": "waiting" if lease is None else "in_flight",
        "since": rfc3339(wall - timedelta(seconds=age_s)),
        "queued_s": round(age_s if lease is None else lease.granted_at - ticket.admitted_at, 3),
        "served_s": None if lease is None else round(now - lease.granted_at, 3),
    }
