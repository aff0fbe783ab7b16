"""The bodies of the last requests for inference and of their answers, for operators who ask for one of them.

They are kept in memory only, and only while `Bodies.limits` is set: they may hold what people write in confidence. No
header is kept of a request, and so no key. What is no text, such as a form with a sound, is a type and a size.
"""

import codecs
from collections.abc import Iterable
from typing import Any, Final

import msgspec

_TEXTS: Final = frozenset({"application/json", "application/x-ndjson", "application/x-www-form-urlencoded"})
_TYPE_CHARS: Final = 100


class Limits(msgspec.Struct, frozen=True):
    """How many bytes are kept of each body, and of all together."""

    each_bytes: int
    all_bytes: int


class Bodies:
    """The bodies of requests that have ended, by the numbers of their records.

    What changes: `limits` in `limit`; the rest in `keep`, `limit` and `room_for`. `held_bytes` counts those of requests
    in progress too.
    """

    def __init__(self) -> None:
        self.limits: Limits | None = None
        self.held_bytes = 0
        self._ended: dict[int, KeptBodies] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._ended

    def find(self, number: int) -> "KeptBodies | None":
        """Those of that record, None if they are not kept."""
        return self._ended.get(number)

    def limit(self, limits: Limits | None) -> None:
        """Keep as much from now on; with None forget everything, and keep nothing."""
        self.limits = limits
        while self._ended and (limits is None or self.held_bytes > limits.all_bytes):
            self._forget_first()

    def keep(self, number: int, kept: "KeptBodies", oldest: int) -> None:
        """A request has ended, whose record has that number. Forget those of records before the `oldest` one."""
        while self._ended and next(iter(self._ended)) < oldest:
            self._forget_first()
        kept.end()
        if self.limits is None:
            self.held_bytes -= kept.held_bytes
        else:
            self._ended[number] = kept

    def room_for(self, held: int, wanted: int) -> int:
        """How many of `wanted` bytes may be kept of a body of which `held` bytes are. They count from now on; the
        oldest bodies make room for them."""
        if self.limits is None:
            return 0
        wanted = max(0, min(wanted, self.limits.each_bytes - held))
        while self._ended and self.held_bytes + wanted > self.limits.all_bytes:
            self._forget_first()
        granted = max(0, min(wanted, self.limits.all_bytes - self.held_bytes))
        self.held_bytes += granted
        return granted

    def _forget_first(self) -> None:
        self.held_bytes -= self._ended.pop(next(iter(self._ended))).held_bytes


class KeptBody:
    """The beginning of one body. What changes: `size` and `content`, in `add`; `content` is shrunk in `end`."""

    __slots__ = ("_bodies", "content", "media_type", "size")

    def __init__(self, bodies: Bodies, content_type: str) -> None:
        self._bodies = bodies
        media_type = content_type.partition(";")[0].strip().lower()[:_TYPE_CHARS]
        self.media_type = media_type if media_type.isprintable() else ""
        self.size = 0
        self.content: bytearray | bytes = bytearray()

    def add(self, chunk: bytes) -> None:
        """The body goes on with these bytes. What does not fit any more is counted only."""
        held = len(self.content)
        if held == self.size and chunk and _is_text(self.media_type):
            self.content += chunk[: self._bodies.room_for(held, len(chunk))]
        self.size += len(chunk)

    def end(self) -> None:
        """There are no more bytes."""
        self.content = bytes(self.content)

    def shown(self) -> dict[str, Any]:
        """The body as JSON. `text` is its beginning if it is `cut`, and null if it is no text."""
        is_text, is_cut = _is_text(self.media_type), len(self.content) < self.size
        # A character that is cut in two is left out.
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(self.content, final=not is_cut)
        return {
            "type": self.media_type,
            "bytes": self.size,
            "cut": is_text and is_cut,
            "text": text if is_text else None,
        }


class KeptBodies:
    """The body of one request as its server got it, and its answer's as its client did. What changes: `request` and
    `answer` once, when they come."""

    __slots__ = ("_bodies", "answer", "request")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.request: KeptBody | None = None
        self.answer: KeptBody | None = None

    @property
    def held_bytes(self) -> int:
        """The bytes that are kept."""
        return sum(len(body.content) for body in (self.request, self.answer) if body is not None)

    def requested(self, headers: Iterable[tuple[bytes, bytes]], content: bytes) -> None:
        """The request's body, with the headers that its server got (names in lower case)."""
        if content:
            self.request = KeptBody(self._bodies, dict(headers).get(b"content-type", b"").decode("latin-1"))
            self.request.add(content)

    def answered(self, content_type: str) -> "KeptBody":
        """The answer begins; what is returned takes its body."""
        self.answer = KeptBody(self._bodies, content_type)
        return self.answer

    def end(self) -> None:
        """The request has ended."""
        for body in (self.request, self.answer):
            if body is not None:
                body.end()


def shown(kept: KeptBodies | None) -> dict[str, Any]:
    """The bodies of a record as JSON, null where there is none or it is not kept."""
    request, answer = (None, None) if kept is None else (kept.request, kept.answer)
    return {
        "request_body": None if request is None else request.shown(),
        "answer_body": None if answer is None else answer.shown(),
    }


def _is_text(media_type: str) -> bool:
    return media_type.startswith("text/") or media_type in _TEXTS or media_type.endswith("+json")
