"""Reads the devices at intervals, so that the last reading of each is always at hand."""

import logging
from collections.abc import Awaitable, Callable

import trio

from nodeagent.containment import Containment
from nodeagent.devices.backend import Backend
from nodeagent.devices.values import DeviceMetrics, DeviceRef

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0

ReadDevice = Callable[[DeviceRef, float], Awaitable[DeviceMetrics]]
"""Takes a reading of a device at that time."""

# A driver that takes longer than this hangs: `nvidia-smi`, the slowest that still answers, has 15 s.
_READ_MAX_S = 20.0
# So long the other devices wait for one that hung the last time.
_HANGING_MAX_S = 2.0
# The node starts to serve after this, measured or not.
_FIRST_MAX_S = 10.0

# A driver may free the memory of a server only some time after the server has ended. Two readings this far apart that
# differ by less than this mean that it has.
_SETTLE_PAUSE_S = 0.1
_SETTLE_BYTES = 64 * 2**20


class DeviceMonitor:
    """The last reading of each device; `settle_max_s` is how long `settled` waits at most.

    `read` takes a reading at a time; by default the backend takes it in a thread. A driver that hangs costs the
    readings of its devices, and one thread for each of them. What changes: `_latest` and `_hanging`, in `run`,
    `settled` and `read_now`.
    """

    def __init__(
        self, backend: Backend, devices: list[DeviceRef], *, settle_max_s: float, read: ReadDevice | None = None
    ) -> None:
        self._read_device = read if read is not None else Threads(backend).read
        self._devices = devices
        self._settle_max_s = settle_max_s
        self._latest: dict[str, DeviceMetrics] = {}
        self._hanging: set[str] = set()
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
            before = (await self.read_now(device_id)).memory_free_bytes
            while before is not None:
                await trio.sleep(_SETTLE_PAUSE_S)
                now = (await self.read_now(device_id)).memory_free_bytes
                if now is None or abs(now - before) < _SETTLE_BYTES:
                    break
                before = now
        took_s = trio.current_time() - began
        if limit.cancelled_caught:
            logger.warning("%s: free memory still changes after %.1f s; loading anyway", device_id, took_s)
        else:
            logger.debug("%s: free memory settled after %.2f s", device_id, took_s)

    async def read_now(self, device_id: str) -> DeviceMetrics:
        """Take a reading, which is then the last one."""
        [device] = [device for device in self._devices if device.device_id == device_id]
        self._latest[device_id] = reading = await self._read(device)
        return reading

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read every device at intervals until cancelled; started once each has been read, or after 10 s."""
        with trio.move_on_after(_FIRST_MAX_S):
            await self._read_all()
        task_status.started()
        while True:
            await trio.sleep(INTERVAL_S)
            await self._read_all()

    async def _read_all(self) -> None:
        for device in self._devices:
            await self.read_now(device.device_id)

    async def _read(self, device: DeviceRef) -> DeviceMetrics:
        now = trio.current_time()
        limit_s = _HANGING_MAX_S if device.device_id in self._hanging else _READ_MAX_S
        with self._containment, trio.move_on_after(limit_s) as limit:
            reading = await self._read_device(device, now)
            if device.device_id in self._hanging:
                self._hanging.remove(device.device_id)
                logger.warning("%s can be measured again", device.device_id)
            return reading
        if limit.cancelled_caught and device.device_id not in self._hanging:
            self._hanging.add(device.device_id)
            logger.warning("%s can't be measured: no answer from its driver in %g s", device.device_id, limit_s)
        return DeviceMetrics(measured_at=now)  # the reading failed: for now nothing is known


class Threads:
    """Reads devices in threads, one for each device at most: a driver that hangs must not block the event loop, nor
    take all threads of the process, which other work needs."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._limiters: dict[str, trio.CapacityLimiter] = {}

    async def read(self, device: DeviceRef, now: float) -> DeviceMetrics:
        """Waits for an earlier reading of the device to end. If this is cancelled, the thread is left behind."""
        limiter = self._limiters.setdefault(device.device_id, trio.CapacityLimiter(1))
        return await trio.to_thread.run_sync(self._backend.read, device, now, abandon_on_cancel=True, limiter=limiter)
