"""Times as they are written for others."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from nodeagent.timestamps import rfc3339

IN_INDIA = timezone(timedelta(hours=5, minutes=30))


@pytest.mark.parametrize(
    ("moment", "written"),
    [
        (datetime(2026, 11, 28, 6, 57, 32, tzinfo=UTC), "2026-11-28T06:57:32.000Z"),
        (datetime(2026, 11, 28, 6, 57, 32, 123_999, UTC), "2026-11-28T06:57:32.123Z"),
        (datetime(2026, 1, 1, 4, 0, 0, 500_000, IN_INDIA), "2025-12-31T22:30:00.500Z"),
    ],
)
def test_a_time_is_written_in_utc_with_milliseconds(moment: datetime, written: str) -> None:
    assert rfc3339(moment) == written
    assert datetime.fromisoformat(written) == moment.replace(microsecond=moment.microsecond // 1000 * 1000)
