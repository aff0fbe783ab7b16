"""The host's CPUs as devices.

By default they are one device, `cpu:0`. Any `cpu:N` may be declared, to run several servers side by side, each with its
own threads and CPUs. They share the host's memory, or the part of it that this process may use, and each reports all
of it.
"""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import psutil

from nodeagent.devices.backend import DeclaredDevice, as_declared
from nodeagent.devices.limits import memory_limits
from nodeagent.devices.pinning import others_hidden
from nodeagent.devices.values import DeviceMetrics, DeviceRef

_ID_PREFIX: Final = "cpu:"
_CPUINFO: Final = Path("/proc/cpuinfo")


class CpuTimes(msgspec.Struct, frozen=True):
    """Seconds since the host started: `busy` of `total`."""

    busy: float
    total: float

    def __add__(self, other: "CpuTimes") -> "CpuTimes":
        return CpuTimes(self.busy + other.busy, self.total + other.total)


class Memory(msgspec.Struct, frozen=True):
    """Memory in bytes. `available` can be used without swapping; it includes caches that can be dropped."""

    total: int
    available: int


def host_times() -> list[CpuTimes]:
    """One entry for each CPU.

    Not psutil.cpu_percent: it keeps its last reading per thread, and this is called in changing threads.
    """
    found = []
    for times in psutil.cpu_times(percpu=True):
        # The time of guests is already part of user and nice.
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        total = sum(times) - guests
        found.append(CpuTimes(total - times.idle - getattr(times, "iowait", 0.0), total))
    return found


def host_memory() -> Memory:
    memory = psutil.virtual_memory()
    return Memory(memory.total, memory.available)


def own_memory(host: Callable[[], Memory] = host_memory, root: Path = Path("/")) -> Memory:
    """The host's memory, or less where a control group limits this process. `root` is where proc and sys are."""
    memory = host()
    for limit in memory_limits(root):
        available = limit.total if limit.available is None else limit.available
        memory = Memory(min(memory.total, limit.total), min(memory.available, available))
    return memory


class CpuBackend:
    """The host's CPUs; implements `backend.Backend`.

    What changes: `_last`, the CPU times at each device's last reading, in `read`.
    """

    name: Final = "cpu"

    def __init__(
        self, *, times: Callable[[], list[CpuTimes]] = host_times, memory: Callable[[], Memory] = own_memory
    ) -> None:
        self._times = times
        self._memory = memory
        self._last: dict[str, CpuTimes] = {}

    def discover(self) -> list[DeviceRef]:
        """`cpu:0`, all CPUs of the host."""
        return [self._device(0)]

    def devices(self, declared: Sequence[DeclaredDevice]) -> list[DeviceRef]:
        """See Backend. Any number is valid; anything but `cpu:N` is a ConfigError."""
        numbers = {0} | {number for entry in declared if (number := _number(entry.device_id)) is not None}
        found = [self._device(number) for number in sorted(numbers)]
        return as_declared(found, declared, self.name) if declared else found

    def read(self, device: DeviceRef, now: float) -> DeviceMetrics:
        """See Backend. The utilization is the mean since the last reading, over the device's CPUs."""
        memory = self._memory()
        return DeviceMetrics(
            measured_at=now,
            memory_total_bytes=memory.total,
            memory_used_bytes=memory.total - memory.available,
            memory_free_bytes=memory.available,
            utilization_ratio=self._utilization(device),
        )

    def child_env(self, device: DeviceRef) -> dict[str, str]:
        """Hides the GPUs: a build that supports them would open each one, and use memory there, only to list them."""
        return others_hidden(self.name)

    def child_args(self, device: DeviceRef) -> list[str]:
        return ["--device", "none"]

    def close(self) -> None:
        """Does nothing: there is no driver."""

    def _device(self, number: int) -> DeviceRef:
        return DeviceRef(
            device_id=f"{_ID_PREFIX}{number}",
            backend=self.name,
            index=number,
            name=cpu_name(),
            memory_total_bytes=self._memory().total,
        )

    def _utilization(self, device: DeviceRef) -> float | None:
        """None at the first reading, and if the CPU times have not changed since the last one."""
        times = self._times()
        counted = [entry for cpu, entry in enumerate(times) if device.cpus is None or cpu in device.cpus]
        now = sum(counted, start=CpuTimes(0.0, 0.0))
        before = self._last.get(device.device_id)
        self._last[device.device_id] = now
        if before is None or now.total <= before.total:
            return None
        # The kernel's counters of idle and waiting time may decrease a little.
        return min(1.0, max(0.0, (now.busy - before.busy) / (now.total - before.total)))


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """The model name of the CPU, else the name of its architecture."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _number(device_id: str) -> int | None:
    number = device_id.removeprefix(_ID_PREFIX)
    return int(number) if device_id.startswith(_ID_PREFIX) and number.isdecimal() else None
