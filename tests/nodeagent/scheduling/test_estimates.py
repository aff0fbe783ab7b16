import pytest

from nodeagent.scheduling.estimates import Backlog, LaneTimes, Running


@pytest.fixture
def times() -> LaneTimes:
    measured = LaneTimes()
    for model_id, load_s, service_s in (("a", 4.0, 1.0), ("b", 6.0, 3.0)):
        measured.loaded(model_id, load_s)
        measured.served(model_id, service_s)
    return measured


def test_a_free_slot_of_the_loaded_model_is_had_at_once(times: LaneTimes) -> None:
    assert times.start_s("a", Backlog(resident="a")) == 0
    assert times.start_s("a", Backlog(resident="a", slots=2, running=[Running("a", 0.2)], queued={"b": 1})) == 0


def test_those_for_another_model_are_passed(times: LaneTimes) -> None:
    assert times.start_s(
        "a", Backlog(resident="a", running=[Running("a", 0.2)], queued={"b": 1, "a": 1})
    ) == pytest.approx(0.8 + 1)


def test_another_model_comes_after_everyone_with_each_model_loaded_once(times: LaneTimes) -> None:
    assert times.start_s(
        "b", Backlog(resident="a", running=[Running("a", 0.2)], queued={"b": 2, "a": 1})
    ) == pytest.approx(0.8 + 3 + 1 + 3 + 6)
    assert times.start_s("b", Backlog(resident=None)) == pytest.approx(6)


def test_a_load_under_way_is_waited_for(times: LaneTimes) -> None:
    assert times.start_s("a", Backlog(resident="a", load_left_s=2.5, queued={"a": 1})) == pytest.approx(2.5 + 1)


def test_an_answer_that_takes_longer_than_expected_is_likely_to_go_on(times: LaneTimes) -> None:
    assert times.start_s("a", Backlog(resident="a", running=[Running("a", 50.0)])) == pytest.approx(25)


def test_what_was_not_measured_here_is_taken_from_another_device(times: LaneTimes) -> None:
    elsewhere, node = LaneTimes(), LaneTimes()
    times.node = elsewhere.node = node
    assert elsewhere.load_s("b") == 2
    times.loaded("b", 6)
    times.served("b", 3)
    assert (elsewhere.load_s("b"), elsewhere.service_s("b")) == (6, 3)
    elsewhere.loaded("b", 1)
    assert (elsewhere.load_s("b"), elsewhere.measured_load_s("a")) == (1, None)
    assert times.load_s("b") == 6


def test_the_whole_queue_one_by_one(times: LaneTimes) -> None:
    backlog = Backlog(resident="a", running=[Running("a", 0.5)])
    assert times.drained_s(backlog, ["a", "b", "a"]) == pytest.approx(0.5 + 1 + (6 + 3) + (4 + 1))


def test_averages_follow_what_is_measured_and_one_odd_one_does_not_own_them(times: LaneTimes) -> None:
    times.served("a", 9.0)
    assert times.service_s("a") == pytest.approx(3.0)
    for _ in range(20):
        times.served("a", 9.0)
    assert times.service_s("a") == pytest.approx(9.0, rel=0.01)


@pytest.mark.parametrize(
    ("backlog", "next_model", "free_in_s"),
    [
        (Backlog(resident="a"), None, 0),
        (Backlog(resident="a", running=[Running("a", 0.2), Running("b", 1.0)]), "a", 0.8),
        (Backlog(resident="a"), "a", 1),
        (Backlog(resident="b", load_left_s=2.5), "b", 2.5 + 3),
        (Backlog(resident="a"), "b", 6 + 3),
    ],
)
def test_the_next_place_becomes_free_when_a_request_ends(
    times: LaneTimes, backlog: Backlog, next_model: str | None, free_in_s: float
) -> None:
    assert times.place_free_s(backlog, next_model) == pytest.approx(free_in_s)
