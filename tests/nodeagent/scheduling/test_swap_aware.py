"""The policy's rules, each as the case that it decides."""

import pytest

from nodeagent.scheduling.estimates import LaneTimes
from nodeagent.scheduling.queueing import Decision, Grant, LaneSnapshot, Load, Priority, QueuedRequest, Wait
from nodeagent.scheduling.room import ServerUse
from nodeagent.scheduling.swap_aware import SwapAware

POLICY = SwapAware(swap_fairness_s=30, min_residency_s=2)
NOW = 1000.0


def times(load_s: float = 1.0) -> LaneTimes:
    measured = LaneTimes()
    for model_id in "ab":
        measured.loaded(model_id, load_s)
    return measured


def ready(since_s: float = 0.0, *, in_flight: int = 0, slots: int = 1) -> ServerUse:
    """A server that became ready `since_s` ago."""
    return ServerUse(ready=True, slots=slots, in_flight=in_flight, since=NOW - since_s)


def request(
    model_id: str, age_s: float = 0.0, priority: Priority = Priority.NORMAL, passed_s: float | None = None
) -> QueuedRequest:
    passed_since = None if passed_s is None else NOW - passed_s
    return QueuedRequest(model_id=model_id, admitted_at=NOW - age_s, priority=priority, passed_since=passed_since)


def decide(
    *waiting: QueuedRequest, loading: str | None = None, measured: LaneTimes | None = None, **servers: ServerUse
) -> Decision:
    return POLICY.decide(
        LaneSnapshot(now=NOW, waiting=waiting, servers=servers, loading=loading, times=measured or times())
    )


def granted(decision: Decision) -> int:
    assert isinstance(decision, Grant), decision
    return decision.index


def loaded(decision: Decision) -> str:
    assert isinstance(decision, Load), decision
    return decision.model_id


def test_requests_for_the_loaded_model_pass_an_older_one_for_another() -> None:
    assert granted(decide(request("b", 5), request("a"), a=ready(5))) == 1


@pytest.mark.parametrize(("load_s", "turn_s"), [(0.1, 2), (1, 8), (2, 16), (100, 30)])
def test_a_turn_lasts_eight_loads_but_never_under_the_residency_or_over_the_fairness_bound(
    load_s: float, turn_s: float
) -> None:
    measured = times(load_s)
    waiting = (request("b", turn_s + 10), request("a"))
    assert granted(decide(*waiting, measured=measured, a=ready(turn_s - 0.1))) == 1
    assert loaded(decide(*waiting, measured=measured, a=ready(turn_s + 0.1))) == "b"


def test_a_turn_begins_when_somebody_else_comes() -> None:
    assert granted(decide(request("b", 1), request("a"), a=ready(10_000))) == 1


def test_after_a_turn_older_requests_for_the_same_model_still_come_first() -> None:
    assert granted(decide(request("a", 50), request("b", 40), request("a", 30), a=ready(100))) == 0


def test_nobody_is_passed_for_longer_than_the_fairness_bound() -> None:
    waiting = (request("b", 40, passed_s=30), request("a"))
    assert loaded(decide(*waiting, a=ready(1))) == "b"
    decision = decide(*waiting, a=ready(1, in_flight=1, slots=4))
    assert isinstance(decision, Wait), "its free slots are not filled any more"
    assert decision.then == "b"


def test_of_several_overdue_those_for_the_loaded_model_come_first_and_then_the_one_passed_for_the_longest() -> None:
    waiting = (request("b", 60, passed_s=40), request("a", 50, passed_s=35), request("c", 45, passed_s=44))
    assert granted(decide(*waiting, a=ready(1))) == 1
    assert loaded(decide(*waiting)) == "c"


def test_an_overdue_request_comes_before_an_urgent_one() -> None:
    urgent = request("a", priority=Priority.INTERACTIVE)
    assert loaded(decide(request("b", 40, Priority.BATCH, passed_s=31), urgent, a=ready(1))) == "b"


def test_an_urgent_request_comes_first_even_if_that_costs_a_switch() -> None:
    urgent = request("b", priority=Priority.INTERACTIVE)
    assert loaded(decide(request("a", 5), urgent, a=ready(0.1))) == "b"
    assert granted(decide(request("a", 5, Priority.BATCH), request("a"), a=ready(0.1))) == 1


def test_being_passed_makes_a_request_more_urgent() -> None:
    newer = request("a")
    assert granted(decide(request("a", 9, Priority.BATCH, passed_s=9), newer, a=ready(1))) == 1
    assert granted(decide(request("a", 11, Priority.BATCH, passed_s=11), newer, a=ready(1))) == 0


def test_mere_waiting_does_not() -> None:
    assert granted(decide(request("a", 25, Priority.BATCH), request("a"), a=ready(1))) == 1


def test_a_load_that_somebody_waits_for_is_not_called_off_for_an_equal() -> None:
    assert isinstance(decide(request("b", 9), request("a"), loading="a"), Wait)


def test_a_load_that_nobody_waits_for_gives_way() -> None:
    assert loaded(decide(request("b"), loading="a")) == "b"


def test_a_model_in_use_is_never_evicted_whoever_waits() -> None:
    waiting = request("b", 90, Priority.INTERACTIVE, passed_s=80)
    assert isinstance(decide(waiting, a=ready(100, in_flight=1)), Wait)


def test_while_one_model_backs_off_another_is_started() -> None:
    backs_off = ServerUse(ready=False, slots=1, in_flight=0, backing_off=True)
    assert loaded(decide(request("a", 9), request("b"), a=backs_off)) == "b"
    assert loaded(decide(request("a", 9), a=backs_off)) == "a"


def test_nobody_waits() -> None:
    assert isinstance(decide(a=ready(1)), Wait)
