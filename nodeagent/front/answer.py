"""An answer that has begun: its status, its headers, and its body chunk by chunk as the server sends it."""

import logging
from dataclasses import dataclass
from typing import Protocol, TypeVar

import trio

from nodeagent.errors import Refusal, UpstreamLost
from nodeagent.front.exchange import AbortResponse
from nodeagent.front.first_bytes import FirstBytes, crashed, record_crash, stopped
from nodeagent.front.refusals import error_event
from nodeagent.llama_server.relay import Upstream, UpstreamResponse
from nodeagent.scheduling.lease import Lease

logger = logging.getLogger(__name__)

B = TypeVar("B")

# nginx would buffer a stream, and caches might store it.
STREAM_HEADERS = (("X-Accel-Buffering", "no"), ("Cache-Control", "no-cache"))


class Body(Protocol):
    """The body of an answer."""

    @property
    def at_end(self) -> bool:
        """Whether there are no more chunks."""

    def __aiter__(self) -> "Body": ...

    async def __anext__(self) -> bytes: ...

    async def read(self) -> bytes:
        """The next chunk; b"" if there was none before the end. Raises AbortResponse. Not to be called `at_end`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer whose first bytes are there."""

    status: int
    headers: list[tuple[str, str]]
    body: Body


class Chunks:
    """What makes a body iterable, as Quart reads it; ends with the first empty chunk."""

    def __aiter__(self: B) -> B:
        return self

    async def __anext__(self: Body) -> bytes:
        chunk = b"" if self.at_end else await self.read()
        if not chunk:
            raise StopAsyncIteration
        return chunk


class AnswerBody(Chunks):
    """The body as the server sends it.

    If the server is lost, an event stream gets an error event, and the connection is then aborted in any case: clients
    take a clean end for success.
    """

    def __init__(self, first_bytes: FirstBytes, lease: Lease[Upstream], response: UpstreamResponse) -> None:
        self._response = response
        self._lease = lease
        self._request = first_bytes.request
        self._poison = first_bytes.poison
        self._tally = first_bytes.tally
        self._lost: UpstreamLost | None = None
        self.at_end = False

    async def read(self) -> bytes:
        """See `Body.read`."""
        if self._lost is not None:
            raise AbortResponse(str(self._lost)) from self._lost
        try:
            chunk = await self._response.next_chunk()
        except UpstreamLost as lost:
            self._lost = lost
            self._tally.lost()
            return await self._error_event(lost)
        self._tally.passed(chunk or b"")
        if chunk is None or self._response.complete:
            self.at_end = True
            self._tally.completed()
            self._poison.record_success(self._request.body)
        return chunk or b""

    async def _error_event(self, lost: UpstreamLost) -> bytes:
        """Tell a client that reads events why its answer ends; raise AbortResponse for any other client."""
        lease = self._lease
        logger.warning("%s: lost the server of %s in mid-answer: %s", lease.device_id, lease.model_id, lost)
        if not lease.endpoint.ends_as_asked:
            await record_crash(self._poison, self._request, lease)
        if not self._response.event_stream:
            raise AbortResponse(str(lost)) from lost
        reason: Refusal = stopped(lease) if lease.endpoint.ends_as_asked else crashed(lease, lost)
        return error_event(reason, self._request.request_id, self._request.dialect)


class WholeBody(Chunks):
    """A body that is there already."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at_end = False

    async def read(self) -> bytes:
        """See `Body.read`."""
        self.at_end = True
        return self._content


def answer_headers(lease: Lease[Upstream], response: UpstreamResponse) -> list[tuple[str, str]]:
    """The server's headers, where the request was served, and how long each phase took up to the first byte."""
    server_s = trio.current_time() - lease.granted_at
    phases = {"queue": lease.queued_s, "load": lease.load_s, "server": server_s}
    headers = [
        *response.headers,
        ("X-Node-Model", lease.model_id),
        ("X-Node-Device", lease.device_id),
        ("X-Node-Queue-Ms", f"{lease.queued_s * 1000:.0f}"),
        ("X-Node-Load-Ms", f"{lease.load_s * 1000:.0f}"),
        # In milliseconds: https://www.w3.org/TR/server-timing/
        ("Server-Timing", ", ".join(f"{phase};dur={took_s * 1000:.1f}" for phase, took_s in phases.items())),
    ]
    return [*headers, *STREAM_HEADERS] if response.event_stream else headers
