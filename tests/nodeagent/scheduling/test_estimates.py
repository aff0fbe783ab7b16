import pytest

from nodeagent.scheduling.estimates import LaneTimes, Occupied, Running


@pytest.fixture
def times() -> LaneTimes:
    measured = LaneTimes()
    for model_id, load_s, service_s in (("a", 4.0, 1.0), ("b", 6.0, 3.0)):
        measured.loaded(model_id, load_s)
        measured.served(model_id, service_s)
    return measured


def test_a_free_slot_of_the_loaded_model_is_had_at_once(times: LaneTimes) -> None:
    assert times.start_s("a", Occupied("a", 1, 0.0, [], [])) == 0
    assert times.start_s("a", Occupied("a", 2, 0.0, [Running("a", 0.2)], ["b"])) == 0


def test_those_for_another_model_are_passed(times: LaneTimes) -> None:
    assert times.start_s("a", Occupied("a", 1, 0.0, [Running("a", 0.2)], ["b", "a"])) == pytest.approx(0.8 + 1)


def test_another_model_comes_after_everyone_with_each_model_loaded_once(times: LaneTimes) -> None:
    assert times.start_s("b", Occupied("a", 1, 0.0, [Running("a", 0.2)], ["b", "a", "b"])) == pytest.approx(
        0.8 + 3 + 1 + 3 + 6
    )
    assert times.start_s("b", Occupied(None, 1, 0.0, [], [])) == pytest.approx(6)


def test_a_load_under_way_is_waited_for(times: LaneTimes) -> None:
    assert times.start_s("a", Occupied("a", 1, 2.5, [], ["a"])) == pytest.approx(2.5 + 1)


def test_an_answer_that_takes_longer_than_expected_is_likely_to_go_on(times: LaneTimes) -> None:
    assert times.start_s("a", Occupied("a", 1, 0.0, [Running("a", 50.0)], [])) == pytest.approx(25)


def test_what_was_not_measured_here_is_taken_from_another_device(times: LaneTimes) -> None:
    elsewhere = LaneTimes()
    assert elsewhere.load_s("b") == 2
    elsewhere.kin = [times]
    assert (elsewhere.load_s("b"), elsewhere.service_s("b")) == (6, 3)
    elsewhere.loaded("b", 1)
    assert (elsewhere.load_s("b"), elsewhere.measured_load_s("a")) == (1, None)


def test_the_whole_queue_one_by_one(times: LaneTimes) -> None:
    assert times.drained_s(Occupied("a", 1, 0.0, [Running("a", 0.5)], ["a", "b", "a"])) == pytest.approx(
        0.5 + 1 + (6 + 3) + (4 + 1)
    )


def test_averages_follow_what_is_measured_and_one_odd_one_does_not_own_them(times: LaneTimes) -> None:
    times.served("a", 9.0)
    assert times.service_s("a") == pytest.approx(3.0)
    for _ in range(20):
        times.served("a", 9.0)
    assert times.service_s("a") == pytest.approx(9.0, rel=0.01)


def test_a_client_that_stays_away_counts_as_one_that_took_a_second(times: LaneTimes) -> None:
    times.came_back("a", 3600.0)
    for _ in range(12):
        times.came_back("a", 0.005)
    assert times.return_s("a") < 0.05
