"""How one response is written as HTTP/1.1: its head, and where its body ends. No I/O.

    head ──> body... ──> end

The body ends after `content-length` bytes if the response has that header, else with the last chunk; for HTTP/1.0 it
ends with the connection.
"""

import time
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

from nodeagent.front.protocol import RequestHead

Headers = list[tuple[bytes, bytes]]

BODILESS_STATUSES: Final = frozenset({204, 304})
_PHRASES: Final = {status.value: status.phrase.encode("ascii") for status in HTTPStatus}
# The framing is ours alone.
_FRAMING: Final = frozenset({b"connection", b"transfer-encoding", b"content-length"})


class ResponseWriter:
    """The bytes of one response. Every method returns what to write.

    `complete` is whether the whole response has been returned; `keep_alive` whether another may follow it on the
    connection. What changes: these, in each method.
    """

    def __init__(self, *, http_version: str = "1.1", is_head: bool = False, keep_alive: bool = False) -> None:
        self.started = False
        self.complete = False
        self.keep_alive = keep_alive
        self._version = http_version
        self._is_head = is_head
        self._bodiless = False
        self._chunked = False
        self._left_bytes: int | None = None

    @classmethod
    def to(cls, request: RequestHead) -> "ResponseWriter":
        """For the response to this request."""
        is_head = request.method == "HEAD"
        return cls(http_version=request.http_version, is_head=is_head, keep_alive=request.keep_alive)

    @property
    def ends_by_closing(self) -> bool:
        """Whether the response is incomplete and ends with its connection, so that only a reset shows that."""
        return self.started and not self.complete and self._version == "1.0"

    def proceed(self) -> bytes:
        """What tells a client that waits for it to send the body."""
        return b"HTTP/1.1 100 Continue\r\n\r\n"

    def head(self, status: int, headers: Headers, *, close: bool) -> bytes:
        """The head. `close` ends the connection after this response, as a header `connection: close` does.

        Raises ValueError for a header that would break the head.
        """
        assert not self.started, "the response has begun"
        lines = [b"HTTP/1.1 %d %s" % (status, _PHRASES.get(status, b""))]
        for name, value in headers:
            name = name.lower()
            if name not in _FRAMING:
                lines.append(name + b": " + value)
            elif name == b"content-length":
                self._left_bytes = int(value)
                lines.append(name + b": " + value)
            elif name == b"connection" and value.lower() == b"close":
                close = True
        lines.append(date_line())
        self._bodiless = self._is_head or status in BODILESS_STATUSES
        if self._left_bytes is None and not self._bodiless and self._version == "1.1":
            self._chunked = True
            lines.append(b"transfer-encoding: chunked")
        if close or not self.keep_alive:
            self.keep_alive = False
            lines.append(b"connection: close")
        lines += (b"", b"")
        head = b"\r\n".join(lines)
        ends = len(lines) - 1
        if head.count(b"\n") != ends or head.count(b"\r") != ends or b"\0" in head:
            raise ValueError(f"a header has a line break or a NUL: {headers!r:.200}")
        self.started = True
        return head

    def body(self, data: bytes) -> bytes:
        """The next bytes of the body. Raises ValueError if they exceed its `content-length`."""
        assert self.started, "the response has not begun"
        assert not self.complete, "the response is complete"
        if self._bodiless or not data:
            return b""
        if self._chunked:
            return b"%x\r\n%b\r\n" % (len(data), data)
        if self._left_bytes is not None:
            self._left_bytes -= len(data)
            if self._left_bytes < 0:
                raise ValueError(f"the body is {-self._left_bytes} bytes longer than its Content-Length")
        return data

    def end(self) -> bytes:
        """The end of the body. Raises ValueError if it is shorter than its `content-length`."""
        if self._left_bytes and not self._bodiless:
            raise ValueError(f"the body is {self._left_bytes} bytes shorter than its Content-Length")
        self.complete = True
        return b"0\r\n\r\n" if self._chunked else b""


_date: tuple[int, bytes] = (0, b"")


def date_line() -> bytes:
    """The header `date` (RFC 9110, 6.6.1), made once a second."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = now, b"date: " + formatdate(now, usegmt=True).encode("ascii")
    return _date[1]
