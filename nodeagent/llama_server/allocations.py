"""What a server that ran out of a device's memory said that it had asked for. Pure.

llama.cpp's backends name the size of the allocation that failed, in bytes or MiB. That is one buffer of several, so the
whole load needs at least as much.
"""

import re
from collections.abc import Sequence
from typing import Final

_MIB: Final = 2**20
# ggml-backend.cpp and ggml-alloc.c: `failed to allocate CUDA0 buffer of size 4294967296`; ggml-cuda.cu: `allocating
# 4096.00 MiB on device 0: cudaMalloc failed: out of memory`; ggml-vulkan.cpp: `Device memory allocation of size
# 1073741824 failed.`; ggml-metal: `failed to allocate buffer, size = 4096.00 MiB`; SYCL: `can't allocate 4294967296
# Bytes of memory on device`.
_BYTES = re.compile(
    r"failed to allocate (?!CPU)(?!\w+_Host)\w+ buffer of size (\d+)"
    r"|[Dd]evice memory allocation of size (\d+) failed"
    r"|can't allocate (\d+) [Bb]ytes of memory on device"
)
_MEBIBYTES = re.compile(
    r"allocating (\d+\.\d+) MiB on device \d+: \w+ failed|failed to allocate buffer, size = +(\d+\.\d+) MiB"
)
# No device has a pebibyte: what says so is no size.
_MOST_BYTES: Final = 2**50


def asked_bytes(lines: Sequence[str]) -> int | None:
    """The largest of the allocations that failed, None if no line names one."""
    sizes = [int(_number(found)) for line in lines for found in _BYTES.finditer(line)]
    sizes += [int(_number(found) * _MIB) for line in lines for found in _MEBIBYTES.finditer(line)]
    return max((size for size in sizes if size <= _MOST_BYTES), default=None)


def _number(found: re.Match[str]) -> float:
    # At most 20 digits: more are no size, and a float holds what is left exactly enough.
    return float(next(filter(None, found.groups()))[:20])
