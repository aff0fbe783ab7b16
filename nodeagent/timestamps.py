"""Times as they are written for others: on the wire, in answers, in the log."""

from datetime import UTC, datetime


def rfc3339(moment: datetime) -> str:
    """RFC 3339, in UTC, with milliseconds: `2026-11-28T06:57:32.000Z`. `moment` has a time zone."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
