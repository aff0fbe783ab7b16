"""One request for inference, from its place in a queue to the last byte of its answer.

    admitted ──> waiting ──> lease ──> sent ──> first bytes ──> relayed to the end
                    ▲                    │                           │
                    └── server lost, ────┘                           └── server lost: error event, aborted connection
                        retried once

Up to the first bytes the request is `first_bytes.py`'s; from then on its answer is `answer.py`'s. A stream that waits
for them for long is answered with comments meanwhile: `waiting.py`.

Nothing here depends on the web framework: a request comes as an `InferenceRequest` and leaves as an `Answer`.
"""

import logging
from contextlib import suppress

import trio
from msgspec.structs import replace

from nodeagent.errors import BackendUnavailable, ModelLoadTimeout, QueueFull, QueueTimeout, Refusal
from nodeagent.front.activity import Activity
from nodeagent.front.answer import (
    STREAM_HEADERS,
    Answer,
    NotedBody,
    WholeBody,
    answer_headers,
    body_of,
    translated_answer,
    with_type,
)
from nodeagent.front.first_bytes import FirstBytes, InferenceRequest, refuse_poison
from nodeagent.front.poison import PoisonGuard
from nodeagent.front.refusals import refusal_response
from nodeagent.front.running import Running
from nodeagent.front.server_errors import ServerError, needs_translation
from nodeagent.front.tallies import RequestTally, Tallies
from nodeagent.front.waiting import Progress, WaitingBody
from nodeagent.llama_server.relay import Upstream, UpstreamResponse
from nodeagent.releases import Releases
from nodeagent.scheduling.lease import Lease
from nodeagent.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Inference:
    """Serves requests for inference on the scheduler's devices. Counts them in `tallies`, shows them in `running`, and
    remembers the bodies that crash servers."""

    def __init__(self, scheduler: Scheduler[Upstream], activity: Activity | None = None) -> None:
        self._scheduler = scheduler
        self._poison = PoisonGuard()
        self._progress = Progress()
        self.tallies = Tallies(activity)
        self.running = Running()

    async def serve(self, request: InferenceRequest, held: Releases) -> Answer:
        """Queue the request, send it to the server that it gets, and return once the answer's first bytes are here, or
        after its `ping_s`.

        `held` gives back the place in the queue, the lease and the connection to the server when it closes. So
        the caller may be cancelled at any time. Raises a Refusal if the request can't be served, also by none of its
        fallbacks.
        """
        if request.answer is not None:
            return Answer(200, [(b"content-type", b"application/json")], WholeBody(request.answer))
        if not request.fallbacks:
            return await self._serve_counted(request, held)
        try:
            return await self._serve_once(request, held)
        except (BackendUnavailable, ModelLoadTimeout) as refusal:
            for instead in request.fallbacks:
                logger.info("request %s: %s serves it instead: %s", request.request_id, instead.model_id, refusal)
                with suppress(BackendUnavailable, ModelLoadTimeout, QueueFull, QueueTimeout):
                    return await self._serve_once(instead, held)
            raise

    async def _serve_once(self, request: InferenceRequest, held: Releases) -> Answer:
        """Serve the request by its own model. What one that is refused holds is given back at once."""
        own = Releases()
        try:
            answer = await self._serve_counted(request, own)
        except BaseException:
            own.close()
            raise
        held.add(own.close)
        return answer

    async def _serve_counted(self, request: InferenceRequest, held: Releases) -> Answer:
        tally = RequestTally(self.tallies, request)
        held.add(tally.close)
        try:
            answer = await self._serve(request, held, tally)
        except Refusal as refusal:
            tally.refused(refusal)
            if tally.bodies is not None:
                _status, headers, content = refusal_response(refusal, request.request_id, request.dialect)
                tally.bodies.answered(dict(headers).get("content-type", "")).add(content)
            raise
        if tally.bodies is None:
            return answer
        return replace(answer, body=NotedBody(answer.body, tally.bodies.answered(answer.content_type).add))

    async def _serve(self, request: InferenceRequest, held: Releases, tally: RequestTally) -> Answer:
        refuse_poison(request, self._poison)
        ticket = self._scheduler.admit(
            request.request_id, request.model_id, request.priority, request.conversation, slots=request.slots
        )
        held.add(ticket.close)
        first_bytes = FirstBytes(request, ticket, self._scheduler, self._poison, tally)
        held.add(self.running.ended, self.running.add(first_bytes))
        if not request.ping_s:
            return await self._answer(first_bytes, *await first_bytes.wait())
        begun = None
        with trio.move_on_after(request.ping_s):
            begun = await first_bytes.wait()
        if begun is not None:
            return await self._answer(first_bytes, *begun)
        # The head goes out before the server has sent one.
        kind = "text/event-stream" if request.translator is None else request.translator.content_type
        headers = [(b"content-type", kind.encode("ascii")), *STREAM_HEADERS]
        return Answer(200, headers, WaitingBody(first_bytes, self._progress))

    async def _answer(self, first_bytes: FirstBytes, lease: Lease[Upstream], response: UpstreamResponse) -> Answer:
        request = first_bytes.request
        body = body_of(first_bytes, lease, response)
        headers = answer_headers(lease, response)
        if needs_translation(request, response):
            error = ServerError(response.status, request)
            await error.read(body)
            status, content = error.translated()
            return Answer(status, with_type(headers, "application/json"), WholeBody(content))
        if request.translator is None:
            return Answer(response.status, headers, body)
        return await translated_answer(request.translator, lease, headers, body)
