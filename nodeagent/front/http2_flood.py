"""How much of a client's HTTP/2 is no request: what costs the node more than the client must not come in floods.

A connection has credit, which what it sends uses up and time gives back. Known floods: streams that are opened and
reset (CVE-2023-44487), or that the client has the server reset (CVE-2025-8671), SETTINGS and PING (CVE-2019-9512,
9515), empty frames (CVE-2019-9518), PRIORITY (CVE-2019-9513), headers without end (CVE-2024-27316).
"""

from typing import Final

import trio
from h2.errors import ErrorCodes

# What h2 lets a frame be at most, unless the node allows more.
_FRAME_MAX_BYTES: Final = 2**14
_PREFACE_BYTES: Final = 24
_HEADER_BYTES: Final = 9  # of each frame: its length (3), type, flags, stream (4)
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _CONTINUATION = 0x0, 0x1, 0x3, 0x4, 0x6, 0x9
_END_STREAM: Final = 0x1

_CREDIT: Final = 1000.0
_CREDIT_PER_S: Final = 100.0
# For each frame of an answer, which its client may acknowledge by two WINDOW_UPDATE.
_CREDIT_PER_FRAME: Final = 2.0
_COST_OF_RESET: Final = 5.0
_COSTS: Final = {_RST_STREAM: _COST_OF_RESET, _SETTINGS: 5.0, _PING: 2.0, _CONTINUATION: 5.0}
# Of one head as it is sent; uncompressed it may have half of this.
_HEAD_MAX_BYTES: Final = 2**16


class BadFrames(Exception):
    """The connection is to end with this code."""

    def __init__(self, code: ErrorCodes, why: str) -> None:
        super().__init__(why)
        self.code = code


class FloodGuard:
    """Reads the heads of frames, and nothing else of them.

    What changes: `_credit` and `_credited_at`, in `_charge` and `answered`; `_head` (of the next frame, what has
    arrived) and `_skip` (bytes up to that), in `feed`; `_head_bytes`, of the request's head that is arriving.
    """

    def __init__(self) -> None:
        self._credit = _CREDIT
        self._credited_at = trio.current_time()
        self._head = b""
        self._skip = _PREFACE_BYTES
        self._head_bytes = 0

    def feed(self, data: bytes) -> None:
        """Count what has arrived. Raises BadFrames."""
        start = self._skip
        if self._head:
            data, self._head = self._head + data, b""
            start = 0
        while start + _HEADER_BYTES <= len(data):
            length = int.from_bytes(data[start : start + 3], "big")
            if length > _FRAME_MAX_BYTES:  # h2 would first wait for all of it
                raise BadFrames(ErrorCodes.FRAME_SIZE_ERROR, "a frame that is too long")
            self._count(data[start + 3], data[start + 4], length)
            start += _HEADER_BYTES + length
        self._skip = max(0, start - len(data))
        self._head = data[start:]

    def answered(self) -> None:
        """A frame of an answer has been sent."""
        self._credit = min(_CREDIT, self._credit + _CREDIT_PER_FRAME)

    def was_reset(self) -> None:
        """The node has reset a stream, for a fault of the client. Raises BadFrames."""
        self._charge(_COST_OF_RESET)

    def _count(self, kind: int, flags: int, length: int) -> None:
        if kind in (_HEADERS, _CONTINUATION):
            self._head_bytes = length + (self._head_bytes if kind == _CONTINUATION else 0)
            if self._head_bytes > _HEAD_MAX_BYTES:
                raise BadFrames(ErrorCodes.ENHANCE_YOUR_CALM, "a head that is too long")
        if kind in (_DATA, _HEADERS):
            if not length and not flags & _END_STREAM:
                self._charge(1.0)
        else:
            self._charge(_COSTS.get(kind, 1.0))

    def _charge(self, cost: float) -> None:
        now = trio.current_time()
        self._credit = min(_CREDIT, self._credit + (now - self._credited_at) * _CREDIT_PER_S) - cost
        self._credited_at = now
        if self._credit < 0:
            raise BadFrames(ErrorCodes.ENHANCE_YOUR_CALM, "more frames than a client needs")
