"""A request's way to the first bytes of its answer: its turn, the sending, and one retry.

    waiting ──lease──> sent ──> first bytes
       ▲                 │
       └── server lost, ─┘
           retried once

A server that crashes before the first byte costs the request one retry; after that byte nothing can be retried. Each
crash is recorded against the request's body (`poison.py`), unless no request can be the cause: the kernel ended the
server for want of memory, say. A server that was stopped on purpose is blamed on no request, and not retried: that
would undo the stop.
"""

import logging

import msgspec
import trio

from nodeagent.errors import (
    BackendCrashed,
    BackendUnavailable,
    ModelLoadTimeout,
    PoisonedRequest,
    RequestCancelled,
    UpstreamLost,
)
from nodeagent.front.endpoints import Dialect
from nodeagent.front.poison import PoisonGuard
from nodeagent.front.tallies import RequestTally
from nodeagent.front.translation import Translator
from nodeagent.llama_server.relay import SentRequest, Upstream, UpstreamResponse, is_loading_answer
from nodeagent.scheduling.lease import Lease, Ticket
from nodeagent.scheduling.queueing import Priority
from nodeagent.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

# A killed server's sockets close a moment before its exit is known. This is how long to wait for the exit. If the
# connection broke but the server lives on (a fault of the server's own), the request is retried after this time.
_EXIT_NOTICE_S = 1.0
_LOADING_RETRY_S = 1.0
_STOPPED_RETRY_S = 1.0


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A valid request. `method`, `path`, `headers` and `body` are sent to the server as they are.

    `slots` is how many of the server's slots it needs: one for each completion that it asks for. `ping_s` is how long
    its client may be left without a byte, 0 for ever: a stream can say something while it waits.
    `streamed` is whether it asks for a stream. `dialect` is the shape of errors. `client_path` is the path that the
    client asked for. With a `translator` the client gets the server's answer in another format; `answer` is the whole
    answer to a request that needs no server. `fallbacks` are the same request for other models, if its own can't be
    served.
    """

    request_id: str
    model_id: str
    priority: Priority = Priority.NORMAL
    conversation: str | None = None
    slots: int = 1
    ping_s: float = 0.0
    streamed: bool = False
    dialect: Dialect = Dialect.OPENAI
    client_path: str = ""
    translator: Translator | None = None
    answer: bytes | None = None
    method: str = "POST"
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    fallbacks: "tuple[InferenceRequest, ...]" = ()


class FirstBytes:
    """The wait for the first bytes of one request's answer.

    What changes: `lease` (once granted), `_sent` (what was sent under it), `_lost` (the server's loss that is not dealt
    with yet, and until when its exit may show) and `_retries_left`, in `wait`; `_sent` in `close` too; `cancelled` in
    `cancel`.
    """

    def __init__(
        self,
        request: InferenceRequest,
        ticket: Ticket[Upstream],
        scheduler: Scheduler[Upstream],
        poison: PoisonGuard,
        tally: RequestTally,
    ) -> None:
        self.request = request
        self.tally = tally
        self.ticket = ticket
        self.poison = poison
        self.lease: Lease[Upstream] | None = None
        self._scheduler = scheduler
        self._sent: SentRequest | None = None
        self._lost: tuple[UpstreamLost, float] | None = None
        self._retries_left = 1
        self.cancelled = False

    async def wait(self) -> tuple[Lease[Upstream], UpstreamResponse]:
        """Return the answer once its first bytes are here; raise a Refusal if there will be none.

        Once cancelled, it may be called again, and goes on where it was: `close` gives the request up.
        """
        while True:
            if self._lost is not None:
                await self._retry(*self._lost)
            lease = self.lease
            if lease is None:
                lease = self.lease = await self.ticket.granted()
                self.tally.granted(lease.device_id, lease.queued_s, lease.load_s)
                # While it waited, other requests with the same body may have crashed servers.
                refuse_poison(self.request, self.poison)
            try:
                response = await self._send(lease)
                self._scheduler.conversations.served(self.request.conversation, lease.device_id)
                self.tally.answered(response.status)
                return lease, response
            except UpstreamLost as lost:
                self._sent = None
                if self.cancelled:
                    raise RequestCancelled(self.request.model_id) from lost
                self._lost = lost, trio.current_time() + _EXIT_NOTICE_S

    def close(self) -> None:
        """Close the connection to the server; the ticket stays."""
        if self._sent is not None:
            self._sent.close()

    def cancel(self) -> None:
        """End the request: `wait` raises RequestCancelled, and an answer that has begun breaks off."""
        self.cancelled = True
        self.ticket.lane.refuse(self.ticket, RequestCancelled(self.request.model_id))
        self.close()

    async def _send(self, lease: Lease[Upstream]) -> UpstreamResponse:
        request = self.request
        if self.cancelled:
            raise RequestCancelled(request.model_id)
        if self._sent is None:
            self._sent = lease.endpoint.request(request.method, request.path, request.headers, request.body)
        response = await self._sent.response()
        if is_loading_answer(response):
            raise ModelLoadTimeout(lease.model_id, lease.device_id, 0.0, _LOADING_RETRY_S)
        return response

    async def _retry(self, lost: UpstreamLost, exit_shows_by: float) -> None:
        """Queue the request again if it may be retried."""
        lease = self.lease
        assert lease is not None
        if lease.endpoint.ends_as_asked:
            raise stopped(lease) from lost
        if self._retries_left:
            logger.warning(
                "%s: lost the server of %s before its first byte (%s); retrying once",
                lease.device_id,
                lease.model_id,
                lost,
            )
        await record_crash(self.poison, self.request, lease, exit_shows_by)
        self._lost = None
        if self.cancelled:
            raise RequestCancelled(self.request.model_id) from lost
        if not self._retries_left:
            raise crashed(lease, lost) from lost
        self._retries_left -= 1
        self.lease = None
        self._scheduler.requeue(self.ticket)


def refuse_poison(request: InferenceRequest, poison: PoisonGuard) -> None:
    """Raise PoisonedRequest if servers have crashed on this body."""
    blocked_s = poison.blocked_s(request.body, trio.current_time()) if poison else 0.0
    if blocked_s:
        raise PoisonedRequest(request.model_id, blocked_s)


async def record_crash(
    poison: PoisonGuard, request: InferenceRequest, lease: Lease[Upstream], exit_shows_by: float | None = None
) -> None:
    """Wait until the server's exit is known, so that the retry does not get the same dead server, and blame the body
    for it if a request can be the cause."""
    with trio.move_on_at(trio.current_time() + _EXIT_NOTICE_S if exit_shows_by is None else exit_shows_by):
        await lease.endpoint.closed.wait()
        if lease.endpoint.blameless_end is None:
            poison.record_crash(request.body, trio.current_time())


def stopped(lease: Lease[Upstream]) -> BackendUnavailable:
    """The refusal when the server was stopped on purpose."""
    return BackendUnavailable(lease.model_id, f"its server on {lease.device_id} was stopped", _STOPPED_RETRY_S)


def crashed(lease: Lease[Upstream], lost: UpstreamLost) -> BackendCrashed:
    """The refusal when the server was lost."""
    return BackendCrashed(lease.model_id, lease.device_id, lease.endpoint.blameless_end or lost.reason)
