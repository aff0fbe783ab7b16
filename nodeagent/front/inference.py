"""One request for inference, from its place in a queue to the last byte of its answer.

    admitted ──> waiting ──> lease ──> sent ──> first bytes ──> relayed to the end
                    ▲                    │                           │
                    └── server lost, ────┘                           └── server lost: error event, aborted connection
                        retried once

A server that crashes before the first byte costs the request one retry; after that byte nothing can be retried. Each
crash is recorded against the request's body (`poison.py`), unless no request can be the cause: the kernel ended the
server for want of memory, say. A server that was stopped on purpose is blamed on no request, and not retried: that
would undo the stop.

Nothing here depends on the web framework: a request comes as an `InferenceRequest` and leaves as an `Answer`.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass

import trio

from nodeagent.errors import (
    BackendCrashed,
    BackendUnavailable,
    ModelLoadTimeout,
    PoisonedRequest,
    Refusal,
    UpstreamLost,
)
from nodeagent.front.ordinary import AbortResponse
from nodeagent.front.poison import PoisonGuard
from nodeagent.front.refusals import error_event
from nodeagent.llama_server.relay import Upstream, UpstreamResponse, is_loading_answer
from nodeagent.scheduling.lease import Lease, Ticket
from nodeagent.scheduling.queueing import Priority
from nodeagent.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

# A killed server's sockets close a moment before its exit is known. This is how long to wait for the exit. If the
# connection broke but the server lives on (a fault of the server's own), the request is retried after this time.
_EXIT_NOTICE_S = 1.0
_LOADING_RETRY_S = 1.0
_STOPPED_RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRequest:
    """A valid request. `path`, `headers` and `body` are sent to the server as they are.

    `slots` is how many of the server's slots it needs: one for each completion that it asks for.
    """

    request_id: str
    model_id: str
    priority: Priority = Priority.NORMAL
    conversation: str | None = None
    slots: int = 1
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer whose first bytes have arrived."""

    status: int
    headers: list[tuple[str, str]]
    body: "AnswerBody"


class Inference:
    """Serves requests for inference on the scheduler's devices, and remembers the bodies that crash servers."""

    def __init__(self, scheduler: Scheduler[Upstream]) -> None:
        self._scheduler = scheduler
        self._poison = PoisonGuard()

    async def serve(self, request: InferenceRequest, exit_stack: ExitStack) -> Answer:
        """Queue the request, send it to the server that it gets, and return once the answer's first bytes are here.

        `exit_stack` gives back the place in the queue, the lease and the connection to the server when it closes. So
        the caller may be cancelled at any time. Raises a Refusal if the request can't be served.
        """
        self._refuse_poison(request)
        ticket = self._scheduler.admit(
            request.request_id, request.model_id, request.priority, request.conversation, slots=request.slots
        )
        exit_stack.callback(ticket.close)
        lease, response = await self._first_bytes(ticket, request)
        exit_stack.callback(response.close)
        self._scheduler.conversations.served(request.conversation, lease.device_id)
        body = AnswerBody(response, lease, request, self._poison)
        return Answer(response.status, [*response.headers, *_headers(lease, response)], body)

    async def _first_bytes(
        self, ticket: Ticket[Upstream], request: InferenceRequest
    ) -> tuple[Lease[Upstream], UpstreamResponse]:
        """Wait for a lease and for the first bytes of the answer. If the server is lost before them, retry once."""
        lease = await self._lease(ticket, request)
        try:
            return lease, await _send(request, lease)
        except UpstreamLost as lost:
            _refuse_if_stopped(lease, lost)
            logger.warning(
                "%s: lost the server of %s before its first byte (%s); retrying once",
                lease.device_id,
                lease.model_id,
                lost,
            )
            await _record_crash(self._poison, request, lease)
        self._scheduler.requeue(ticket)
        lease = await self._lease(ticket, request)
        try:
            return lease, await _send(request, lease)
        except UpstreamLost as lost:
            _refuse_if_stopped(lease, lost)
            await _record_crash(self._poison, request, lease)
            raise _crashed(lease, lost) from lost

    async def _lease(self, ticket: Ticket[Upstream], request: InferenceRequest) -> Lease[Upstream]:
        """Wait for the request's turn. Meanwhile other requests with the same body may have crashed servers."""
        lease = await ticket.granted()
        self._refuse_poison(request)
        return lease

    def _refuse_poison(self, request: InferenceRequest) -> None:
        blocked_s = self._poison.blocked_s(request.body, trio.current_time())
        if blocked_s:
            raise PoisonedRequest(request.model_id, blocked_s)


class AnswerBody:
    """The body of an answer, chunk by chunk as the server sends it; `at_end` once there are no more.

    If the server is lost, an event stream gets an error event, and the connection is then aborted in any case: clients
    take a clean end for success.
    """

    def __init__(
        self, response: UpstreamResponse, lease: Lease[Upstream], request: InferenceRequest, poison: PoisonGuard
    ) -> None:
        self._response = response
        self._lease = lease
        self._request = request
        self._poison = poison
        self._lost: UpstreamLost | None = None
        self.at_end = False

    def __aiter__(self) -> "AnswerBody":
        return self

    async def __anext__(self) -> bytes:
        chunk = b"" if self.at_end else await self.read()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def read(self) -> bytes:
        """The next chunk; b"" if there was none before the end. Raises AbortResponse. Not to be called `at_end`."""
        if self._lost is not None:
            raise AbortResponse(str(self._lost)) from self._lost
        try:
            chunk = await self._response.next_chunk()
        except UpstreamLost as lost:
            self._lost = lost
            return await self._error_event(lost)
        if chunk is None or self._response.complete:
            self.at_end = True
            self._poison.record_success(self._request.body)
        return chunk or b""

    async def _error_event(self, lost: UpstreamLost) -> bytes:
        """Tell a client that reads events why its answer ends; raise AbortResponse for any other client."""
        lease = self._lease
        logger.warning("%s: lost the server of %s in mid-answer: %s", lease.device_id, lease.model_id, lost)
        if not lease.endpoint.ends_as_asked:
            await _record_crash(self._poison, self._request, lease)
        if not self._response.event_stream:
            raise AbortResponse(str(lost)) from lost
        reason: Refusal = _stopped(lease) if lease.endpoint.ends_as_asked else _crashed(lease, lost)
        return error_event(reason, self._request.request_id)


async def _send(request: InferenceRequest, lease: Lease[Upstream]) -> UpstreamResponse:
    response = await lease.endpoint.open("POST", request.path, request.headers, request.body)
    if is_loading_answer(response):
        response.close()
        raise ModelLoadTimeout(lease.model_id, lease.device_id, 0.0, _LOADING_RETRY_S)
    return response


async def _record_crash(poison: PoisonGuard, request: InferenceRequest, lease: Lease[Upstream]) -> None:
    """Wait until the server's exit is known, so that the retry does not get the same dead server, and blame the body
    for it if a request can be the cause."""
    with trio.move_on_after(_EXIT_NOTICE_S):
        await lease.endpoint.closed.wait()
        if lease.endpoint.blameless_end is None:
            poison.record_crash(request.body, trio.current_time())


def _refuse_if_stopped(lease: Lease[Upstream], lost: UpstreamLost) -> None:
    if lease.endpoint.ends_as_asked:
        raise _stopped(lease) from lost


def _stopped(lease: Lease[Upstream]) -> BackendUnavailable:
    return BackendUnavailable(lease.model_id, f"its server on {lease.device_id} was stopped", _STOPPED_RETRY_S)


def _crashed(lease: Lease[Upstream], lost: UpstreamLost) -> BackendCrashed:
    return BackendCrashed(lease.model_id, lease.device_id, lease.endpoint.blameless_end or lost.reason)


def _headers(lease: Lease[Upstream], response: UpstreamResponse) -> list[tuple[str, str]]:
    """Where the request was served, and how long each phase took up to the first byte."""
    server_s = trio.current_time() - lease.granted_at
    phases = {"queue": lease.queued_s, "load": lease.load_s, "server": server_s}
    headers = [
        ("X-Node-Device", lease.device_id),
        ("X-Node-Queue-Ms", f"{lease.queued_s * 1000:.0f}"),
        ("X-Node-Load-Ms", f"{lease.load_s * 1000:.0f}"),
        # In milliseconds: https://www.w3.org/TR/server-timing/
        ("Server-Timing", ", ".join(f"{phase};dur={took_s * 1000:.1f}" for phase, took_s in phases.items())),
    ]
    if response.event_stream:
        # nginx would buffer the stream, and caches might store it.
        headers += [("X-Accel-Buffering", "no"), ("Cache-Control", "no-cache")]
    return headers
