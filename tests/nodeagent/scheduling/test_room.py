"""Which models give way to another."""

import pytest

from nodeagent.scheduling.room import Room, ServerUse

NOW = 100.0
RELOAD_S = {"slow": 50.0}


def use(used_at: float = 0.0, *, in_flight: int = 0, pinned: bool = False, resident: bool = True) -> ServerUse:
    return ServerUse(ready=True, slots=1, in_flight=in_flight, used_at=used_at, pinned=pinned, resident=resident)


def leaving(room: Room, servers: dict[str, ServerUse], wanted: str = "new") -> set[str] | None:
    found = room.leaving(wanted, servers, reload_s=lambda model_id: RELOAD_S.get(model_id, 2.0), now=NOW)
    return None if found is None else set(found)


@pytest.mark.parametrize(
    ("max_models", "servers", "expected"),
    [
        (1, {}, set()),
        (1, {"a": use()}, {"a"}),
        (1, {"a": use(in_flight=1)}, {"a"}),
        (1, {"a": use(resident=False)}, set()),
        (1, {"a": use(pinned=True)}, None),
        (1, {"new": use()}, set()),
        (2, {"a": use()}, set()),
        (2, {"a": use(), "b": use()}, {"a"}),
        (2, {"a": use(90), "b": use(50)}, {"b"}),
        (2, {"a": use(90), "slow": use(50)}, {"a"}),
        (2, {"a": use(NOW), "slow": use()}, {"slow"}),
        (2, {"a": use(50, in_flight=1), "b": use(90)}, {"b"}),
        (2, {"a": use(50, pinned=True), "b": use(90, in_flight=1)}, {"b"}),
        (2, {"a": use(pinned=True), "b": use(pinned=True)}, None),
        (2, {"a": use(), "b": use(), "c": use()}, {"a", "b"}),
        (2, {"a": use(), "b": use(resident=False)}, set()),
    ],
)
def test_as_few_go_as_have_to_and_those_that_are_cheap_to_have_again(
    max_models: int, servers: dict[str, ServerUse], expected: set[str] | None
) -> None:
    assert leaving(Room(max_models=max_models), servers) == expected


@pytest.mark.parametrize(
    ("free_bytes", "sizes", "expected"),
    [
        (None, {"new": 9}, set()),
        (4, {"new": 4}, set()),
        (3, {"new": 4, "a": 1, "b": 5}, {"a"}),
        (2, {"new": 4, "a": 1, "b": 5}, {"b"}),
        (2, {"new": 4, "a": 1, "b": 1}, {"a", "b"}),
        (2, {"new": 9, "a": 1, "b": 1}, {"a", "b"}),
        (0, {"new": 0, "a": 1, "b": 1}, set()),
    ],
)
def test_as_few_go_as_make_room_in_the_memory(
    free_bytes: int | None, sizes: dict[str, int], expected: set[str]
) -> None:
    room = Room(max_models=9, free_bytes=free_bytes, bytes_of=lambda model_id: sizes.get(model_id, 0))
    assert leaving(room, {"a": use(50), "b": use(90)}) == expected


def test_a_larger_set_of_idle_models_goes_before_a_smaller_one_in_use() -> None:
    room = Room(max_models=9, free_bytes=0, bytes_of=lambda model_id: {"new": 4, "busy": 4}.get(model_id, 2))
    assert leaving(room, {"busy": use(in_flight=1), "a": use(), "b": use()}) == {"a", "b"}
    assert leaving(room, {"busy": use(in_flight=1), "a": use()}) == {"busy"}


def test_pinned_models_that_hold_the_memory_leave_no_room() -> None:
    room = Room(max_models=9, free_bytes=1, bytes_of=lambda _model_id: 4)
    assert leaving(room, {"a": use(pinned=True), "b": use()}) == {"b"}
    assert leaving(room, {"a": use(pinned=True)}) is None


def test_a_server_that_starts_again_needs_no_more_memory_than_it_has() -> None:
    room = Room(max_models=9, free_bytes=0, bytes_of=lambda _model_id: 4)
    assert leaving(room, {"new": use(), "a": use()}) == set()


def test_of_many_models_the_cheapest_go() -> None:
    servers = {f"m{number}": use(used_at=float(number)) for number in range(12)}
    assert leaving(Room(max_models=11), servers) == {"m0", "m1"}
