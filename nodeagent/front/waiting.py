"""A stream whose first byte is late: comments keep its line open, since proxies and clients cut a silent one.

    : waiting: place 3 in the queue  ──>  : loading MODEL  ──>  : processing the prompt  ──>  the server's events

The head has been sent by then, so whatever goes wrong is an error event.
"""

import trio

from nodeagent.errors import Refusal
from nodeagent.front.answer import AnswerBody, Chunks, body_of
from nodeagent.front.error_shapes import as_event
from nodeagent.front.exchange import AbortResponse
from nodeagent.front.first_bytes import FirstBytes
from nodeagent.front.refusals import error_event, internal_error_response
from nodeagent.front.server_errors import ServerError
from nodeagent.llama_server.relay import Upstream, UpstreamResponse
from nodeagent.scheduling.lease import Lease, Ticket

# A long queue takes milliseconds to order, and each of its requests asks for its place.
_PLACES_GOOD_S = 1.0


class WaitingBody(Chunks):
    """The body of a stream whose server has sent nothing yet: a comment every `ping_s`, then the server's events.

    What changes: everything, in `read`.
    """

    def __init__(self, first_bytes: FirstBytes, progress: "Progress") -> None:
        self._first_bytes = first_bytes
        self._progress = progress
        self._ping_s = first_bytes.request.ping_s
        self._has_spoken = False
        self._body: AnswerBody | None = None
        self._instead: ServerError | None = None
        self._failure: Exception | None = None

    @property
    def at_end(self) -> bool:
        """Whether there are no more chunks."""
        return self._instead is None and self._body is not None and self._body.at_end

    async def read(self) -> bytes:
        """See `answer.Body.read`."""
        if self._failure is not None:
            raise self._failure
        if self._body is not None and self._instead is None:
            return await self._body.read()
        if not self._has_spoken:  # it has been silent for long enough
            self._has_spoken = True
            return self._comment()
        try:
            with trio.move_on_after(self._ping_s):
                return await self._beginning()
        except Exception as error:
            return self._error_event(error)
        return self._comment()

    async def _beginning(self) -> bytes:
        """The first bytes of the stream; an error event if the server answers with something else."""
        if self._body is None:
            lease, response = await self._first_bytes.wait()
            self._begin(lease, response)
        assert self._body is not None
        if self._instead is None:
            return await self._body.read()
        await self._instead.read(self._body)
        self._failure = AbortResponse(f"the server answered {self._instead.server_status} instead of a stream")
        return self._instead.event()

    def _begin(self, lease: Lease[Upstream], response: UpstreamResponse) -> None:
        self._body = body_of(self._first_bytes, lease, response)
        if response.status != 200 or not response.event_stream:
            self._instead = ServerError(response.status, self._first_bytes.request)

    def _comment(self) -> bytes:
        translator = self._first_bytes.request.translator
        if translator is not None:
            return translator.waiting()
        return f": {self._progress.of(self._first_bytes.ticket)}\n\n".encode()

    def _error_event(self, error: Exception) -> bytes:
        """The event for what ends the stream; the next `read` raises."""
        request = self._first_bytes.request
        if isinstance(error, Refusal):
            self._first_bytes.tally.refused(error)
            self._failure = AbortResponse(str(error))
            return error_event(error, request.request_id, request.dialect)
        self._failure = error  # a bug, which is then logged
        _status, _headers, content = internal_error_response(request.request_id, request.dialect)
        return as_event(request.dialect, content)


class Progress:
    """What queued requests wait for, in words.

    What changes: `_places` (for each device until when the places of its requests are good, and these), in `_place`.
    """

    def __init__(self) -> None:
        self._places: dict[str, tuple[float, dict[Ticket[Upstream], int]]] = {}

    def of(self, ticket: Ticket[Upstream]) -> str:
        """What this request waits for."""
        if ticket.lease is not None:
            return "processing the prompt"
        place = self._place(ticket)
        loading = ticket.lane.loads_now
        if loading is not None and loading == ticket.model_id and place == 1:
            return f"loading {loading}"
        return f"waiting: place {place} in the queue" + (f", loading {loading}" if loading is not None else "")

    def _place(self, ticket: Ticket[Upstream]) -> int:
        """Its place in the order in which the lane's queued requests are expected to start, counted from 1."""
        now, lane = trio.current_time(), ticket.lane
        good_until, places = self._places.get(lane.device_id, (now, {}))
        if now >= good_until or ticket not in places:
            places = {waiting: place for place, (waiting, _starts_in_s) in enumerate(lane.expected_starts(), start=1)}
            self._places[lane.device_id] = now + _PLACES_GOOD_S, places
        return places.get(ticket, 1)  # one that is in no queue has been refused this very moment
