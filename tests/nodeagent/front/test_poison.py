from nodeagent.front.poison import BLOCKED_S, PoisonGuard


def test_a_body_is_refused_for_a_while_after_two_servers_died_under_it() -> None:
    guard = PoisonGuard()
    assert guard.blocked_s(b"x", 0) == 0
    guard.felled(b"x", 0)
    assert guard.blocked_s(b"x", 1) == 0
    guard.felled(b"x", 2)
    assert guard.blocked_s(b"x", 3) == BLOCKED_S - 1
    assert guard.blocked_s(b"y", 3) == 0
    assert guard.blocked_s(b"x", 2 + BLOCKED_S) == 0


def test_a_body_that_was_answered_after_all_is_forgiven() -> None:
    guard = PoisonGuard()
    guard.felled(b"x", 0)
    guard.survived(b"x")
    guard.felled(b"x", 1)
    assert guard.blocked_s(b"x", 2) == 0


def test_deaths_long_apart_do_not_add_up() -> None:
    guard = PoisonGuard()
    guard.felled(b"x", 0)
    guard.felled(b"x", BLOCKED_S)
    assert guard.blocked_s(b"x", BLOCKED_S) == 0
