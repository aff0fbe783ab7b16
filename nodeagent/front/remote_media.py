"""Images, sounds and files that a request has by URL: llama-server would fetch them, from inside this network. Pure.

They are refused unless `allow_remote_media` is true; what is in the request itself (`data:`, base64) passes. A body is
searched for a URL in a field that may mean one, and parsed only where one is found.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from nodeagent.errors import RemoteMediaForbidden

# What llama-server and the APIs call such fields: OpenAI's `image_url` (also `{"url": ...}`), `file_url`, Anthropic's
# `source.url`.
_FIELDS: Final = ("image_url", "video_url", "audio_url", "file_url", "input_audio", "source", "url", "data")
# Where a request has parts that may be media.
_HOLDERS: Final = ("messages", "content", "input", "output", "system", "prompt")
_MEDIA: Final = ("image_url", "video_url", "audio_url", "file_url", "input_audio", "source")
# By these first letters llama-server knows a URL, whatever follows.
_SCHEMES: Final = ("http", "file:", "ftp:")
_BACKSLASH: Final = ord("\\")
# More values than any request with media has: it is refused unparsed, since that would take gigabytes.
_MOST_VALUES: Final = 500_000
_DEEPEST: Final = 16


def _escapable(text: str) -> str:
    """A pattern for a text in JSON, in any case, each character as it is or escaped."""
    parts = []
    for one in text:
        codes = {f"{ord(both):02x}" for both in (one.lower(), one.upper())}
        parts.append(rf"(?:{re.escape(one)}|\\u00(?:{'|'.join(sorted(codes))}))")
    return "".join(parts)


_SUSPECT: Final = re.compile(
    (
        r'"(?:' + "|".join(map(_escapable, _FIELDS)) + r')"[ \t\r\n]*:[ \t\r\n]*"'
        r"(?:[ \t]|\\[tnrf]|\\u00[01][0-9a-f]|\\u0020)*(?:" + "|".join(map(_escapable, _SCHEMES)) + ")"
    ).encode(),
    re.IGNORECASE,
)


def refuse_remote_media(body: bytes) -> None:
    """Raise RemoteMediaForbidden if the request refers to media that a server would fetch. `body` is valid JSON."""
    if not _is_suspect(body):
        return
    if body.count(b",") + body.count(b"{") + body.count(b"[") > _MOST_VALUES:
        raise RemoteMediaForbidden("messages")
    try:
        found = next(_remote(msgspec.json.decode(body), "", 0), None)
    except (msgspec.DecodeError, RecursionError):  # valid JSON, with a number or a depth that is out of bounds
        found = "messages"
    if found is not None:
        raise RemoteMediaForbidden(found)


def _is_suspect(body: bytes) -> bool:
    """Whether a field that may mean media has a URL of another host."""
    # Searches for fixed bytes are a hundred times as fast as the pattern.
    lower = body.lower()
    if b"\\u00" not in lower:
        has_scheme = b"http" in lower or b"file:" in lower or b"ftp:" in lower
        if not (has_scheme and (b"url" in lower or b"source" in lower or b"input_audio" in lower)):
            return False
    # A quote outside of a string never follows a backslash, and one inside of a string always does.
    return any(body[found.start() - 1] != _BACKSLASH for found in _SUSPECT.finditer(body))


def _remote(value: Any, place: str, depth: int) -> Iterator[str]:
    """Where in these messages a URL is that a server would fetch. What is nested too deeply is not looked into, and
    counts as one."""
    if depth > _DEEPEST:
        yield place
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _remote(item, f"{place}[{index}]", depth + 1)
    elif isinstance(value, dict):
        for name, inner in value.items():
            here = f"{place}.{name}".lstrip(".")
            if name in _MEDIA:
                yield from (f"{here}{below}" for below in _urls(inner))
            # Whatever is in the arguments of a tool is text for the model.
            elif name in _HOLDERS and not (name == "input" and value.get("type") == "tool_use"):
                yield from _remote(inner, here, depth + 1)


def _urls(value: Any) -> Iterator[str]:
    """Where a URL of another host is in the value of a field for media: in itself, or in one of its own."""
    if isinstance(value, str) and value.strip().lower().startswith(_SCHEMES):
        yield ""
    elif isinstance(value, dict):
        for name in ("url", "data"):
            if isinstance(inner := value.get(name), str) and inner.strip().lower().startswith(_SCHEMES):
                yield f".{name}"
