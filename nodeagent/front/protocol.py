"""What the server accepts as a request: hypercorn's HTTP/1.1 over h11, made strict."""

import uuid
from collections.abc import Awaitable, Callable

import h11
from hypercorn.config import Config
from hypercorn.events import Event
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Request, Response
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup, WorkerContext
from hypercorn.typing import Event as HypercornEvent

from nodeagent.front.refusals import error_response

# Limits on headers, as most servers have them.
HEADERS_MAX_COUNT = 100
HEADERS_MAX_BYTES = 2**15


class HttpProtocol(H11Protocol):
    """hypercorn's HTTP/1.1, strict about what a request is, and without its switches to other protocols.

    An `Upgrade` (WebSocket, h2c) is ignored, as RFC 9110 allows: the request is answered as if it had none.
    """

    connection: "Parser"

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        task_group: TaskGroup,
        *,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        send: Callable[[Event], Awaitable[None]],
        can_read: HypercornEvent,
    ) -> None:
        super().__init__(
            app, config, context, task_group, ConnectionState({}), ssl=False, client=client, server=server, send=send
        )
        self.connection = Parser(h11.SERVER, max_incomplete_event_size=HEADERS_MAX_BYTES)
        self.can_read = can_read

    def ends_by_closing(self) -> bool:
        """Whether an answer is incomplete that ends with its connection, so that only a reset shows the truncation."""
        return self.connection.our_state is h11.SEND_BODY and self.connection.their_http_version == b"1.0"

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response) and self.context.terminated.is_set():
            event.headers.append((b"connection", b"close"))
        await super().stream_send(event)

    async def _check_protocol(self, event: h11.Request) -> None:
        """Stay with HTTP/1.1. The parser rejects what looks like HTTP/2."""

    async def _create_stream(self, request: h11.Request) -> None:
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=_origin_form(request.target),
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1

    async def _send_error_response(self, status_code: int) -> None:
        status, headers, body = error_response(status_code, self.connection.complaint, uuid.uuid4().hex)
        head = [(name.encode(), value.encode()) for name, value in headers]
        head += [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        head += self.config.response_headers("h11")
        await self._send_h11_event(h11.Response(status_code=status, headers=head))
        if not self.connection.answers_head:
            await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


class Parser(h11.Connection):
    """h11's parser, with the checks that it leaves to its user.

    `complaint` says why the last request was rejected; `answers_head` whether its answer has no body.
    """

    complaint = ""
    answers_head = False

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        # Bytes after a client's last request are no reason to reject that request, as h11 would.
        if self.their_state is h11.MUST_CLOSE and self.trailing_data[0]:
            return h11.PAUSED
        if self.their_state is h11.IDLE:
            self.answers_head = False
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self.answers_head = event.method == b"HEAD"
                _check(event)
        except h11.RemoteProtocolError as error:
            self.complaint = f"The request is malformed: {error}."
            raise
        return event


def _check(request: h11.Request) -> None:
    names = [name for name, _ in request.headers]
    size = sum(len(name) + len(value) for name, value in request.headers)
    if len(names) > HEADERS_MAX_COUNT or size + len(request.target) > HEADERS_MAX_BYTES:
        limits = f"at most {HEADERS_MAX_COUNT} headers and {HEADERS_MAX_BYTES} bytes of headers are allowed"
        raise h11.RemoteProtocolError(limits, error_status_hint=431)
    # With two lengths a request can be smuggled past a proxy that uses the other one (RFC 9112, 6.1).
    if b"content-length" in names and b"transfer-encoding" in names:
        raise h11.RemoteProtocolError("it has both Content-Length and Transfer-Encoding")
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("only HTTP/1.1 and HTTP/1.0 are supported", error_status_hint=505)
    if not request.target.startswith((b"/", b"http://", b"https://")) and request.target != b"*":
        raise h11.RemoteProtocolError("the target must be a path")


def _origin_form(target: bytes) -> bytes:
    """Turn `http://host/path?query`, which servers must accept too, into `/path?query`."""
    if target.startswith(b"/"):
        return target
    _, _, rest = target.partition(b"://")
    _, slash, path = rest.partition(b"/")
    return b"/" + path if slash else b"/"
