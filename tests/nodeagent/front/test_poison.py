from nodeagent.front.poison import BLOCKED_S, PoisonGuard


def test_a_body_is_rejected_for_a_minute_after_two_crashes() -> None:
    guard = PoisonGuard()
    assert guard.blocked_s(b"x", 0) == 0
    guard.record_crash(b"x", 0)
    assert guard.blocked_s(b"x", 1) == 0
    guard.record_crash(b"x", 2)
    assert guard.blocked_s(b"x", 3) == BLOCKED_S - 1
    assert guard.blocked_s(b"y", 3) == 0
    assert guard.blocked_s(b"x", 2 + BLOCKED_S) == 0


def test_a_body_that_was_answered_after_all_is_forgiven() -> None:
    guard = PoisonGuard()
    guard.record_crash(b"x", 0)
    guard.record_success(b"x")
    guard.record_crash(b"x", 1)
    assert guard.blocked_s(b"x", 2) == 0


def test_crashes_more_than_a_minute_apart_do_not_add_up() -> None:
    guard = PoisonGuard()
    guard.record_crash(b"x", 0)
    guard.record_crash(b"x", BLOCKED_S)
    assert guard.blocked_s(b"x", BLOCKED_S) == 0
