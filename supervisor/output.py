"""The output of a process, line by line."""

from collections import deque
from collections.abc import Callable

import trio

_LINES_KEPT = 1000
_LINE_BYTES = 4096


class Output:
    """The last 1,000 lines that a process printed, each cut to 4 KiB. Bytes that are not UTF-8 are replaced.

    What changes: everything, only in `feed`.
    """

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.count = 0
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._on_line = on_line
        self._unfinished = b""
        self._more = trio.Event()

    def lines(self, last: int = _LINES_KEPT) -> list[str]:
        """The last lines, oldest first."""
        return list(self._lines)[-last:]

    async def more_than(self, count: int) -> None:
        """Return once the process has printed more than `count` lines in total."""
        while self.count <= count:
            await self._more.wait()

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

    def _add(self, line: bytes) -> None:
        cut = " [cut]" if len(line) > _LINE_BYTES else ""
        text = line[:_LINE_BYTES].decode("utf-8", errors="replace").rstrip("\r") + cut
        self._lines.append(text)
        self.count += 1
        self._more.set()
        self._more = trio.Event()
        self._on_line(text)
