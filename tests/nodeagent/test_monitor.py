"""Waiting until a device has its memory back: real clock, since readings are made in threads."""

from collections.abc import Sequence
from itertools import chain, repeat
from typing import cast

import pytest
import trio

from nodeagent.backends.base import Backend
from nodeagent.devices import DeviceMetrics, DeviceRef
from nodeagent.monitor import DeviceMonitor

GIB = 2**30


class Memory:
    """A backend whose free memory goes through a list, and then stays."""

    def __init__(self, readings: Sequence[int | None]) -> None:
        self._readings = chain(readings, repeat(readings[-1]))
        self.count = 0

    def read(self, _device: DeviceRef, now: float) -> DeviceMetrics:
        self.count += 1
        return DeviceMetrics(now, memory_free_bytes=next(self._readings))


async def settle(backend: str, *readings: int | None) -> tuple[float, int]:
    """How long it took in tenths of a second, rounded down, and how many readings."""
    memory = Memory(readings)
    device = DeviceRef("gpu:0", backend, 0, "device")
    began = trio.current_time()
    await DeviceMonitor(cast(Backend, memory), [device], settle_max_s=1.0).settled("gpu:0")
    return int((trio.current_time() - began) * 10), memory.count


async def test_memory_that_is_back_already_costs_two_readings() -> None:
    assert await settle("cuda", 8 * GIB) == (1, 2)


async def test_it_waits_until_two_readings_agree() -> None:
    assert await settle("cuda", 1 * GIB, 3 * GIB, 6 * GIB, 8 * GIB, 8 * GIB) == (4, 5)


async def test_it_waits_no_longer_than_its_cap(caplog: pytest.LogCaptureFixture) -> None:
    took, _count = await settle("cuda", *(number * GIB for number in range(1000)))
    assert took in (10, 11)
    assert "still changes" in caplog.text


async def test_a_processors_memory_and_one_that_is_not_known_are_not_waited_for() -> None:
    assert await settle("cpu", 8 * GIB) == (0, 0)
    assert await settle("cuda", None) == (0, 1)
