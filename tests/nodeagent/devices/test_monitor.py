"""Waiting until a device has its memory back: real clock, since readings are made in threads."""

import threading
from collections.abc import Sequence
from itertools import chain, repeat
from typing import cast

import pytest
import trio

from nodeagent.devices.backend import Backend
from nodeagent.devices.monitor import DeviceMonitor
from nodeagent.devices.values import DeviceMetrics, DeviceRef

GIB = 2**30


class Memory:
    """A backend whose free memory goes through a list, and then stays."""

    def __init__(self, readings: Sequence[int | None]) -> None:
        self._readings = chain(readings, repeat(readings[-1]))
        self.count = 0

    def read(self, _device: DeviceRef, now: float) -> DeviceMetrics:
        self.count += 1
        return DeviceMetrics(now, memory_free_bytes=next(self._readings))


async def settle(backend: str, *readings: int | None, settle_max_s: float = 30.0) -> tuple[float, int]:
    """How long it took in seconds, and how many readings."""
    memory = Memory(readings)
    device = DeviceRef("gpu:0", backend, 0, "device")
    began = trio.current_time()
    await DeviceMonitor(cast(Backend, memory), [device], settle_max_s=settle_max_s).settled("gpu:0")
    return trio.current_time() - began, memory.count


async def test_memory_that_is_back_already_costs_two_readings() -> None:
    took_s, count = await settle("cuda", 8 * GIB)
    assert (took_s >= 0.1, count) == (True, 2)


async def test_it_waits_until_two_readings_agree() -> None:
    took_s, count = await settle("cuda", 1 * GIB, 3 * GIB, 6 * GIB, 8 * GIB, 8 * GIB)
    assert (took_s >= 0.4, count) == (True, 5)


async def test_it_waits_no_longer_than_its_cap(caplog: pytest.LogCaptureFixture) -> None:
    took_s, _count = await settle("cuda", *(number * GIB for number in range(1000)), settle_max_s=1.0)
    assert 1.0 <= took_s < 5
    assert "still changes" in caplog.text


async def test_a_driver_that_hangs_is_waited_for_no_longer_than_the_cap() -> None:
    answer = threading.Event()

    class Hanging(Memory):
        def read(self, device: DeviceRef, now: float) -> DeviceMetrics:
            answer.wait(10)
            return super().read(device, now)

    device = DeviceRef("gpu:0", "cuda", 0, "device")
    monitor = DeviceMonitor(cast(Backend, Hanging([GIB])), [device], settle_max_s=0.1)
    with trio.fail_after(5):
        await monitor.settled("gpu:0")
    answer.set()


async def test_a_reading_that_fails_is_one_of_which_nothing_is_known(nursery: trio.Nursery) -> None:
    class Failing(Memory):
        def read(self, device: DeviceRef, now: float) -> DeviceMetrics:
            raise OSError(24, "Too many open files")

    device = DeviceRef("gpu:0", "cuda", 0, "device")
    monitor = DeviceMonitor(cast(Backend, Failing([GIB])), [device], settle_max_s=30.0)
    with trio.fail_after(10):
        await nursery.start(monitor.run)
        await monitor.settled("gpu:0")
    reading = monitor.latest("gpu:0")
    assert reading is not None
    assert reading.memory_free_bytes is None
    nursery.cancel_scope.cancel()


async def test_a_processors_memory_and_one_that_is_not_known_are_not_waited_for() -> None:
    assert (await settle("cpu", 8 * GIB))[1] == 0
    took_s, count = await settle("cuda", None)
    assert (took_s < 5, count) == (True, 1)
