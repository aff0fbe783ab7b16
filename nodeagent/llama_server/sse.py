"""Cutting a stream of server-sent events at the ends of events."""

import re

# The end of an event: a line's end and an empty line, each CRLF, LF or CR (the HTML standard, 9.2.5). With CRs a chunk
# may end inside a CRLF; cutting there is harmless, since the LF that follows is then one more empty line.
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r)(?:\r\n|\n|\r)")


class EventCutter:
    """Lets whole events through and holds the begun one back, so that another event can always follow."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Return what is whole by now: all up to the last event's end; b"" where no event ended."""
        # An end may begin in what is held: look again at its last three bytes, and no further.
        look_from = max(0, len(self._held) - 3)
        self._held += data
        end = 0
        for found in _EVENT_END.finditer(self._held, look_from):
            end = found.end()
        whole, self._held = self._held[:end], self._held[end:]
        return whole

    def rest(self) -> bytes:
        """What is still held when the stream has ended well."""
        rest, self._held = self._held, b""
        return rest
