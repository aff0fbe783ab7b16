import pytest

from nodeagent.scheduling.estimates import LaneTimes
from nodeagent.scheduling.queueing import FirstCome, Grant, LaneSnapshot, Load, QueuedRequest, Wait, step
from nodeagent.scheduling.room import ServerUse

READY = ServerUse(ready=True, slots=1, in_flight=0)
BUSY = ServerUse(ready=True, slots=1, in_flight=1)
STARTING = ServerUse(ready=False, slots=1, in_flight=0)
HELD = ServerUse(ready=True, slots=1, in_flight=0, held=True)


def lane(waiting: str, servers: dict[str, ServerUse], loading: str | None = None) -> LaneSnapshot:
    return LaneSnapshot(
        now=0.0,
        waiting=[QueuedRequest(model_id=model_id) for model_id in waiting],
        servers=servers,
        loading=loading,
        times=LaneTimes(),
    )


@pytest.mark.parametrize(
    ("waiting", "servers", "loading", "expected"),
    [
        ("", {"a": READY}, None, Wait),
        ("a", {"a": READY}, None, Grant),
        ("a", {"a": BUSY}, None, Wait),
        ("a", {"a": ServerUse(ready=True, slots=4, in_flight=3)}, None, Grant),
        ("a", {"a": ServerUse(ready=True, slots=4, in_flight=4)}, None, Wait),
        ("a", {"a": HELD}, None, Wait),
        ("a", {}, None, Load),
        ("a", {"a": STARTING}, None, Load),
        ("a", {"a": STARTING}, "a", Wait),
        ("b", {"a": READY}, None, Load),
        ("b", {"a": BUSY}, None, Wait),
        ("ba", {"a": BUSY}, None, Wait),
        ("b", {"a": STARTING}, "a", Load),
    ],
)
def test_first_come_first_served_lets_the_head_of_the_queue_decide(
    waiting: str, servers: dict[str, ServerUse], loading: str | None, expected: type
) -> None:
    decision = FirstCome().decide(lane(waiting, servers, loading))
    assert isinstance(decision, expected), decision
    if isinstance(decision, Load):
        assert decision.model_id == waiting[0]
    if isinstance(decision, Grant):
        assert decision.index == 0


def test_a_server_whose_own_requests_are_broken_but_not_yet_back_does_not_block_its_restart() -> None:
    assert isinstance(FirstCome().decide(lane("a", {"a": ServerUse(ready=False, slots=4, in_flight=2)})), Load)


def test_nothing_is_granted_on_a_server_that_a_load_under_way_may_be_stopping() -> None:
    decision = step(lane("a", {"a": READY}, loading="b"), 0, "why")
    assert isinstance(decision, Load), decision
    assert decision.model_id == "a"


def test_one_model_at_a_time_is_in_use_even_if_two_servers_are_ready() -> None:
    decision = step(lane("b", {"a": BUSY, "b": READY}), 0, "why")
    assert isinstance(decision, Wait)
    assert decision.then is None, "b is loaded already"


def test_waiting_for_what_is_in_use_names_the_model_that_comes_after_it() -> None:
    decision = FirstCome().decide(lane("b", {"a": BUSY}))
    assert isinstance(decision, Wait)
    assert decision.then == "b"


@pytest.mark.parametrize(("slots", "in_flight", "decision"), [(2, 2, Grant), (2, 3, Wait), (9, 0, Grant), (9, 1, Wait)])
def test_a_request_is_granted_only_with_all_the_slots_that_it_needs(
    slots: int, in_flight: int, decision: type[object]
) -> None:
    server = ServerUse(ready=True, slots=4, in_flight=in_flight)
    request = QueuedRequest(model_id="a", slots=slots)
    snapshot = LaneSnapshot(now=0.0, waiting=[request], servers={"a": server}, loading=None, times=LaneTimes())
    assert isinstance(FirstCome().decide(snapshot), decision)
