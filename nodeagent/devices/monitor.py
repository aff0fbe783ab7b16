"""Reads the devices at intervals, so that whoever asks gets the last reading at once."""

import logging

import trio

from nodeagent.devices.backend import Backend
from nodeagent.devices.values import DeviceMetrics, DeviceRef

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0

# After a server's end a driver may give its memory back only by and by. Two readings that agree, so far apart, mean
# that it has.
_SETTLE_PAUSE_S = 0.1
_SETTLE_BYTES = 64 * 2**20


class DeviceMonitor:
    """The last reading of each device. Only `run` writes them. `settle_max_s` is the longest that `settled` waits."""

    def __init__(self, backend: Backend, devices: list[DeviceRef], *, settle_max_s: float) -> None:
        self._backend = backend
        self._devices = devices
        self._settle_max_s = settle_max_s
        self._latest: dict[str, DeviceMetrics] = {}

    def latest(self, device_id: str) -> DeviceMetrics | None:
        """The last reading, None before the first one."""
        return self._latest.get(device_id)

    async def settled(self, device_id: str) -> None:
        """Return when the device's free memory has stopped changing; at once where the system frees it with the
        process (a CPU's), or where it is not known."""
        [device] = [device for device in self._devices if device.device_id == device_id]
        if device.backend == "cpu":
            return
        began = trio.current_time()
        with trio.move_on_after(self._settle_max_s) as cap:
            before = await self._free_bytes(device)
            while before is not None:
                await trio.sleep(_SETTLE_PAUSE_S)
                now = await self._free_bytes(device)
                if now is None or abs(now - before) < _SETTLE_BYTES:
                    break
                before = now
        took_s = trio.current_time() - began
        if cap.cancelled_caught:
            logger.warning("%s: its free memory still changes after %g s; loading all the same", device_id, took_s)
        else:
            logger.debug("%s: its memory has settled after %.2f s", device_id, took_s)

    async def _free_bytes(self, device: DeviceRef) -> int | None:
        return (await self._read(device)).memory_free_bytes

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read every device, say that the first readings are there, and go on until cancelled."""
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
        try:
            # In a thread: a driver that hangs must not stall the event loop.
            return await trio.to_thread.run_sync(self._backend.read, device, now, abandon_on_cancel=True)
        except OSError as error:  # no descriptor is left to look with, say: nothing is known for now
            logger.warning("%s can't be read: %s", device.device_id, error)
            return DeviceMetrics(now)
