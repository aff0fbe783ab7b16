"""Cutting a stream of server-sent events at the ends of events."""

import re

# The end of an event: a line's end and an empty line, each CRLF, LF or CR (the HTML standard, 9.2.5). With CRs a chunk
# may end inside a CRLF; cutting there is harmless, since the LF that follows is then one more empty line.
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r)(?:\r\n|\n|\r)")


class EventCutter:
    """Returns complete events and keeps back an incomplete one, so that another event can follow at any time."""

    def __init__(self) -> None:
        self._kept = b""

    def feed(self, data: bytes) -> bytes:
        """Add what was received; return everything up to the end of the last complete event, b"" if none ended."""
        # An end may begin in what was kept: search its last three bytes again, and no more.
        search_from = max(0, len(self._kept) - 3)
        self._kept += data
        end = 0
        for found in _EVENT_END.finditer(self._kept, search_from):
            end = found.end()
        complete, self._kept = self._kept[:end], self._kept[end:]
        return complete

    def rest(self) -> bytes:
        """What is still kept after a stream that ended properly."""
        rest, self._kept = self._kept, b""
        return rest
