"""Numbers that clients write into queries and headers."""

from typing import Final

from nodeagent.errors import InvalidRequest

# The largest that SQLite and most clients have. Python refuses to read one of thousands of digits.
MOST: Final = 2**63 - 1
_DIGITS_MAX: Final = len(str(MOST))


def whole_number(name: str, text: str, low: int = 0, high: int = MOST) -> int:
    """The number that the field `name` has. Raises InvalidRequest if it is none, or out of bounds."""
    if text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX and low <= int(text) <= high:
        return int(text)
    bounds = f"from {low} to {high}" if high < MOST else f"of at least {low}"
    raise InvalidRequest(f"'{name}' must be a whole number {bounds}, not {text[:40]!r}.", param=name)
