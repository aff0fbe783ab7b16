"""An answer that has begun: its status, its headers, and its body chunk by chunk as the server sends it, or translated
for a client of another API."""

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec
import trio

from nodeagent.errors import BadAnswer, Refusal, RequestCancelled, UpstreamLost
from nodeagent.front.exchange import AbortResponse
from nodeagent.front.first_bytes import FirstBytes, crashed, record_crash, stopped
from nodeagent.front.refusals import error_event
from nodeagent.front.response import Headers
from nodeagent.front.translation import Translator, Untranslatable
from nodeagent.llama_server.relay import Upstream, UpstreamResponse
from nodeagent.scheduling.lease import Lease

logger = logging.getLogger(__name__)

B = TypeVar("B")

# nginx would buffer a stream, and caches might store it.
STREAM_HEADERS = ((b"x-accel-buffering", b"no"), (b"cache-control", b"no-cache"))


class Body(Protocol):
    """The body of an answer."""

    @property
    def at_end(self) -> bool:
        """Whether there are no more chunks."""

    def __aiter__(self) -> "Body": ...

    async def __anext__(self) -> bytes: ...

    async def read(self) -> bytes:
        """The next chunk; b"" if there was none before the end. Raises AbortResponse. Not to be called `at_end`."""


class Answer(msgspec.Struct, frozen=True):
    """An answer whose first bytes are there. The names of its headers are in lower case."""

    status: int
    headers: Headers
    body: Body

    @property
    def content_type(self) -> str:
        """The type of the body, "" if it is not known."""
        return dict(self.headers).get(b"content-type", b"").decode("latin-1")


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
    take a clean end for success. `failure` is then what the error says.
    """

    def __init__(self, first_bytes: FirstBytes, lease: Lease[Upstream], response: UpstreamResponse) -> None:
        self.failure: Refusal | None = None
        self._response = response
        self._lease = lease
        self._first_bytes = first_bytes
        self._request = first_bytes.request
        self._poison = first_bytes.poison
        self._tally = first_bytes.tally
        self.at_end = False

    async def read(self) -> bytes:
        """See `Body.read`."""
        if self.failure is not None:
            raise AbortResponse(str(self.failure)) from self.failure
        chunk = None
        try:
            if not self._first_bytes.cancelled:
                chunk = await self._response.next_chunk()
        except UpstreamLost as lost:
            if not self._first_bytes.cancelled:
                return await self._error_event(lost)
        if self._first_bytes.cancelled:
            return self._cancelled()
        self._tally.passed(chunk or b"")
        if chunk is None or self._response.complete:
            self.at_end = True
            self._tally.completed()
            self._poison.record_success(self._request.body)
        return chunk or b""

    async def _error_event(self, lost: UpstreamLost) -> bytes:
        """Tell a client that reads events why its answer ends; raise AbortResponse for any other client."""
        self._tally.lost()
        lease = self._lease
        logger.warning("%s: lost the server of %s in mid-answer: %s", lease.device_id, lease.model_id, lost)
        if not lease.endpoint.ends_as_asked:
            await record_crash(self._poison, self._request, lease)
        self.failure = stopped(lease) if lease.endpoint.ends_as_asked else crashed(lease, lost)
        if not self._response.event_stream:
            raise AbortResponse(str(lost)) from lost
        return self._event(self.failure)

    def _cancelled(self) -> bytes:
        self.failure = RequestCancelled(self._lease.model_id)
        self._tally.refused(self.failure)
        if not self._response.event_stream:
            raise AbortResponse(str(self.failure))
        return self._event(self.failure)

    def _event(self, failure: Refusal) -> bytes:
        return error_event(failure, self._request.request_id, self._request.dialect)


class TranslatedBody(AnswerBody):
    """A stream in another format than the server's. If the server's can't be translated, it ends as if that were
    lost."""

    def __init__(
        self, first_bytes: FirstBytes, lease: Lease[Upstream], response: UpstreamResponse, translator: Translator
    ) -> None:
        super().__init__(first_bytes, lease, response)
        self._translator = translator

    async def read(self) -> bytes:
        """See `Body.read`."""
        translated = b""
        while not translated and not self.at_end:
            chunk = await super().read()
            if self.failure is not None:
                return chunk
            try:
                translated = self._translator.feed(chunk)
                if self.at_end:
                    translated += self._translator.end(self._lease.load_s, trio.current_time())
            except Untranslatable as error:
                self.at_end = False
                self.failure = BadAnswer(self._lease.model_id, str(error))
                self._tally.refused(self.failure)
                return translated + self._event(self.failure)
        return translated


class WholeBody(Chunks):
    """A body that is there already."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at_end = False

    async def read(self) -> bytes:
        """See `Body.read`."""
        self.at_end = True
        return self._content


class NotedBody(Chunks):
    """A body of which `note` takes each chunk."""

    def __init__(self, body: Body, note: Callable[[bytes], None]) -> None:
        self._body = body
        self._note = note

    @property
    def at_end(self) -> bool:
        """Whether there are no more chunks."""
        return self._body.at_end

    async def read(self) -> bytes:
        """See `Body.read`."""
        chunk = await self._body.read()
        self._note(chunk)
        return chunk


def body_of(first_bytes: FirstBytes, lease: Lease[Upstream], response: UpstreamResponse) -> AnswerBody:
    """The body of a server's answer, translated piece by piece if its client gets it in another format so."""
    translator = first_bytes.request.translator
    if translator is None or not translator.streams or response.status != 200:
        return AnswerBody(first_bytes, lease, response)
    return TranslatedBody(first_bytes, lease, response, translator)


async def translated_answer(
    translator: Translator, lease: Lease[Upstream], headers: Headers, body: AnswerBody
) -> Answer:
    """An answer in another format. One that is not streamed is read to its end first, so that what goes wrong until
    then is a refusal. Raises Refusal."""
    headers = with_type(headers, translator.content_type)
    if translator.streams:
        return Answer(200, headers, body)
    try:
        while not body.at_end:
            translator.feed(await body.read())
        return Answer(200, headers, WholeBody(translator.end(lease.load_s, trio.current_time())))
    except AbortResponse:
        assert body.failure is not None
        raise body.failure from None
    except Untranslatable as error:
        raise BadAnswer(lease.model_id, str(error)) from error


def with_type(headers: Headers, content_type: str) -> Headers:
    """The headers of an answer whose body is another one than the server's."""
    others = [header for header in headers if header[0] not in (b"content-length", b"content-type")]
    return [(b"content-type", content_type.encode("ascii")), *others]


def answer_headers(lease: Lease[Upstream], response: UpstreamResponse) -> Headers:
    """The server's headers, where the request was served, and how long each phase took up to the first byte."""
    queue_ms, load_ms = lease.queued_s * 1000, lease.load_s * 1000
    server_ms = (trio.current_time() - lease.granted_at) * 1000
    headers = [
        *response.headers,
        (b"x-node-model", lease.model_id.encode("utf-8")),
        (b"x-node-device", lease.device_id.encode("utf-8")),
        (b"x-node-queue-ms", b"%.0f" % queue_ms),
        (b"x-node-load-ms", b"%.0f" % load_ms),
        # In milliseconds: https://www.w3.org/TR/server-timing/
        (b"server-timing", b"queue;dur=%.1f, load;dur=%.1f, server;dur=%.1f" % (queue_ms, load_ms, server_ms)),
    ]
    return [*headers, *STREAM_HEADERS] if response.event_stream else headers
