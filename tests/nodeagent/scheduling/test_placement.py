from nodeagent.scheduling.placement import (
    AllFull,
    Candidate,
    Movable,
    NoneEligible,
    Placed,
    Residency,
    choose,
    choose_move,
)

GIB = 2**30


def device(name: str, residency: Residency = Residency.EMPTY, admitted: int = 0, **more: object) -> Candidate:
    return Candidate(device_id=name, residency=residency, admitted=admitted, limit=2, **more)  # type: ignore[arg-type]


def chosen(*candidates: Candidate) -> str:
    placement = choose(candidates)
    assert isinstance(placement, Placed), placement
    return placement.device_id


def test_a_device_that_has_the_model_comes_first_even_with_less_memory_and_a_queue() -> None:
    assert (
        chosen(device("a", memory_free_bytes=80 * GIB), device("b", Residency.READY, 1, memory_free_bytes=GIB)) == "b"
    )


def test_another_copy_is_loaded_once_the_queue_is_long_enough_to_pay_for_it() -> None:
    assert chosen(device("a", Residency.READY, 1, start_s=4), device("b", start_s=5)) == "a"
    assert chosen(device("a", Residency.READY, 1, start_s=6), device("b", start_s=5)) == "b"


def test_what_would_be_evicted_counts_as_a_load_more() -> None:
    other = device("b", Residency.OTHER_MODEL, start_s=5, delays_s=3)
    assert chosen(device("a", Residency.READY, 1, start_s=7), other) == "a"
    assert chosen(device("a", Residency.READY, 1, start_s=9), other) == "b"


def test_another_copy_is_only_made_where_it_fits() -> None:
    tight = device("b", start_s=5, has_room=False)
    assert chosen(device("a", Residency.READY, 1, start_s=60), tight) == "a"
    assert choose([device("a", Residency.READY, 2), tight]) == AllFull(("a",))
    assert chosen(device("a", Residency.OTHER_MODEL, start_s=60), tight) == "b", "where none is loaded yet, it is tried"


def test_estimates_that_hardly_differ_say_the_same() -> None:
    assert chosen(device("a", start_s=0.001), device("b", Residency.READY, 1, start_s=0.004)) == "b"


def test_the_request_that_gains_most_moves_to_an_idle_device_and_none_for_a_little() -> None:
    assert choose_move([]) is None
    assert choose_move([Movable(5, 4.9), Movable(1, 1)]) is None
    assert choose_move([Movable(5, 4), Movable(9, 3), Movable(9, 8)]) == 1


def test_between_devices_that_are_equally_near_the_one_that_knows_the_conversation_is_taken() -> None:
    ready = Residency.READY
    assert chosen(device("a", ready), device("b", ready, has_conversation=True)) == "b"
    assert chosen(device("a", ready), device("b", ready, 1, start_s=0.5, has_conversation=True)) == "a"
    assert chosen(device("a", ready), device("b", has_conversation=True, start_s=2)) == "a"


def test_a_device_that_is_loading_the_model_comes_before_an_idle_one() -> None:
    assert chosen(device("a"), device("b", Residency.LOADING, 1)) == "b"


def test_a_full_device_is_passed_over_though_it_has_the_model() -> None:
    assert chosen(device("a", Residency.READY, 2), device("b")) == "b"


def test_the_least_pressed_device_comes_first_then_the_empty_one_then_the_one_with_most_free_memory() -> None:
    assert chosen(device("a", admitted=1, memory_free_bytes=9 * GIB), device("b")) == "b"
    assert chosen(device("a", Residency.OTHER_MODEL, memory_free_bytes=9 * GIB), device("b")) == "b"
    assert chosen(device("a", memory_free_bytes=2 * GIB), device("b", memory_free_bytes=9 * GIB)) == "b"
    assert chosen(device("a"), device("b", memory_free_bytes=GIB)) == "b"


def test_a_device_where_the_model_has_just_failed_comes_last() -> None:
    assert chosen(device("a", failing=True), device("b", Residency.OTHER_MODEL, 1)) == "b"
    assert chosen(device("a", failing=True), device("b", admitted=2)) == "a"


def test_ties_go_to_the_first() -> None:
    assert chosen(device("a"), device("b")) == "a"


def test_a_device_with_an_obstacle_is_never_chosen() -> None:
    assert chosen(device("a", Residency.READY, obstacle="keeps failing"), device("b", admitted=1)) == "b"


def test_full_lanes_are_told_from_devices_that_cannot() -> None:
    assert choose([device("a", admitted=2), device("b", obstacle="too small")]) == AllFull(("a",))
    assert choose([device("a", obstacle="too small"), device("b", obstacle="failed", retry_at=7.0)]) == NoneEligible(
        "a: too small; b: failed", 7.0
    )
    assert choose([]) == NoneEligible("this node has no device", None)
