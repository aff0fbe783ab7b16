"""What the server accepts as a request: HTTP/1.1 by httptools (llhttp), with the checks that it leaves to its user.

`RequestParser` turns the bytes of one connection into events. It does no I/O:

    feed(bytes) ──> RequestHead, body pieces..., END_OF_BODY, RequestHead, ... ──> BadRequest (the last event)
"""

from typing import Final

import httptools
import msgspec

# Limits on headers, as most servers have them. They hold for trailers too.
HEADERS_MAX_COUNT: Final = 100
HEADERS_MAX_BYTES: Final = 2**15

_LENGTHS: Final = (b"content-length", b"transfer-encoding")
_BAD_REQUEST, _TOO_LARGE, _NOT_IMPLEMENTED, _BAD_VERSION = 400, 431, 501, 505


class RequestHead(msgspec.Struct, frozen=True, kw_only=True):
    """The head of a request. `target` is in origin form, ASCII; the names of `headers` are lower case. `values` are the
    headers by name, the last one of each.

    `has_body` is whether a body follows, even an empty one. `keep_alive` is whether the client may send another request
    after this one. `expects_continue` is whether it waits for a 100 before it sends the body.
    """

    method: str
    target: bytes
    http_version: str
    headers: list[tuple[bytes, bytes]]
    values: dict[bytes, bytes]
    has_body: bool
    keep_alive: bool
    expects_continue: bool


class EndOfBody:
    """The request is complete. There is one such event after each head, also if no body was announced."""


END_OF_BODY: Final = EndOfBody()


class BadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What follows on this connection can't be read as a request. `complaint` says why, in a sentence.

    `answers_head` is whether it is the fault of a HEAD request, whose answer has no body.
    """

    status: int
    complaint: str
    answers_head: bool


RequestEvent = RequestHead | bytes | EndOfBody | BadRequest


class RequestParser:
    """Parses the requests of one connection; strict, since a proxy in front may read a doubtful request differently.

    An `Upgrade` (WebSocket, h2c) is ignored, as RFC 9110 allows; Java's client asks for h2c with each POST. What a
    client sends after its last request is ignored too. What changes: everything, in `feed`.
    """

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._events: list[RequestEvent] = []
        self._rejected: tuple[int, str] | None = None
        self._ended = False
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._in_head = False
        self._head: RequestHead | None = None
        self._resuming = False
        # Since the head or the last piece of a body: a head that never ends, or trailers.
        self._unframed_bytes = 0

    @property
    def in_head(self) -> bool:
        """Whether a head has begun and is not complete."""
        return self._in_head

    def feed(self, data: bytes) -> list[RequestEvent]:
        """The events that these bytes complete, in their order. After a BadRequest there are no more."""
        if self._ended:
            return []
        events: list[RequestEvent] = []
        self._events = events
        self._unframed_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._reject(error, data)
        if self._unframed_bytes > HEADERS_MAX_BYTES + len(data) and not self._ended:
            self._end_with(_TOO_LARGE, f"at most {HEADERS_MAX_BYTES} bytes of headers or trailers are allowed")
        return events

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # llhttp leaves what follows to another protocol. For us the body follows, or the next request.
                data = data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
                if self._head is not None:
                    data = self._head_again(self._head) + data
                if not data or self._ended:
                    return

    def _head_again(self, head: RequestHead) -> bytes:
        """What tells a new parser how long the body of this request is."""
        self._resuming = True
        lengths = [name + b": " + value for name, value in head.headers if name in _LENGTHS]
        connection = b"keep-alive" if head.keep_alive else b"close"
        return b"\r\n".join([b"POST / HTTP/1.1", *lengths, b"connection: " + connection, b"", b""])

    def _reject(self, error: httptools.HttpParserError, data: bytes) -> None:
        if self._ended:  # bytes after the last request
            return
        if self._rejected is not None:
            status, complaint = self._rejected
        elif data.startswith(b"PRI * HTTP/2.0\r\n") or str(error) == "Invalid HTTP version":
            status, complaint = _BAD_VERSION, "only HTTP/1.1 and HTTP/1.0 are supported"
        else:
            status, complaint = _BAD_REQUEST, f"{error}"
        # llhttp still has the method of the request before, if it could not read this one.
        named = self._in_head and not isinstance(error, httptools.HttpParserInvalidMethodError)
        self._end_with(status, complaint, answers_head=named and self._method() == "HEAD")

    def _end_with(self, status: int, complaint: str, *, answers_head: bool = False) -> None:
        self._ended = True
        sentence = f"The request is malformed: {complaint}."
        self._events.append(BadRequest(status=status, complaint=sentence, answers_head=answers_head))

    def _method(self) -> str:
        method: str = self._parser.get_method().decode("ascii")
        return method

    # What httptools calls. An exception in a callback stops it.

    def on_message_begin(self) -> None:
        if self._ended:
            raise _Stop
        if self._resuming:
            return
        self._target = b""
        self._headers = []
        self._in_head = True

    def on_url(self, piece: bytes) -> None:
        if self._in_head:
            self._target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer, which nobody reads
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._resuming:
            self._resuming, self._head = False, None
            return
        try:
            head = self._checked_head()
        except _Rejected as rejected:
            self._rejected = rejected.status, str(rejected)
            raise
        self._in_head = False
        self._unframed_bytes = 0
        self._events.append(head)
        # Its body was not parsed; see `_parse`.
        self._head = head if self._parser.should_upgrade() and head.has_body else None

    def on_body(self, piece: bytes) -> None:
        self._unframed_bytes = 0
        self._events.append(piece)

    def on_message_complete(self) -> None:
        self._unframed_bytes = 0
        if self._head is not None:
            return
        self._ended = not self._parser.should_keep_alive() or self._parser.get_http_version() == "1.0"
        self._events.append(END_OF_BODY)

    def _checked_head(self) -> RequestHead:
        version, headers = self._parser.get_http_version(), self._headers
        size = sum([len(name) + len(value) for name, value in headers])
        if len(headers) > HEADERS_MAX_COUNT or size + len(self._target) > HEADERS_MAX_BYTES:
            limits = f"at most {HEADERS_MAX_COUNT} headers and {HEADERS_MAX_BYTES} bytes of headers are allowed"
            raise _Rejected(_TOO_LARGE, limits)
        if version not in ("1.1", "1.0"):
            raise _Rejected(_BAD_VERSION, "only HTTP/1.1 and HTTP/1.0 are supported")
        values = dict(headers)
        if version == "1.1" and [name for name, _value in headers].count(b"host") != 1:
            raise _Rejected(_BAD_REQUEST, "it must have exactly one Host header")
        encoding = b"transfer-encoding" in values
        if encoding:
            _check_encoding(headers, version)
        return RequestHead(
            method=self._method(),
            target=_origin_form(self._target),
            http_version=version,
            headers=headers,
            values=values,
            has_body=encoding or b"content-length" in values,
            keep_alive=version == "1.1" and self._parser.should_keep_alive(),
            expects_continue=version == "1.1" and values.get(b"expect", b"").lower() == b"100-continue",
        )


class _Stop(Exception):
    """The last request is over."""


class _Rejected(Exception):
    def __init__(self, status: int, complaint: str) -> None:
        super().__init__(complaint)
        self.status = status


def _check_encoding(headers: list[tuple[bytes, bytes]], version: str) -> None:
    """Refuse a body that is not plainly chunked. With two lengths a request can be smuggled past a proxy that uses the
    other one (RFC 9112, 6.1)."""
    encodings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if any(name == b"content-length" for name, _value in headers):
        raise _Rejected(_BAD_REQUEST, "it has both Content-Length and Transfer-Encoding")
    if version == "1.0":
        raise _Rejected(_BAD_REQUEST, "HTTP/1.0 has no Transfer-Encoding")
    if encodings != [b"chunked"]:
        raise _Rejected(_NOT_IMPLEMENTED, "the only Transfer-Encoding supported is 'chunked'")


def _origin_form(target: bytes) -> bytes:
    """Turn `http://host/path?query`, which servers must accept too, into `/path?query`, and `*` into `/`."""
    if not target.isascii():
        raise _Rejected(_BAD_REQUEST, "the target must be ASCII, with other characters percent-encoded")
    if target.startswith(b"/"):
        return target
    if target == b"*":
        return b"/"
    if not target.lower().startswith((b"http://", b"https://")):
        raise _Rejected(_BAD_REQUEST, "the target must be a path")
    _, _, rest = target.partition(b"://")
    authority, _question, _query = rest.partition(b"?")
    _, slash, path = rest.partition(b"/")
    if b"/" not in authority:
        return b"/" + rest[len(authority) :]
    return b"/" + path if slash else b"/"
