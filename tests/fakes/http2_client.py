"""A client of HTTP/2 that may do what it should not: h2 without its checks, and bytes besides."""

import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

import trio
import trustme
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    Event,
    InformationalResponseReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)

AUTHORITY = trustme.CA()
CERTIFICATE = AUTHORITY.issue_cert("127.0.0.1", "localhost")
GET = [(":method", "GET"), (":scheme", "https"), (":authority", "node"), (":path", "/")]
POST = [(":method", "POST"), *GET[1:]]

E = TypeVar("E", bound=Event)


def server_context(*, client_ca: trustme.CA | None = None) -> ssl.SSLContext:
    """That of a server that speaks both versions."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"])
    CERTIFICATE.configure_cert(context)
    if client_ca is not None:
        client_ca.configure_trust(context)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def client_context(*protocols: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    context.set_alpn_protocols(list(protocols or ("h2",)))
    return context


@dataclass
class Answer:
    """What has arrived of a response."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    complete: bool = False
    reset: int | None = None
    proceeds: bool = False


class _Engine(H2Connection):
    """h2, but for a goodbye: to h2 that is the end of all streams."""

    goaway: Any = None

    def _receive_goaway_frame(self, frame: Any) -> tuple[list[Any], list[Event]]:
        self.goaway = frame
        return [], []


class Http2Client:
    """One connection. With `reads_bodies` it gives back the window of what arrives."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream], *, reads_bodies: bool = True) -> None:
        self.stream = stream
        self.reads_bodies = reads_bodies
        self.answers: dict[int, Answer] = {}
        self.h2 = _Engine(
            H2Configuration(
                header_encoding="latin-1", validate_outbound_headers=False, normalize_outbound_headers=False
            )
        )
        self.h2.initiate_connection()

    @property
    def goaway(self) -> Any:
        """The server's goodbye as a frame, None before it."""
        return self.h2.goaway

    async def flush(self) -> None:
        if data := self.h2.data_to_send():
            await self.stream.send_all(data)

    async def request(
        self, fields: Iterable[tuple[str, str]] = GET, body: bytes | None = None, *, end: bool = True
    ) -> int:
        """Begin a request and return its stream; with a body that fits the windows."""
        number = self.h2.get_next_available_stream_id()
        self.answers[number] = Answer()
        self.h2.send_headers(number, list(fields), end_stream=end and body is None)
        if body is not None:
            self.send_data(number, body, end=end)
        await self.flush()
        return number

    def send_data(self, number: int, data: bytes, *, end: bool = False) -> None:
        """Not flushed."""
        size = self.h2.max_outbound_frame_size
        for start in range(0, max(1, len(data)), size):
            self.h2.send_data(number, data[start : start + size], end_stream=end and start + size >= len(data))

    async def upload(self, number: int, data: bytes) -> None:
        """Send a long body, as the server makes room; end it."""
        while data:
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            if room == 0:
                await self.receive()
                continue
            self.h2.send_data(number, data[:room], end_stream=room >= len(data))
            data = data[room:]
            await self.flush()

    async def receive(self) -> list[Event] | None:
        """What arrives next, None at the end of the connection."""
        data = await self.stream.receive_some(2**16)
        if not data:
            return None
        events = self.h2.receive_data(data)
        for event in events:
            self._note(event)
        with suppress(trio.BrokenResourceError):
            await self.flush()
        return events

    def _note(self, event: Any) -> None:
        answer = self.answers.get(getattr(event, "stream_id", 0))
        if answer is None:
            return
        match event:
            case InformationalResponseReceived():
                answer.proceeds = True
            case ResponseReceived():
                fields: list[Any] = list(event.headers)
                answer.status = int(dict(fields)[":status"])
                answer.headers = {name: value for name, value in fields if not name.startswith(":")}
            case DataReceived():
                answer.body += event.data
                if self.reads_bodies:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case StreamEnded():
                answer.complete = True
            case StreamReset():
                answer.reset = int(event.error_code)

    async def answer(self, number: int) -> Answer:
        """The response, when it is over."""
        found = self.answers[number]
        while not found.complete and found.reset is None:
            assert await self.receive() is not None, f"closed after {found!r}, {self.goaway!r}"
        return found

    async def until(self, number: int, part: bytes) -> None:
        """Read until this has arrived of a body."""
        while part not in self.answers[number].body:
            assert await self.receive() is not None, f"closed after {self.answers[number]!r}, {self.goaway!r}"

    async def first(self, kind: type[E]) -> E:
        """The first event of this kind from now on."""
        while True:
            events = await self.receive()
            assert events is not None, "closed"
            for event in events:
                if isinstance(event, kind):
                    return event

    async def end(self) -> Any:
        """Read until the server closes; return its goodbye."""
        while await self.receive() is not None:
            continue
        return self.goaway


@asynccontextmanager
async def connected(port: int, *, reads_bodies: bool = True, **options: Any) -> AsyncIterator[Http2Client]:
    """A connection on which hands are shaken and the settings of both sides are known."""
    plain = await trio.open_tcp_stream("127.0.0.1", port)
    context = options.get("context") or client_context()
    stream = trio.SSLStream(plain, context, server_hostname="127.0.0.1", https_compatible=False)
    try:
        await stream.do_handshake()
        assert stream.selected_alpn_protocol() == "h2"
        client = Http2Client(stream, reads_bodies=reads_bodies)
        if "window" in options:
            client.h2.update_settings({4: options["window"]})
        await client.flush()
        while not client.h2.remote_settings.max_header_list_size:
            await client.receive()
        yield client
    finally:
        await trio.aclose_forcefully(plain)


async def ask(port: int, request: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """Send a request of HTTP/1.1 over HTTP/2; return the status line, the headers (in lower case) and the body as
    HTTP/1.1 would have them."""
    head, _, body = request.partition(b"\r\n\r\n")
    line, *lines = head.decode("latin-1").split("\r\n")
    method, path, version = line.split(" ")
    headers = [(name.lower(), value.strip()) for name, value in (line.split(": ", 1) for line in lines)]
    host = dict(headers).pop("host")
    fields = [(":method", method), (":scheme", "https"), (":authority", host), (":path", path)]
    fields += [field for field in headers if field[0] not in ("host", "connection", "transfer-encoding")]
    if ("transfer-encoding", "chunked") in headers:
        body = b"".join(line for line in body.split(b"\r\n")[1::2])
    async with connected(port) as client:
        answer = await client.answer(await client.request(fields, body))
    framing = {"connection": "close"}
    if "content-length" not in answer.headers and version == "HTTP/1.1":
        framing["transfer-encoding"] = "chunked"
    phrase = HTTPStatus(answer.status).phrase
    content = answer.body + (b"" if answer.complete else b"<truncated>")
    fields_found = {name: value.lower() for name, value in answer.headers.items()}
    return f"HTTP/1.1 {answer.status} {phrase}".encode(), fields_found | framing, content
