"""The last reading of each device, and waiting until a device has its memory back."""

import threading
from collections.abc import Sequence
from itertools import chain, repeat
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from nodeagent.devices.backend import Backend
from nodeagent.devices.monitor import INTERVAL_S, DeviceMonitor, Threads
from nodeagent.devices.values import DeviceMetrics, DeviceRef

GIB = 2**30
NO_BACKEND = cast(Backend, None)


def device(backend: str = "cuda") -> DeviceRef:
    return DeviceRef(device_id="gpu:0", backend=backend, index=0, name="device")


class FreeMemory:
    """Free memory that follows a list, and then stays; each reading takes `takes_s`."""

    def __init__(self, *readings: int | None, takes_s: float = 0.0) -> None:
        self._readings = chain(readings, repeat(readings[-1]))
        self._takes_s = takes_s
        self.count = 0

    async def read(self, _device: DeviceRef, now: float) -> DeviceMetrics:
        await trio.sleep(self._takes_s)
        self.count += 1
        return DeviceMetrics(measured_at=now, memory_free_bytes=next(self._readings))


async def settle(memory: FreeMemory, backend: str = "cuda", settle_max_s: float = 30.0) -> tuple[float, int]:
    """How long it took in seconds, and how many readings."""
    began = trio.current_time()
    monitor = DeviceMonitor(NO_BACKEND, [device(backend)], settle_max_s=settle_max_s, read=memory.read)
    await monitor.settled("gpu:0")
    return round(trio.current_time() - began, 6), memory.count


async def test_free_memory_that_does_not_change_costs_two_readings(autojump_clock: MockClock) -> None:
    assert await settle(FreeMemory(8 * GIB)) == (0.1, 2)


async def test_settled_waits_until_two_readings_agree(autojump_clock: MockClock) -> None:
    assert await settle(FreeMemory(1 * GIB, 3 * GIB, 6 * GIB, 8 * GIB, 8 * GIB)) == (0.4, 5)


async def test_readings_that_differ_by_less_than_64_mib_agree(autojump_clock: MockClock) -> None:
    assert await settle(FreeMemory(8 * GIB, 8 * GIB + 2**26)) == (0.2, 3)
    assert await settle(FreeMemory(8 * GIB, 8 * GIB + 2**26 - 1)) == (0.1, 2)


async def test_settled_waits_no_longer_than_its_limit(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    took_s, _count = await settle(FreeMemory(*(number * GIB for number in range(1000))), settle_max_s=1.0)
    assert took_s == 1.0
    assert caplog.messages == ["gpu:0: free memory still changes after 1.0 s; loading anyway"]


async def test_settled_waits_no_longer_than_its_limit_for_a_driver_that_hangs(autojump_clock: MockClock) -> None:
    assert await settle(FreeMemory(GIB, takes_s=1000), settle_max_s=0.5) == (0.5, 0)


async def test_settled_does_not_wait_for_a_cpus_memory_or_an_unknown_one(autojump_clock: MockClock) -> None:
    assert await settle(FreeMemory(8 * GIB), "cpu") == (0.0, 0)
    assert await settle(FreeMemory(None)) == (0.0, 1)
    assert await settle(FreeMemory(8 * GIB, None)) == (0.1, 2)


async def test_the_devices_are_read_before_run_has_started_and_then_at_intervals(autojump_clock: MockClock) -> None:
    memory = FreeMemory(*(number * GIB for number in range(10)))
    monitor = DeviceMonitor(NO_BACKEND, [device()], settle_max_s=1, read=memory.read)
    assert monitor.latest("gpu:0") is None

    def latest() -> tuple[float, int | None]:
        reading = monitor.latest("gpu:0")
        assert reading is not None
        return round(reading.measured_at - began, 6), reading.memory_free_bytes

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.run)
        assert latest() == (0.0, 0)
        await trio.sleep(2.5 * INTERVAL_S)
        assert latest() == (2 * INTERVAL_S, 2 * GIB)
        nursery.cancel_scope.cancel()


async def test_after_a_reading_that_failed_nothing_is_known(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_device: DeviceRef, _now: float) -> DeviceMetrics:
        raise OSError(24, "Too many open files")

    monitor = DeviceMonitor(NO_BACKEND, [device()], settle_max_s=30.0, read=fail)
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.run)
        await monitor.settled("gpu:0")
        reading = monitor.latest("gpu:0")
        assert reading is not None
        assert reading == DeviceMetrics(measured_at=reading.measured_at)
        nursery.cancel_scope.cancel()
    assert caplog.messages[0].startswith("out of file descriptors (limit ")


UNFORESEEN = [
    RuntimeError("x"),
    RecursionError("x"),
    OverflowError("x"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
]


@pytest.mark.parametrize("error", UNFORESEEN, ids=lambda error: type(error).__name__)
async def test_a_driver_that_raises_the_unforeseen_is_read_again(
    error: Exception, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    readings = iter([error, None])

    async def read(_device: DeviceRef, now: float) -> DeviceMetrics:
        if (raised := next(readings, None)) is not None:
            raise raised
        return DeviceMetrics(measured_at=now, memory_free_bytes=GIB)

    monitor = DeviceMonitor(NO_BACKEND, [device()], settle_max_s=30.0, read=read)
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.run)
        await trio.sleep(2 * INTERVAL_S)
        reading = monitor.latest("gpu:0")
        assert reading is not None
        assert reading.memory_free_bytes == GIB
        nursery.cancel_scope.cancel()
    assert caplog.messages == ["unexpected error while reading a device; the node goes on"]


class SlowDriver:
    """A backend whose driver answers once `answer` is set."""

    def __init__(self, readings: Sequence[int]) -> None:
        self.answer = threading.Event()
        self._readings = iter(readings)
        self.asked = 0

    def read(self, _device: DeviceRef, now: float) -> DeviceMetrics:
        self.asked += 1
        self.answer.wait(10)
        return DeviceMetrics(measured_at=now, memory_free_bytes=next(self._readings))


class OneHangs:
    """Of two devices, gpu:0 does not answer until it is let."""

    def __init__(self) -> None:
        self.hangs = True
        self.asked: list[tuple[str, float]] = []

    async def read(self, device: DeviceRef, now: float) -> DeviceMetrics:
        self.asked.append((device.device_id, now))
        if device.device_id == "gpu:0" and self.hangs:
            await trio.sleep_forever()
        return DeviceMetrics(measured_at=now, memory_free_bytes=GIB)


async def test_a_driver_that_hangs_costs_the_readings_of_its_device_alone(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    other = DeviceRef(device_id="gpu:1", backend="vulkan", index=1, name="other")
    driver = OneHangs()
    monitor = DeviceMonitor(NO_BACKEND, [device(), other], settle_max_s=1, read=driver.read)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.run)
        assert round(trio.current_time() - began, 6) == 10.0, "the node has to start without its readings"
        await trio.sleep(60)
        reading, unread = monitor.latest("gpu:1"), monitor.latest("gpu:0")
        assert reading is not None
        assert unread is not None
        assert reading.memory_free_bytes == GIB
        assert trio.current_time() - reading.measured_at < 5.0
        assert unread == DeviceMetrics(measured_at=unread.measured_at)
        assert caplog.messages == ["gpu:0 can't be measured: no answer from its driver in 20 s"]

        driver.hangs = False
        await trio.sleep(10)
        reading = monitor.latest("gpu:0")
        assert reading is not None
        assert reading.memory_free_bytes == GIB
        assert caplog.messages[1:] == ["gpu:0 can be measured again"]
        nursery.cancel_scope.cancel()


async def test_a_driver_that_hangs_takes_one_thread() -> None:
    backend = SlowDriver([GIB, GIB])
    threads = Threads(cast(Backend, backend))
    try:
        for _ in range(5):
            with trio.move_on_after(0.05):
                await threads.read(device(), 1.0)
        assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        assert backend.asked == 1
    finally:
        backend.answer.set()
    with trio.fail_after(5):
        assert (await threads.read(device(), 2.0)).measured_at == 2.0


async def test_a_driver_that_hangs_does_not_block_the_event_loop() -> None:
    backend = SlowDriver([GIB])
    monitor = DeviceMonitor(cast(Backend, backend), [device()], settle_max_s=0.1)
    try:
        with trio.fail_after(5):
            await monitor.settled("gpu:0")
    finally:
        backend.answer.set()


async def test_the_backend_is_read_by_default() -> None:
    backend = SlowDriver([GIB])
    backend.answer.set()
    monitor = DeviceMonitor(cast(Backend, backend), [device()], settle_max_s=0.1)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await nursery.start(monitor.run)
            nursery.cancel_scope.cancel()
    reading = monitor.latest("gpu:0")
    assert reading is not None
    assert reading.memory_free_bytes == GIB
