"""The limits of one API key, as tables and properties."""

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.access.limits import Exceeded, Limits, Meter, Sums

MONDAY, TUESDAY = "2026-03-02", "2026-03-03"


def test_without_limits_everything_is_let_in() -> None:
    meter = Meter(Limits(), 0.0)
    assert [meter.begin(0.0, 10**15) for _ in range(1000)] == [None] * 1000
    assert meter.in_flight == 1000


def test_a_minutes_requests_may_come_at_once_and_then_one_follows_each_part_of_it() -> None:
    meter = Meter(Limits(requests_per_minute=4), 128.0)
    assert [meter.begin(128.0, 0) for _ in range(4)] == [None] * 4
    assert meter.begin(128.0, 0) == Exceeded("requests_per_minute", 4, 15.0)
    assert meter.begin(135.5, 0) == Exceeded("requests_per_minute", 4, 7.5)
    assert meter.begin(143.0, 0) is None
    assert meter.begin(143.0, 0) is not None


def test_requests_at_the_same_time_are_limited_until_one_ends() -> None:
    meter = Meter(Limits(concurrent_requests=2), 0.0)
    assert [meter.begin(0.0, 0), meter.begin(0.0, 0)] == [None, None]
    assert meter.begin(0.0, 0) == Exceeded("concurrent_requests", 2)
    meter.end()
    assert meter.begin(0.0, 0) is None


def test_a_request_that_is_refused_uses_up_nothing() -> None:
    meter = Meter(Limits(requests_per_minute=1, concurrent_requests=1), 0.0)
    assert meter.begin(0.0, 0) is None
    assert meter.begin(60.0, 0) == Exceeded("concurrent_requests", 1)
    meter.end()
    assert meter.begin(60.0, 0) is None
    assert meter.in_flight == 1


def test_other_limits_hold_at_once_and_requests_in_flight_stay_counted() -> None:
    meter = Meter(Limits(requests_per_minute=1), 0.0)
    assert meter.begin(0.0, 0) is None
    meter.change(Limits(requests_per_minute=2, concurrent_requests=2), 1.0)
    assert meter.begin(1.0, 0) is None
    assert meter.begin(1.0, 0) == Exceeded("concurrent_requests", 2)
    meter.end()
    meter.end()
    assert meter.in_flight == 0
    meter.change(Limits(requests_per_minute=2), 1.0)
    assert meter.begin(1.0, 0) is None
    assert meter.begin(1.0, 0) == Exceeded("requests_per_minute", 2, 30.0)


def test_the_tokens_of_a_day_are_used_up_until_the_next_one() -> None:
    meter, sums = Meter(Limits(tokens_per_day=10), 0.0), Sums()
    sums.add_tokens(MONDAY, 6, 3)
    assert meter.begin(0.0, sums.tokens_on(MONDAY)) is None
    sums.add_tokens(MONDAY, 5, 0)
    assert meter.begin(0.0, sums.tokens_on(MONDAY)) == Exceeded("tokens_per_day", 10)
    assert meter.begin(0.0, sums.tokens_on(TUESDAY)) is None
    sums.add_tokens(TUESDAY, 1, 1)
    assert (sums.tokens_on(TUESDAY), sums.prompt_tokens, sums.generated_tokens) == (2, 12, 4)


@given(st.integers(1, 50), st.lists(st.floats(0, 30), max_size=200))
def test_in_no_minute_are_there_more_than_twice_the_requests_of_one(limit: int, pauses: list[float]) -> None:
    meter, now, let_in = Meter(Limits(requests_per_minute=limit), 0.0), 0.0, []
    for pause in pauses:
        now += pause
        if meter.begin(now, 0) is None:
            let_in.append(now)
    for start in let_in:
        assert sum(start <= at < start + 60 for at in let_in) <= 2 * limit
    # Over a long time it is the limit, but for the burst at the beginning.
    assert len(let_in) <= limit + now * limit / 60 + 1


@given(st.integers(1, 50), st.floats(0, 1000))
def test_who_waits_as_long_as_told_is_let_in(limit: int, begins_at: float) -> None:
    meter = Meter(Limits(requests_per_minute=limit), begins_at)
    for _ in range(limit):
        assert meter.begin(begins_at, 0) is None
    refused = meter.begin(begins_at, 0)
    assert refused is not None
    assert refused.retry_after_s is not None
    assert meter.begin(begins_at + refused.retry_after_s + 1e-6, 0) is None
