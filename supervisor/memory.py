"""Whether a process ended for want of memory: by the kernel's hand, or by its own account.

The counters of kills are the kernel's: `memory.events` of cgroup v2 (Documentation/admin-guide/cgroup-v2.rst), and
`memory.oom_control` of v1 (Documentation/admin-guide/cgroup-v1/memory.rst).
"""

import re
from collections.abc import Sequence
from pathlib import Path

from supervisor.cgroups import number, own_folders, read

# What programs print when an allocation failed: the C++ library, libc, and llama.cpp's backends.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|cannot allocate memory|std::bad_alloc|cudaMalloc failed|failed to allocate"
    r"|unable to allocate\b.*\bbuffer",
    re.IGNORECASE,
)
# The same of a device's memory, by the backends' names: CUDA, HIP and MUSA, Vulkan, SYCL, Metal. Buffers of the host
# are called CPU or, where a device reads them, CUDA_Host.
_OUT_OF_DEVICE_MEMORY = re.compile(
    r"(?:cuda|hip|musa)Malloc\w* failed|(?:CUDA|ROCm|HIP|MUSA) error: out of memory|OutOfDeviceMemory"
    r"|device memory allocation\b.*\bfailed|can't allocate \d+ bytes of memory on device"
    r"|ggml_metal\w*: .*failed to allocate"
    r"|(?:failed|unable) to allocate (?!CPU)(?!\w+_Host)(?-i:[A-Z])\w* (?:pipeline parallel )?buffer",
    re.IGNORECASE,
)
# The counter rises before the process gets its SIGKILL; to free many GB takes the kernel seconds.
_KILL_TAKES_S = 10.0
# cgroup v1 says "no limit" by the largest multiple of the page size.
_UNLIMITED_BYTES = 2**60


def says_out_of_memory(lines: Sequence[str]) -> bool:
    """Whether one of these lines of output says that memory ran out."""
    return any(_OUT_OF_MEMORY.search(line) for line in lines)


def says_out_of_device_memory(lines: Sequence[str]) -> bool:
    """Whether one of these lines says that it was the memory of a device."""
    return any(_OUT_OF_DEVICE_MEMORY.search(line) for line in lines)


class OomWatch:
    """Watches the kernel's count of out-of-memory kills in our cgroup and those above it. Children are in ours.

    `root` is where proc and sys are. What changes: `_count` and `_rose_at`, in `look`.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._folders = own_folders("memory", ("memory.events", "memory.oom_control"), root)
        self._count = self._kills()
        self._rose_at: float | None = None

    def look(self, now: float) -> None:
        """Notice a rise. Call it every few seconds, and once when the process has ended."""
        count = self._kills()
        if count is None:  # no file descriptor is free
            return
        if self._count is not None and count > self._count:
            self._rose_at = now
        self._count = count

    def just_killed(self, now: float) -> bool:
        """Whether the kernel has just killed a process in the cgroup."""
        return self._rose_at is not None and now - self._rose_at <= _KILL_TAKES_S

    def limit(self) -> str:
        """The limit that was hit, in bytes: the smallest of our cgroup's and those above it."""
        limits = [limit for folder in self._folders if (limit := _limit_of(folder)) is not None]
        return f"limit {min(limits)} bytes" if limits else "all of this host's"

    def _kills(self) -> int | None:
        # v2 counts the kills of the cgroups below as well, v1 does not: the sum rises with each kill in both.
        counts = [_kills_in(folder) for folder in self._folders]
        return None if None in counts else sum(filter(None, counts))


def _kills_in(folder: Path) -> int | None:
    found = re.search(r"^oom_kill (\d+)$", _read_either(folder, "memory.events", "memory.oom_control"), re.MULTILINE)
    return number(found[1]) if found else None


def _limit_of(folder: Path) -> int | None:
    limit = number(_read_either(folder, "memory.max", "memory.limit_in_bytes"))
    return limit if limit is not None and limit < _UNLIMITED_BYTES else None


def _read_either(folder: Path, v2: str, v1: str) -> str:
    return read(folder / v2) or read(folder / v1)
