"""The bounded ring that readers of events and log lines follow."""

import pytest
import trio

from nodeagent.events import Page, Ring


def test_a_reader_gets_the_items_after_its_number_and_the_count_of_those_it_missed() -> None:
    ring: Ring[str] = Ring(3)
    assert ring.after(0) == Page([], 0, 0)
    for item in "abcde":
        ring.append(item)
    assert ring.after(5) == Page([], 5, 0)
    assert ring.after(4) == Page(["e"], 5, 0)
    assert ring.after(2) == Page(["c", "d", "e"], 5, 0)
    assert ring.after(0) == Page(["c", "d", "e"], 5, 2)


def test_a_number_from_an_earlier_run_counts_as_0() -> None:
    ring: Ring[str] = Ring(3)
    ring.append("a")
    assert ring.after(700) == Page(["a"], 1, 0)


async def test_a_reader_can_wait_for_the_next_item() -> None:
    ring: Ring[str] = Ring(3)
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ring.more_than, 0, name="reader at 0")
            nursery.start_soon(ring.more_than, 1, name="reader at 1")
            await trio.testing.wait_all_tasks_blocked()
            ring.append("a")
            ring.append("b")
        await ring.more_than(1)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.01):
            await ring.more_than(2)
