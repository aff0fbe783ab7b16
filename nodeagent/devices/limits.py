"""How much of the host's CPUs and memory this process and its children may use: a container is not its host.

The limits are those of the process's CPU affinity and of its control groups, from its own up to the mount: the smallest
counts, since each of them includes what is below it. Nothing here raises: a limit that can't be read is none.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import psutil
from msgspec.structs import replace

from nodeagent.devices.values import DeviceRef
from supervisor.cgroups import number, own_folders, read

_CPU_FILES: Final = ("cpu.max", "cpu.cfs_quota_us")
_MEMORY_FILES: Final = ("memory.max", "memory.limit_in_bytes")
# Version 1 says "no limit" by the largest multiple of the page size.
_UNLIMITED_BYTES: Final = 2**60
# The page cache, which the kernel drops before it kills. In version 1 only these keys include the groups below.
_PAGE_CACHE: Final = {
    "memory.current": ("active_file", "inactive_file"),
    "memory.usage_in_bytes": ("total_active_file", "total_inactive_file"),
}


class Cpus(msgspec.Struct, frozen=True):
    """The CPUs of this process. `allowed` are those of its affinity; `quota` is how many of them its control groups let
    it use at a time, as a fraction, None without a limit; `cores` are the host's physical ones, None if unknown."""

    host: int
    cores: int | None
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """How many CPUs may be used at a time, rounded up."""
        return min(self.allowed, self.host if self.quota is None else max(1, math.ceil(self.quota)))

    def __str__(self) -> str:
        """`3 of 64 CPUs: cgroup quota 2.5, affinity 8`; the limits are those below the host's CPUs."""
        limits = [] if self.quota is None or self.quota >= self.host else [f"cgroup quota {self.quota:g}"]
        limits += [f"affinity {self.allowed}"] if self.allowed < self.host else []
        return f"{self.usable} of {self.host} CPUs" + (f": {', '.join(limits)}" if limits else "")


def own_cpus(root: Path = Path("/")) -> Cpus:
    """What this process may use now. `root` is where proc and sys are."""
    host = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else host
    return Cpus(host, psutil.cpu_count(logical=False), allowed, cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many CPUs the control groups let this process use at a time, None without a limit."""
    quotas = (_quota_of(folder) for folder in own_folders("cpu", _CPU_FILES, root))
    return min((quota for quota in quotas if quota is not None), default=None)


def with_threads(devices: Sequence[DeviceRef], cpus: Cpus) -> list[DeviceRef]:
    """The devices, with threads for those that have none configured, if this process may not use the whole host.

    llama-server by itself starts a thread for each physical core of the host, whatever its affinity and quota. The
    usable CPUs are divided evenly among all devices, rounded up, since each may have a server that works: with more
    threads than that, threads wait for each other while the quota has stopped some of them. A device with CPUs of its
    own takes one thread for each, unless its part of the quota is smaller.
    """
    if cpus.usable >= cpus.host:
        return list(devices)
    return [replace(device, threads=device.threads or _threads(device, cpus, len(devices))) for device in devices]


def _threads(device: DeviceRef, cpus: Cpus, sharing: int) -> int:
    part_of_quota = math.inf if cpus.quota is None else max(1, math.ceil(cpus.quota / sharing))
    if device.cpus:
        return int(min(len(device.cpus), part_of_quota))
    return int(min(math.ceil(cpus.allowed / sharing), part_of_quota, cpus.cores or cpus.host))


def _quota_of(folder: Path) -> float | None:
    quota, _, period = read(folder / "cpu.max").partition(" ")
    if not period:  # version 1, where -1 is no limit
        quota, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
    quota_us, period_us = number(quota), number(period)
    return quota_us / period_us if quota_us and period_us else None


class MemoryLimit(msgspec.Struct, frozen=True):
    """A limit of a control group in bytes, and how much of it can still be used; None if unknown."""

    total: int
    available: int | None


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """The limits of the control groups above this process, those that have one; `root` is where proc and sys are.

    The page cache does not count as used, as it does not in the host's free memory: the kernel drops it when memory is
    needed. A model's weights are mapped from its file, so they are page cache (in each group for the process that read
    them first). What can't be dropped counts: buffers, KV caches, `tmpfs`, and weights held by `--mlock` or read with
    `--no-mmap`. `memory.high` counts as a limit, since a group above it is throttled to a crawl.
    """
    return list(_memory_limits(own_folders("memory", _MEMORY_FILES, root)))


def _memory_limits(folders: Sequence[Path]) -> Iterator[MemoryLimit]:
    for folder in folders:
        limits = (number(read(folder / name)) for name in (*_MEMORY_FILES, "memory.high"))
        limit = min((limit for limit in limits if limit is not None), default=_UNLIMITED_BYTES)
        if limit < _UNLIMITED_BYTES:
            used = _used_bytes(folder)
            yield MemoryLimit(limit, None if used is None else max(0, limit - used))


def _used_bytes(folder: Path) -> int | None:
    for name, keys in _PAGE_CACHE.items():
        used = number(read(folder / name))
        if used is not None:
            cached = _counters(folder / "memory.stat")
            return max(0, used - sum(cached.get(key, 0) for key in keys))
    return None


def _counters(path: Path) -> dict[str, int]:
    pairs = (line.partition(" ") for line in read(path).splitlines())
    return {key: value for key, _, text in pairs if (value := number(text)) is not None}
