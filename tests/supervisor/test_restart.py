"""When a child that exited is restarted: pure tables and properties."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.lifecycle import Cause, Exit
from supervisor.restart import GiveUp, Restart, RestartPolicy, RestartTracker

CRASH = Exit(code=1, cause=Cause.EXITED, reason="exited with code 1", ready_s=10.0)
FAILED_START = Exit(code=1, cause=Cause.EXITED, reason="exited with code 1")


def tracker(**policy: object) -> RestartTracker:
    return RestartTracker(RestartPolicy(**policy), random.Random(1))  # type: ignore[arg-type]


def delay_s(decision: Restart | GiveUp) -> float:
    assert isinstance(decision, Restart), decision
    return decision.delay_s


def test_the_first_restart_of_a_child_that_had_been_ready_is_immediate_and_the_next_ones_wait_longer() -> None:
    it = tracker()
    assert delay_s(it.decide(CRASH, 0)) == 0
    assert 0.5 <= delay_s(it.decide(CRASH, 1)) <= 1
    assert 1 <= delay_s(it.decide(CRASH, 2)) <= 2


def test_a_start_that_failed_is_never_repeated_at_once() -> None:
    assert delay_s(tracker().decide(FAILED_START, 0)) >= 0.5


def test_a_child_that_fails_too_seldom_to_be_given_up_on_is_restarted_for_ever_with_the_longest_delay() -> None:
    it = tracker()
    for number in range(3000):
        delay = delay_s(it.decide(FAILED_START, number * 300.0))
    assert 30 <= delay <= 60


def test_more_exits_than_allowed_in_the_period_give_up_until_the_cool_down_is_over() -> None:
    it = tracker(max_restarts=3, period_s=60, cooldown_s=60)
    for at in range(3):
        assert isinstance(it.decide(CRASH, at), Restart)
    last = it.decide(CRASH, 3)
    assert isinstance(last, GiveUp)
    assert last.retry_at == 63
    assert "4 exits in 60 s" in last.reason


def test_exits_before_the_period_do_not_count() -> None:
    it = tracker(max_restarts=1, period_s=60)
    for at in range(0, 1000, 61):
        assert delay_s(it.decide(CRASH, at)) == 0


def test_a_child_that_was_ready_for_long_has_a_clean_record() -> None:
    it = tracker(max_restarts=1, period_s=1000, reset_after_s=300)
    it.decide(CRASH, 0)
    assert delay_s(it.decide(Exit(code=1, cause=Cause.EXITED, reason="died", ready_s=300.0), 310)) == 0


def test_a_shortage_of_our_own_is_retried_with_back_off_and_never_counts() -> None:
    it = tracker(max_restarts=1, cooldown_s=60)
    shortage = Exit(code=None, cause=Cause.OWN_SHORTAGE, reason="could not be spawned")
    delays = [delay_s(it.decide(shortage, now)) for now in range(100)]
    assert 0.5 <= delays[0] <= 1
    assert 1 <= delays[1] <= 2
    assert 30 <= delays[-1] <= 60
    assert delay_s(it.decide(CRASH, 100)) == 0  # the first that counts
    assert isinstance(it.decide(CRASH, 101), GiveUp)
    it.half_open()
    assert isinstance(it.decide(shortage, 200), Restart)
    assert isinstance(it.decide(FAILED_START, 201), GiveUp)


def test_a_child_out_of_memory_is_given_up_on_at_once_until_the_cool_down_is_over() -> None:
    it = tracker(max_restarts=3, cooldown_s=60)
    out_of_memory = Exit(code=-9, cause=Cause.OUT_OF_MEMORY, reason="out of memory", ready_s=10_000.0)
    decision = it.decide(out_of_memory, 5)
    assert decision == GiveUp("out of memory; not restarted with the same arguments", 65)
    it = tracker(no_restart=frozenset())
    assert isinstance(it.decide(out_of_memory, 5), Restart)


def test_a_half_open_tracker_gives_up_at_once_if_the_start_fails_and_counts_anew_if_it_succeeds() -> None:
    it = tracker(max_restarts=1)
    it.decide(CRASH, 0)
    assert isinstance(it.decide(CRASH, 1), GiveUp)
    it.half_open()
    assert isinstance(it.decide(FAILED_START, 62), GiveUp)
    it.half_open()
    assert delay_s(it.decide(CRASH, 130)) == 0


@pytest.mark.parametrize(
    ("mode", "code", "restarted"),
    [
        ("permanent", 0, True),
        ("permanent", 1, True),
        ("transient", 0, False),
        ("transient", 1, True),
        ("temporary", 0, False),
        ("temporary", 1, False),
    ],
)
def test_restart_modes_are_those_of_otp(mode: str, code: int, restarted: bool) -> None:
    decision = tracker(mode=mode).decide(Exit(code=code, cause=Cause.EXITED, reason="ended", ready_s=1.0), 0)
    assert isinstance(decision, Restart) == restarted
    if isinstance(decision, GiveUp):
        assert decision.retry_at is None


@given(
    pauses=st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=40),
    max_restarts=st.integers(0, 5),
    period_s=st.floats(1, 100),
)
def test_no_child_is_ever_started_more_often_than_its_policy_says(
    pauses: list[tuple[float, bool]], max_restarts: int, period_s: float
) -> None:
    it = tracker(max_restarts=max_restarts, period_s=period_s, reset_after_s=1e9)
    now, starts = 0.0, [0.0]
    for lived_s, was_ready in pauses:
        now += lived_s
        ready_s = lived_s if was_ready else None
        decision = it.decide(Exit(code=1, cause=Cause.EXITED, reason="ended", ready_s=ready_s), now)
        if isinstance(decision, GiveUp):
            assert len([at for at in starts if at > now - period_s - 60]) >= 1
            break
        assert 0 <= decision.delay_s <= 60
        now += decision.delay_s
        starts.append(now)
    for at in starts:
        assert sum(at <= other < at + period_s for other in starts) <= max_restarts + 1
