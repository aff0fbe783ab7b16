"""The watch over the event loop and the lanes, in virtual time."""

from typing import cast

import pytest
import trio
from trio.testing import MockClock

from fakes.servers import FakeServers
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.self_watch import ROUND_MAX_S, SelfWatch, Turning
from nodeagent.service_manager import ServiceManager


class FakeManager:
    """Notes what it is told, and when."""

    def __init__(self, watchdog_s: float | None) -> None:
        self.watchdog_s = watchdog_s
        self.told: list[tuple[float, str]] = []

    def feed_watchdog(self) -> None:
        self.told.append((trio.current_time(), "fed"))

    def status(self, text: str) -> None:
        self.told.append((trio.current_time(), text))

    def extend(self, by_s: float) -> None:
        self.told.append((trio.current_time(), f"extended by {by_s:g}"))

    def stopping(self) -> None:
        self.told.append((trio.current_time(), "stopping"))

    def flush(self) -> None:
        pass


class FakeLane:
    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        self.turns = 0
        self.hangs = False

    def nudge(self) -> None:
        self.turns += not self.hangs


def watch_of(manager: FakeManager, *lanes: Turning) -> SelfWatch:
    return SelfWatch(cast(ServiceManager, manager), lanes, lambda: "fine")


async def test_the_watchdog_is_fed_at_half_of_its_time_while_all_lanes_turn(autojump_clock: MockClock) -> None:
    manager = FakeManager(watchdog_s=4)
    began = trio.current_time()
    with trio.move_on_after(6.5):
        await watch_of(manager, FakeLane("gpu:0"), FakeLane("gpu:1")).run()
    assert [at - began for at, what in manager.told if what == "fed"] == [2, 4, 6]
    assert {what for _at, what in manager.told} == {"fed", "fine"}


async def test_it_is_fed_every_few_seconds_though_it_would_wait_for_minutes(autojump_clock: MockClock) -> None:
    assert watch_of(FakeManager(watchdog_s=600)).round_s == ROUND_MAX_S
    assert watch_of(FakeManager(watchdog_s=None)).round_s == ROUND_MAX_S


async def test_a_lane_that_hangs_stops_the_watchdog_and_is_named(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    manager, well, hung = FakeManager(watchdog_s=4), FakeLane("gpu:0"), FakeLane("gpu:1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_of(manager, well, hung).run)
        await trio.sleep(2.5)
        assert manager.told[0][1] == "fed"
        hung.hangs = True
        await trio.sleep(2)  # the round in which it began to hang
        manager.told.clear()
        await trio.sleep(6)
        assert {what for _at, what in manager.told} == {"the lane of gpu:1 hangs"}
        hung.hangs = False
        await trio.sleep(4)
        assert manager.told[-2][1] == "fed"
        nursery.cancel_scope.cancel()
    assert caplog.messages == ["the lane of gpu:1 hangs: it has taken no turn for 2 s", "the lane of gpu:1 turns again"]


async def test_while_the_agent_stops_only_the_loop_counts_and_more_time_is_asked_for(autojump_clock: MockClock) -> None:
    manager, lane = FakeManager(watchdog_s=4), FakeLane("gpu:0")
    watch = watch_of(manager, lane)
    lane.hangs = True
    watch.stop()
    with trio.move_on_after(4.5):
        await watch.run()
    assert [what for _at, what in manager.told] == ["stopping", *["extended by 8"], *2 * ["extended by 8", "fed"]]


async def test_a_real_lane_takes_a_turn_each_round_and_none_once_its_task_hangs(autojump_clock: MockClock) -> None:
    lane: Lane[str] = Lane("cpu:0", FakeServers(), LaneRules(max_pending=2, queue_timeout_s=60, startup_timeout_s=60))
    manager = FakeManager(watchdog_s=2)
    async with trio.open_nursery() as nursery:
        lane_scope = trio.CancelScope()

        async def lane_task() -> None:
            with lane_scope:
                await lane.run()
            await trio.sleep_forever()  # it hangs

        nursery.start_soon(lane_task)
        nursery.start_soon(watch_of(manager, lane).run)
        await trio.sleep(3.5)
        assert [what for _at, what in manager.told] == 3 * ["fed", "fine"]
        lane_scope.cancel()
        await trio.sleep(1)
        manager.told.clear()
        await trio.sleep(3)
        assert {what for _at, what in manager.told} == {"the lane of cpu:0 hangs"}
        nursery.cancel_scope.cancel()
