"""Reads the devices at intervals, so that the last reading of each is always at hand."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from nodeagent.containment import Containment
from nodeagent.devices.backend import Backend
from nodeagent.devices.values import DeviceMetrics, DeviceRef

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0

ReadDevice = Callable[[DeviceRef, float], Awaitable[DeviceMetrics]]
"""Takes a reading of a device at that time."""

# A driver may free the memory of a server only some time after the server has ended. Two readings this far apart that
# differ by less than this mean that it has.
_SETTLE_PAUSE_S = 0.1
_SETTLE_BYTES = 64 * 2**20


class DeviceMonitor:
    """The last reading of each device; `settle_max_s` is how long `settled` waits at most.

    `read` takes a reading at a time; by default the backend takes it in a thread. What changes: `_latest`, in `run`.
    """

    def __init__(
        self, backend: Backend, devices: list[DeviceRef], *, settle_max_s: float, read: ReadDevice | None = None
    ) -> None:
        self._read_device = read if read is not None else partial(_read_in_thread, backend)
        self._devices = devices
        self._settle_max_s = settle_max_s
        self._latest: dict[str, DeviceMetrics] = {}
        self._containment = Containment("reading a device")

    def latest(self, device_id: str) -> DeviceMetrics | None:
        """The last reading, None before the first one."""
        return self._latest.get(device_id)

    async def settled(self, device_id: str) -> None:
        """Return when the device's free memory has stopped changing: at once if it is unknown, and for a CPU, whose
        memory the system frees with the process."""
        [device] = [device for device in self._devices if device.device_id == device_id]
        if device.backend == "cpu":
            return
        began = trio.current_time()
        with trio.move_on_after(self._settle_max_s) as limit:
            before = await self._free_bytes(device)
            while before is not None:
                await trio.sleep(_SETTLE_PAUSE_S)
                now = await self._free_bytes(device)
                if now is None or abs(now - before) < _SETTLE_BYTES:
                    break
                before = now
        took_s = trio.current_time() - began
        if limit.cancelled_caught:
            logger.warning("%s: free memory still changes after %.1f s; loading anyway", device_id, took_s)
        else:
            logger.debug("%s: free memory settled after %.2f s", device_id, took_s)

    async def _free_bytes(self, device: DeviceRef) -> int | None:
        return (await self._read(device)).memory_free_bytes

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read every device at intervals until cancelled; started once each has been read."""
        await self._read_all()
        task_status.started()
        while True:
            await trio.sleep(INTERVAL_S)
            await self._read_all()

    async def _read_all(self) -> None:
        for device in self._devices:
            self._latest[device.device_id] = await self._read(device)

    async def _read(self, device: DeviceRef) -> DeviceMetrics:
        now = trio.current_time()
        with self._containment:
            return await self._read_device(device, now)
        return DeviceMetrics(measured_at=now)  # the reading failed: for now nothing is known


async def _read_in_thread(backend: Backend, device: DeviceRef, now: float) -> DeviceMetrics:
    """In a thread: a driver that hangs must not block the event loop."""
    return await trio.to_thread.run_sync(backend.read, device, now, abandon_on_cancel=True)
