"""Reads the weights of the next model into the page cache while the device still serves another model."""

import logging
import os
from pathlib import Path

import psutil
import trio

logger = logging.getLogger(__name__)

# Linux ignores most of one hint for a whole file: it reads only a piece at once. With steps of 8 MiB, 3 GB were cached
# in 1.5 s; reading the file took as long, and more CPU time.
_STEP_BYTES = 8 * 2**20


async def read_ahead(path: Path, *, free_bytes: int | None = None) -> int:
    """Ask the system to cache the file; return how many bytes were requested, 0 if it can't be done or is of no use.

    `free_bytes` is the memory that may be used, by default what the host has available: a larger file would only evict
    what is needed more. Cancelling ends the requests. For what is cached already they cost next to nothing.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0
    most_bytes = psutil.virtual_memory().available if free_bytes is None else free_bytes
    # Abandoned on cancel: the file may be on a mount that hangs.
    return await trio.to_thread.run_sync(_advise, path, most_bytes, abandon_on_cancel=True)


def _advise(path: Path, free_bytes: int) -> int:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > free_bytes:
                return 0
            for offset in range(0, size, _STEP_BYTES):
                trio.from_thread.check_cancelled()
                os.posix_fadvise(file.fileno(), offset, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
    except OSError as error:
        logger.debug("%s is not read ahead: %s", path, error)  # its load will report what is wrong with it
        return 0
    return size
