"""The output of a process, line by line."""

import re
from collections import deque
from collections.abc import Callable

import trio

_LINES_KEPT = 1000
_LINE_BYTES = 4096
# Control characters but the tab (C0 with ESC, DEL, C1), what else ends a line, what reorders text on a screen (as
# Unicode's Bidirectional Algorithm lists it), and lone surrogates, which can't be encoded.
_UNPRINTABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters escaped (`\\x1b`), so that it can do nothing to a terminal or a log file."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Output:
    """The last 1,000 lines that a process printed, each `printable` and cut to 4 KiB. Bytes that are not UTF-8 are
    replaced.

    What changes: everything, only in `feed`.
    """

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.count = 0
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._on_line = on_line
        self._unfinished = b""
        self._waiting = trio.lowlevel.ParkingLot()

    def lines(self, last: int = _LINES_KEPT) -> list[str]:
        """The last lines, oldest first."""
        return list(self._lines)[-last:]

    async def more_than(self, count: int) -> None:
        """Return once the process has printed more than `count` lines in total."""
        while self.count <= count:
            await self._waiting.park()

    def feed(self, data: bytes) -> None:
        """Add what was read; b"" is the end of the output, and so of the last line."""
        *ended, rest = (self._unfinished + data).split(b"\n")
        for line in ended:
            self._add(line)
        # However long a line gets, only the part that will be shown is kept.
        self._unfinished = rest[: _LINE_BYTES + 1]
        if not data and rest:
            self._add(rest)
            self._unfinished = b""
        self._waiting.unpark_all()

    def _add(self, line: bytes) -> None:
        text = printable(line[:_LINE_BYTES].decode("utf-8", errors="replace").rstrip("\r"))
        if len(line) > _LINE_BYTES or len(text) > _LINE_BYTES:
            text = text[:_LINE_BYTES] + " [cut]"
        self._lines.append(text)
        self.count += 1
        self._on_line(text)
