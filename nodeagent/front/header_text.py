"""Headers as text and as bytes: frameworks have them as text, connections as bytes. Each byte is one character."""

from collections.abc import Iterable


def as_text(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """Headers as web frameworks have them."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def as_bytes(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """Headers as connections have them."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def text_of(value: bytes | None) -> str | None:
    """The value of a header as text, None if the header is missing."""
    return None if value is None else value.decode("latin-1")
