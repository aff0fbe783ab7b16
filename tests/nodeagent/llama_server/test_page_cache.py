import mmap
import os
import sys
from pathlib import Path

import pytest
import trio

from nodeagent.llama_server.page_cache import read_ahead

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hardware: the page cache is asked Linux' way")


async def test_the_whole_file_is_requested(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(3 * 2**20))
    assert await read_ahead(path) == 3 * 2**20


async def test_a_file_that_is_not_cached_is_cached_after_a_while(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(20 * 2**20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with trio.fail_after(20):
        while await _cached(path) < 0.99:
            await read_ahead(path)
            await trio.sleep(0.02)


async def test_a_file_that_is_larger_than_the_free_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(4096))
    assert await read_ahead(path, free_bytes=4095) == 0
    assert await read_ahead(path, free_bytes=4096) == 4096


async def test_a_missing_file_is_no_error_before_its_load(tmp_path: Path) -> None:
    assert await read_ahead(tmp_path / "none") == 0


async def _cached(path: Path) -> float:
    """The share of the file's pages that a read could get without the disk (preadv2 with RWF_NOWAIT says which)."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        pages = range(0, size, mmap.PAGESIZE * 16)
        return sum(_is_cached(file.fileno(), offset) for offset in pages) / len(pages)


def _is_cached(file: int, offset: int) -> bool:
    try:
        return os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
