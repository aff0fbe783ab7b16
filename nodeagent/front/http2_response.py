"""How one response is written as HTTP/2: with the checks of HTTP/1.1, but what is to be sent waits here until there is
room for it (`http2_stream.py`). No I/O.
"""

from collections import deque

from nodeagent.front.http2_head import OF_CONNECTION
from nodeagent.front.protocol import RequestHead
from nodeagent.front.response import BODILESS_STATUSES, Headers, ResponseWriter, date_line


class Http2Response(ResponseWriter):
    """A response that waits to be sent: no method returns anything to write.

    `fields` are its head, from its start on, and `waiting` what is to be sent of its body, which the stream takes away.
    `proceeds` is whether the client was or is to be told to send its body.
    """

    def __init__(self, request: RequestHead) -> None:
        super().__init__(http_version=request.http_version, is_head=request.method == "HEAD", keep_alive=True)
        self.fields: Headers = []
        self.waiting: deque[memoryview] = deque()
        self.proceeds = False

    def proceed(self) -> bytes:
        self.proceeds = True
        return b""

    def head(self, status: int, headers: Headers, *, close: bool) -> bytes:
        assert not self.started, "the response has begun"
        fields = [(b":status", b"%d" % status)]
        for name, value in headers:
            name = name.lower()
            if name == b"content-length":
                self._left_bytes = int(value)
            if name not in OF_CONNECTION:
                fields.append((name, value))
        fields.append((b"date", date_line().removeprefix(b"date: ")))
        joined = b"".join([part for field in fields for part in field])
        if b"\n" in joined or b"\r" in joined or b"\0" in joined:
            raise ValueError(f"a header has a line break or a NUL: {headers!r:.200}")
        self._bodiless = self._is_head or status in BODILESS_STATUSES
        self.fields = fields
        self.started = True
        return b""

    def body(self, data: bytes) -> bytes:
        if data := super().body(data):
            self.waiting.append(memoryview(data))
        return b""

    def take(self, most: int) -> memoryview:
        """The next bytes to send of the body."""
        piece = self.waiting.popleft()
        if len(piece) > most:
            self.waiting.appendleft(piece[most:])
            piece = piece[:most]
        return piece
