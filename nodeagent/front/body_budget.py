"""The limits on request bodies: of one, in size and time, and of all together.

What is promised (`Content-Length`) does not count, only what has arrived: otherwise a few clients that announce long
bodies and send nothing would shut out all others. When the budget is full, the body that arrives the slowest makes room
for one that arrives. A body that has arrived completely is never given up: it is being served.
"""

import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import trio

from nodeagent.errors import BodyTooLarge, BodyTooSlow, ServerBusy, UnsupportedEncoding

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

# A body may take this long, and a second more for each 16 KiB received: enough for a slow line, but not for a client
# that drips bytes to hold a part of the budget.
_BODY_GRACE_S = 60.0
_BODY_BYTES_PER_S = 2**14
# How fast a body arrives is told by its bytes of some seconds: those of this long ago count 1/e.
_LATELY_S = 5.0


class BodyBudget:
    """The bytes of request bodies held by all requests together.

    What changes: `held` and `_arriving` (the bodies of which bytes are held and others missing), by the bodies.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.held = 0
        self._limit_bytes = limit_bytes
        self._arriving: set[RequestBody] = set()

    def refuse_hopeless(self, promised_bytes: int) -> None:
        """Raise ServerBusy if so many bytes would not fit even if all bodies that are arriving made room."""
        if self.held + promised_bytes <= self._limit_bytes:
            return
        complete = self.held - sum(body.held_bytes for body in self._arriving)
        if complete + promised_bytes > self._limit_bytes:
            raise ServerBusy(self._limit_bytes)

    def take(self, body: "RequestBody", count: int) -> None:
        """Count more bytes of this body. Others make room if they arrive more slowly; else raises ServerBusy."""
        if not body.complete:
            self._arriving.add(body)
        while self.held + count > self._limit_bytes:
            slowest = self._slowest(count)
            if slowest is None or slowest is body:
                raise ServerBusy(self._limit_bytes, gave_way=slowest is body)
            slowest.give_way(ServerBusy(self._limit_bytes, gave_way=True))
        self.held += count

    def give_back(self, body: "RequestBody", count: int) -> None:
        self._arriving.discard(body)
        self.held -= count

    def has_arrived(self, body: "RequestBody") -> None:
        """From now on this body makes room for no other."""
        self._arriving.discard(body)

    def _slowest(self, needed_bytes: int) -> "RequestBody | None":
        """The slowest body that is large enough to make the room needed, else the slowest of all."""
        now = trio.current_time()
        return min(
            self._arriving, key=lambda body: (body.held_bytes < needed_bytes, body.bytes_lately(now)), default=None
        )


class RequestBody:
    """Receives a request's body within limits of size and time, and knows how much has arrived."""

    def __init__(self, headers: dict[bytes, bytes], receive: Receive, budget: BodyBudget, limit_bytes: int) -> None:
        self.disconnected = False
        self._declared_bytes = int(headers.get(b"content-length", b"0"))
        self.complete = not self._declared_bytes and b"transfer-encoding" not in headers
        self.held_bytes = 0
        self._encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        self._receive = receive
        self._budget = budget
        self._limit_bytes = limit_bytes
        self._received_bytes = 0
        self._released = False
        self._began = trio.current_time()
        self._bytes_lately = 0.0
        self._latest = self._began  # when `_bytes_lately` was as it is
        self._waiting: trio.CancelScope | None = None
        self._gave_way: ServerBusy | None = None

    def admit(self) -> None:
        """Refuse a body that can't be accepted, before any of it is read."""
        if self.complete:
            return
        if self._encoding.strip().lower() not in ("identity", ""):
            raise UnsupportedEncoding(self._encoding)
        if self._declared_bytes > self._limit_bytes:
            raise BodyTooLarge(self._limit_bytes)
        self._budget.refuse_hopeless(self._declared_bytes)

    def release(self) -> None:
        """Give back its part of the budget. What arrives after this is not kept, and does not count."""
        self._budget.give_back(self, self.held_bytes)
        self.held_bytes = 0
        self._released = True

    def give_way(self, busy: ServerBusy) -> None:
        """Make room for a faster one: give back its part of the budget, and let whoever receives it raise `busy`."""
        self._gave_way = busy
        self.release()
        if self._waiting is not None:
            self._waiting.cancel()

    def bytes_lately(self, now: float) -> float:
        """About how many bytes have arrived in the last few seconds."""
        return self._bytes_lately * math.exp((self._latest - now) / _LATELY_S)

    async def read(self, look: Callable[[bytes], None]) -> bytes:
        """All of it. Raises BodyTooLarge, BodyTooSlow and ServerBusy. `look` gets the first part while the others are
        on their way, and may raise what refuses the request."""
        parts: list[bytes] = []
        more = True
        while more:
            message = await self.receive()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
            if more and len(parts) == 1:
                look(parts[0])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def accept(self, data: bytes) -> None:
        """All of it has arrived already. Raises BodyTooLarge and ServerBusy."""
        self.complete = True
        self._count(len(data))

    async def receive(self) -> Message:
        """The next part, as an ASGI message. Raises as `read` does."""
        if self.complete:
            message = await self._receive()
        else:
            message = await self._receive_in_time()
            if self._gave_way is not None:  # while this message was on its way
                raise _again(self._gave_way)
        if message["type"] == "http.disconnect":
            self.disconnected = True
        else:
            if not message.get("more_body", False):
                self.complete = True
                self._budget.has_arrived(self)
            self._count(len(message.get("body", b"")))
        return message

    async def _receive_in_time(self) -> Message:
        allowed_s = _BODY_GRACE_S + self._received_bytes / _BODY_BYTES_PER_S
        if self._gave_way is None:
            with trio.move_on_at(self._began + allowed_s) as self._waiting:
                return await self._receive()
            self._waiting = None
        if self._gave_way is not None:
            raise _again(self._gave_way)
        raise BodyTooSlow(self._received_bytes, allowed_s)

    def _count(self, arrived_bytes: int) -> None:
        """These have arrived."""
        self._received_bytes += arrived_bytes
        if self._received_bytes > self._limit_bytes:
            raise BodyTooLarge(self._limit_bytes)
        if self._released or not arrived_bytes:
            return
        if not self.complete:
            now = trio.current_time()
            self._bytes_lately = self.bytes_lately(now) + arrived_bytes
            self._latest = now
        self._budget.take(self, arrived_bytes)
        self.held_bytes += arrived_bytes


def _again(busy: ServerBusy) -> ServerBusy:
    """The same error once more. Raised itself it would refer to the body, which refers to it: what has arrived would
    stay until the garbage collector finds both."""
    return ServerBusy(busy.budget_bytes, gave_way=busy.gave_way)
