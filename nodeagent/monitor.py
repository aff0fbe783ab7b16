"""Reads the devices at intervals, so that whoever asks gets the last reading at once."""

import logging

import trio

from nodeagent.backends.base import Backend
from nodeagent.devices import DeviceMetrics, DeviceRef

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0


class DeviceMonitor:
    """The last reading of each device. Only `run` writes them."""

    def __init__(self, backend: Backend, devices: list[DeviceRef]) -> None:
        self._backend = backend
        self._devices = devices
        self._latest: dict[str, DeviceMetrics] = {}

    def latest(self, device_id: str) -> DeviceMetrics | None:
        """The last reading, None before the first one."""
        return self._latest.get(device_id)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read every device, say that the first readings are there, and go on until cancelled."""
        await self._read_all()
        task_status.started()
        while True:
            await trio.sleep(INTERVAL_S)
            await self._read_all()

    async def _read_all(self) -> None:
        for device in self._devices:
            # In a thread: a driver that hangs must not stall the event loop.
            self._latest[device.device_id] = await trio.to_thread.run_sync(
                self._backend.read, device, trio.current_time(), abandon_on_cancel=True
            )
