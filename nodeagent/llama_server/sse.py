"""Cutting a stream of server-sent events at the ends of events."""

import re

# The end of an event: a line's end and an empty line, each CRLF, LF or CR (the HTML standard, 9.2.5). With CRs a chunk
# may end inside a CRLF; cutting there is harmless, since the LF that follows is then one more empty line.
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r)(?:\r\n|\n|\r)")
# An end may begin in what was kept, with its first three bytes.
_END_KEPT_BYTES = 3


class EventCutter:
    """Returns complete events and keeps back an incomplete one, so that another event can follow at any time."""

    def __init__(self) -> None:
        self._kept = bytearray()

    @property
    def kept_bytes(self) -> int:
        """How many bytes of an incomplete event are kept."""
        return len(self._kept)

    def feed(self, data: bytes) -> bytes:
        """Add what was received; return everything up to the end of the last complete event, b"" if none ended."""
        kept = self._kept
        if not kept and data.endswith(b"\n\n"):  # as nearly always: what came is whole events
            return data
        search_from = max(0, len(kept) - _END_KEPT_BYTES)
        kept += data
        end = 0
        for found in _EVENT_END.finditer(kept, search_from):
            end = found.end()
        complete = bytes(kept[:end])
        del kept[:end]
        return complete

    def rest(self) -> bytes:
        """What is still kept after a stream that ended properly."""
        rest = bytes(self._kept)
        self._kept.clear()
        return rest
