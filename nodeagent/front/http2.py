"""HTTP/2 on a connection: its streams, what they share, and what a client may not do to it.

h2 has the states of the protocol, without I/O; here are reading and writing, the limits, and the goodbye. Each stream
is a request with a task of its own (`http2_stream.py`). This module and h2 are imported with the first connection that
speaks HTTP/2.

Frames go to the socket at once. What it does not take waits, and meanwhile no stream makes more of them; if the answers
to the client's own frames (PING, SETTINGS) pile up behind, nothing more is read. So a client that does not read holds
little memory, and loses the connection after the send timeout.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError, StreamClosedError
from h2.settings import SettingCodes, Settings

from nodeagent.front.exchange import Exchange
from nodeagent.front.http1 import refusal_of
from nodeagent.front.http2_flood import BadFrames, FloodGuard
from nodeagent.front.http2_head import MalformedRequest, check_trailers, request_head
from nodeagent.front.http2_stream import Http2Stream
from nodeagent.front.protocol import HEADERS_MAX_BYTES, HEADERS_MAX_COUNT, BadRequest, RequestHead

if TYPE_CHECKING:
    from nodeagent.front.connection import Connection

logger = logging.getLogger(__name__)
# It would log every header, keys too.
logging.getLogger("hpack").setLevel(logging.WARNING)

# At once. More than clients open before they know (100); those of requests that are ending count too, for the second.
_STREAMS_MAX: Final = 128
_TASKS_MAX: Final = 2 * _STREAMS_MAX
# What may arrive of a body, and of all together, before anybody reads it.
_STREAM_WINDOW_BYTES: Final = 2**19
_WINDOW_BYTES: Final = 2**20
# What h2 has as the window of the connection until it is opened.
_FIRST_WINDOW_BYTES: Final = 2**16 - 1
# So much of what has been read is handled before other tasks get their turn: frames may be tiny.
_SLICE_BYTES: Final = 2**14
# What may wait for a client that does not read, until nothing more is read from it.
_UNSENT_MAX_BYTES: Final = 2**17
# Clients may ask for more; each response would add to it.
_TABLE_MAX_BYTES: Final = 2**12


class Http2:
    """The streams of one connection.

    What changes: `_streams`, in `_begin` and `stream_over`; `_last`, the number after which no stream is served any
    more, in `drain`; `_refused`, whether the client has broken a rule, and `_broken`, whether nothing can be sent any
    more, when that happens.
    """

    def __init__(self, connection: "Connection", stranger: BadRequest | None) -> None:
        """`stranger` is the answer to every request of a client that may not use the node."""
        self.peer = connection.peer
        self.h2 = _Engine()
        self.ordinary_road = connection.shared.ordinary_road
        self.send_timeout_s = connection.shared.send_timeout_s
        self._connection = connection
        self._transport = connection.transport
        self._find_handler = connection.shared.find_handler
        self._stranger = stranger
        self._guard = FloodGuard()
        self._streams: dict[int, Http2Stream] = {}
        self._last: int | None = None
        self._refused = False
        self._broken = False
        self._sending = trio.CancelScope()
        self._unsent = trio.Event()  # for which the task that sends waits
        self._sent = trio.Event()  # for which everyone else waits

    # Reading.

    async def read(self) -> bool:
        """Serve requests until the connection ends; return whether the client ended it."""
        self._connection.nursery.start_soon(self._send_what_waits, name=f"send {self.peer.name}")
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(_WINDOW_BYTES - _FIRST_WINDOW_BYTES)
        self.flush()
        while True:
            while self._transport.unsent_bytes > _UNSENT_MAX_BYTES:
                await self.has_room()
            data = await self._transport.receive()
            if not data:
                return True
            for start in range(0, len(data), _SLICE_BYTES):
                if not self._take(data[start : start + _SLICE_BYTES]):
                    return False
                if start:
                    await trio.lowlevel.checkpoint()
            if self.h2.client_leaves and not self._streams:
                return False

    def _take(self, data: bytes) -> bool:
        """Take what has arrived; return whether the connection goes on."""
        try:
            self._guard.feed(data)
            for event in self.h2.receive_data(data):
                self._handle(event)
        except BadFrames as bad:
            logger.warning("%s: HTTP/2 refused: %s", self.peer.name, bad)
            self.h2.close_connection(bad.code)
            self._refuse_all()
        except ProtocolError as error:  # h2 has said so
            logger.debug("%s: malformed HTTP/2: %s", self.peer.name, error)
            self._refuse_all()
        self.flush()
        return not self._refused and not self._broken

    def _refuse_all(self) -> None:
        """The client has broken a rule: the connection ends with what h2 has to say about it."""
        self._refused = True
        self._leave_all()

    def _leave_all(self) -> None:
        for stream in tuple(self._streams.values()):
            stream.leave()

    def _handle(self, event: Event) -> None:
        match event:
            case RequestReceived():
                self._begin(event)
            case DataReceived():
                stream = self._streams.get(event.stream_id)
                if stream is None:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                else:
                    stream.body(event.data, event.flow_controlled_length)
            case TrailersReceived():
                self._check_trailers(event)
            case StreamEnded():
                if event.stream_id in self._streams:
                    self._streams[event.stream_id].end_of_body()
            case StreamReset():
                if not event.remote_reset:
                    self._guard.was_reset()
                if event.stream_id in self._streams:
                    self._streams[event.stream_id].leave()
            case WindowUpdated():
                self._window_opened(event.stream_id)
            case RemoteSettingsChanged():
                self._settings_changed(event)
            case ConnectionTerminated():
                logger.debug("%s: client ended HTTP/2: %s", self.peer.name, event.error_code)
                self._break()

    def _settings_changed(self, event: RemoteSettingsChanged) -> None:
        for code in event.changed_settings:
            if not isinstance(code, SettingCodes):  # h2 would keep all that a client makes up
                self.h2.remote_settings.pop(code, None)
        self.h2.encoder.header_table_size = min(self.h2.encoder.header_table_size, _TABLE_MAX_BYTES)
        self._window_opened(0)

    def _begin(self, event: RequestReceived) -> None:
        number, ended = event.stream_id, event.stream_ended is not None
        if (self._last is not None and number > self._last) or len(self._streams) >= _TASKS_MAX:
            self._reset(number, ErrorCodes.REFUSED_STREAM)
            return
        try:
            head = request_head(_plain(event.headers), ended=ended)
        except MalformedRequest as malformed:
            logger.debug("%s: malformed request on stream %d: %s", self.peer.name, number, malformed)
            self._reset(number, ErrorCodes.PROTOCOL_ERROR)
            self._guard.was_reset()
            return
        self._connection.become_busy()
        stream = self._streams[number] = self._stream(number, head, ended=ended)
        self._connection.nursery.start_soon(stream.run, name=f"stream {number} {self.peer.name}")

    def _stream(self, number: int, head: RequestHead | BadRequest, *, ended: bool) -> Http2Stream:
        bad = head if isinstance(head, BadRequest) else self._stranger
        if bad is not None:
            return Http2Stream(self, number, _head_of(bad, ended=ended), partial(_refuse, bad))
        assert isinstance(head, RequestHead)
        return Http2Stream(self, number, head, self._find_handler(head.method, head.target.partition(b"?")[0]))

    def _check_trailers(self, event: TrailersReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        try:
            check_trailers(_plain(event.headers))
            stream.check_length()
        except MalformedRequest as malformed:
            logger.debug("%s: malformed trailers on stream %d: %s", self.peer.name, stream.number, malformed)
            self.reset(stream, ErrorCodes.PROTOCOL_ERROR)
            self._guard.was_reset()

    def _window_opened(self, number: int) -> None:
        """Of one stream, or of all (0)."""
        if number == 0:
            for stream in self._streams.values():
                stream.window_opened()
        elif number in self._streams:
            self._streams[number].window_opened()

    # What streams call.

    def give_window(self, stream: Http2Stream, count: int) -> None:
        """The client may send so many bytes more."""
        if not self._broken and not self._refused:
            self.h2.acknowledge_received_data(count, stream.number)
            self.flush()

    def sent_frame(self) -> None:
        """A frame of an answer was made."""
        self._guard.answered()

    def reset(self, stream: Http2Stream, code: ErrorCodes) -> None:
        """Reset the stream, unless it is gone, and end its request."""
        if not stream.gone:
            self._reset(stream.number, code)
            self.flush()
            stream.leave()

    def stream_over(self, stream: Http2Stream) -> None:
        """Its task ends now."""
        del self._streams[stream.number]
        if self._streams:
            return
        if self._last is not None or self.h2.client_leaves:
            self._connection.reading.cancel()
        else:
            self._connection.become_idle()

    def _reset(self, number: int, code: ErrorCodes) -> None:
        if not self._broken and not self._refused:
            with suppress(StreamClosedError):  # by the client, with what is handled now
                self.h2.reset_stream(number, code)

    # Writing.

    @property
    def is_full(self) -> bool:
        """Whether the socket takes no more now."""
        return self._transport.unsent_bytes > 0

    async def has_room(self) -> None:
        """Wait until the socket has taken everything, or nothing can be sent any more."""
        await self._sent.wait()

    def flush(self) -> None:
        """Give the socket the frames that h2 has made."""
        data = self.h2.data_to_send()
        if data:
            self._put(data)

    def _put(self, data: bytes) -> None:
        if self._broken:
            return
        try:
            self._transport.put(data)
        except OSError as error:
            logger.debug("%s: client left: %s", self.peer.name, error)
            self._break()
            return
        if self._transport.unsent_bytes and not self._unsent.is_set():
            self._sent = trio.Event()
            self._unsent.set()

    async def _send_what_waits(self) -> None:
        with self._sending:
            try:
                while True:
                    await self._unsent.wait()
                    await self._transport.flush()
                    self._unsent = trio.Event()
                    self._sent.set()
            except trio.TooSlowError:
                logger.warning(
                    "%s: client read too little for %g s; closing the connection", self.peer.name, self.send_timeout_s
                )
                self._break()
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                logger.debug("%s: client left: %s", self.peer.name, error)
                self._break()

    def _break(self) -> None:
        """Nothing can be sent any more."""
        self._broken = True
        self._leave_all()
        self._sent.set()
        self._transport.reset()
        self._connection.reading.cancel()

    # The end.

    def drain(self) -> None:
        """Refuse further requests, to be sent elsewhere: the connection ends when those that it serves are answered."""
        if self._last is None:
            self._last = self.h2.highest_inbound_stream_id
            self._put(_goodbye(self._last))

    async def end(self, *, left: bool) -> None:
        """End what is being served, and close the socket; `left` is whether the client has left."""
        self._leave_all()
        if not left and not self._broken:
            if self._last is None and not self._refused:
                self._put(_goodbye(self.h2.highest_inbound_stream_id))
            while self._transport.unsent_bytes and not self._broken:
                await self.has_room()
            # A client acknowledges answers, and to close with unread bytes is a reset. An idle one has nothing to lose.
            if self._last is not None or self._refused:
                await self._transport.linger()
        self.close()
        # The applications of ordinary requests have been told that their client has left, and end in their own time.
        self._sending.cancel()
        self._broken = True
        self._sent.set()

    def close(self) -> None:
        """Close the socket."""
        self._transport.close()


class _Engine(H2Connection):
    """h2 as a server, with the node's limits.

    `client_leaves` is whether the client has said that it opens no more streams; h2 itself takes that for the end of
    all. What changes: that, when it says so.
    """

    MAX_CLOSED_STREAMS = 2**9  # remembered: 2**16 would be megabytes for each connection

    def __init__(self) -> None:
        # The checks of heads are in `http2_head.py`: here they would end all streams for the fault of one.
        super().__init__(
            H2Configuration(
                client_side=False,
                header_encoding=None,
                validate_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.client_leaves = False
        head_bytes = HEADERS_MAX_BYTES + 32 * HEADERS_MAX_COUNT  # as HTTP/2 counts them
        self.decoder.max_header_list_size = 2 * head_bytes  # up to which the answer is 431, not the end of all
        self.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: _STREAMS_MAX,
                SettingCodes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: head_bytes,
            },
        )

    def _receive_goaway_frame(self, frame: Any) -> tuple[list[Any], list[Event]]:
        if frame.error_code != ErrorCodes.NO_ERROR:
            return super()._receive_goaway_frame(frame)
        self.client_leaves = True
        return [], []


async def _refuse(bad: BadRequest, exchange: Exchange) -> None:
    status, fields, body = refusal_of(bad)
    await exchange.start(status, fields, body, more=False)


def _head_of(bad: BadRequest, *, ended: bool) -> RequestHead:
    """A head for what is no request, so that it can be answered."""
    return RequestHead(
        method="HEAD" if bad.answers_head else "GET",
        target=b"/",
        http_version="2",
        headers=[],
        values={},
        has_body=not ended,
        keep_alive=True,
        expects_continue=False,
    )


def _goodbye(last: int) -> bytes:
    """GOAWAY without an error: no stream after this one will be served. After h2's own, h2 sends nothing more."""
    return b"\0\0\x08\x07\0" + bytes(4) + last.to_bytes(4, "big") + bytes(4)


def _plain(headers: Iterable[tuple[Any, Any]]) -> list[tuple[bytes, bytes]]:
    return [(bytes(name), bytes(value)) for name, value in headers]
