import pytest
from msgspec.structs import replace

from nodeagent.scheduling.estimates import LaneTimes, Running
from nodeagent.scheduling.forecast import forecast
from nodeagent.scheduling.queueing import FirstCome, LaneSnapshot, QueuedRequest
from nodeagent.scheduling.room import Room, ServerUse
from nodeagent.scheduling.swap_aware import SwapAware


def times() -> LaneTimes:
    measured = LaneTimes()
    for model_id, load_s, service_s in (("a", 4.0, 1.0), ("b", 6.0, 3.0)):
        measured.loaded(model_id, load_s)
        measured.served(model_id, service_s)
    return measured


def lane(waiting: str, servers: dict[str, ServerUse], loading: str | None = None) -> LaneSnapshot:
    return LaneSnapshot(
        now=100.0,
        waiting=[QueuedRequest(model_id=model_id, admitted_at=100.0) for model_id in waiting],
        servers=servers,
        loading=loading,
        times=times(),
    )


def test_first_come_first_served_pays_each_load() -> None:
    a = ServerUse(ready=True, slots=1, in_flight=1, since=0.0)
    starts = forecast(FirstCome(), lane("aba", {"a": a}), [Running("a", 0.4)])
    # The one in flight ends in 0.6 s; the first takes 1 s; b is loaded in 6 s and takes 3 s; a again is loaded in 4 s.
    assert starts == pytest.approx([0.6, 1.6 + 6, 7.6 + 3 + 4])


def test_the_loaded_models_requests_are_expected_to_pass() -> None:
    a = ServerUse(ready=True, slots=1, in_flight=0, since=0.0)
    assert forecast(SwapAware(), lane("baa", {"a": a}), []) == pytest.approx([2 + 6, 0, 1])


def test_a_load_under_way_is_waited_for() -> None:
    assert forecast(SwapAware(), lane("bb", {}, loading="b"), [], load_left_s=2.5) == pytest.approx([2.5, 5.5])


def test_a_request_that_wants_more_slots_than_there_are_frees_no_more_than_it_has() -> None:
    a = ServerUse(ready=True, slots=2, in_flight=2, since=0.0)
    starts = forecast(SwapAware(), lane("aaa", {"a": a}), [Running("a", 0.0, slots=9)])
    assert starts == pytest.approx([1, 1, 2])


def test_slots_start_side_by_side() -> None:
    a = ServerUse(ready=True, slots=2, in_flight=1, since=0.0)
    assert forecast(SwapAware(), lane("aaa", {"a": a}), [Running("a", 0.0)]) == pytest.approx([0, 1, 1])


def test_what_can_not_be_expected_is_not_said() -> None:
    held = ServerUse(ready=True, slots=1, in_flight=0, held=True)
    assert forecast(FirstCome(), lane("ab", {"a": held}), []) == [None, None]


def test_far_behind_nothing_is_said() -> None:
    a = ServerUse(ready=True, slots=1, in_flight=0, since=0.0)
    starts = forecast(FirstCome(), lane("a" * 100, {"a": a}), [])
    assert starts[63] == pytest.approx(63)
    assert starts[64:] == [None] * 36


def test_a_server_that_has_failed_gives_no_memory_back() -> None:
    a = ServerUse(ready=True, slots=1, in_flight=0, since=0.0)
    gone = replace(a, ready=False, resident=False)
    sizes = {"a": 3, "b": 3, "c": 8, "gone": 9}
    room = Room(max_models=9, concurrent=True, free_bytes=2, bytes_of=sizes.__getitem__)
    starts = forecast(FirstCome(), replace(lane("bc", {"a": a, "gone": gone}), room=room), [])
    # b takes the place of a, is loaded in 6 s and takes 3 s; c has no room beside it, and is loaded in 2 s.
    assert starts == pytest.approx([6, 6 + 3 + times().load_s("c")])
