"""The limits of one API key. Pure: it takes the time and answers at once."""

import msgspec

_MINUTE_S = 60.0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a key may have; None is no limit."""

    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None


class Exceeded(msgspec.Struct, frozen=True):
    """A request is too much: `what` names the key of the configuration, `retry_after_s` says when it may come again,
    None if nobody knows."""

    what: str
    limit: int
    retry_after_s: float | None = None


class Meter:
    """Counts one key's requests against its limits.

    Requests come out of a bucket that holds `requests_per_minute` and fills evenly. A burst may use up the requests of
    a minute; then one follows each 60 / n seconds.

    What changes: `in_flight` in `begin` and `end`, `_available` and `_filled_at` in `begin`, these and `limits` in
    `change`.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.in_flight = 0
        self._available = float(limits.requests_per_minute or 0)
        self._filled_at = now

    def change(self, limits: Limits, now: float) -> None:
        """Other limits hold from now on; the requests in flight stay counted."""
        if limits.requests_per_minute != self.limits.requests_per_minute:
            self._available, self._filled_at = float(limits.requests_per_minute or 0), now
        self.limits = limits

    def begin(self, now: float, tokens_today: int) -> Exceeded | None:
        """Count one more request, or say which limit it exceeds. Each that is counted has to `end`."""
        limits = self.limits
        if limits.tokens_per_day is not None and tokens_today >= limits.tokens_per_day:
            return Exceeded("tokens_per_day", limits.tokens_per_day)
        if limits.concurrent_requests is not None and self.in_flight >= limits.concurrent_requests:
            return Exceeded("concurrent_requests", limits.concurrent_requests)
        if limits.requests_per_minute is not None:
            per_s = limits.requests_per_minute / _MINUTE_S
            filled = self._available + (now - self._filled_at) * per_s
            self._available, self._filled_at = min(filled, float(limits.requests_per_minute)), now
            if self._available < 1:
                return Exceeded("requests_per_minute", limits.requests_per_minute, (1 - self._available) / per_s)
            self._available -= 1
        self.in_flight += 1
        return None

    def end(self) -> None:
        """A counted request has ended."""
        self.in_flight -= 1


class Sums(msgspec.Struct):
    """What a key has used: since it was made, and on `day`, the last day of UTC on which it was used (`2026-03-02`)."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    day: str = ""
    tokens_of_day: int = 0

    def tokens_on(self, day: str) -> int:
        """The tokens of that day, which is today."""
        return self.tokens_of_day if self.day == day else 0

    def add_tokens(self, day: str, prompt: int, generated: int) -> None:
        """Count a request's tokens on that day."""
        self.tokens_of_day = self.tokens_on(day) + prompt + generated
        self.day = day
        self.prompt_tokens += prompt
        self.generated_tokens += generated
