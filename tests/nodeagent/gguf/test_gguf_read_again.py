"""A file that has not changed is not read again, and any change is seen."""

import os
from pathlib import Path

import pytest

from fakes import tiny_models
from nodeagent.gguf.file import GgufError, read_part


def test_a_file_that_has_not_changed_is_read_once(tmp_path: Path) -> None:
    path = tiny_models.write_model(tiny_models.TINY, tmp_path)
    assert read_part(path) is read_part(path)


def test_a_change_is_seen_although_size_and_modification_time_stay(tmp_path: Path) -> None:
    path = tiny_models.write_model(tiny_models.TINY, tmp_path)
    read_part(path)
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of some file systems ticks each 4 ms
        with path.open("r+b") as file:
            file.write(b"JUNK")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(GgufError, match="not a GGUF file"):
        read_part(path)


def test_another_file_in_its_place_is_read(tmp_path: Path) -> None:
    path = tiny_models.write_model(tiny_models.TINY, tmp_path)
    first = read_part(path)
    tiny_models.write_model(tiny_models.TINY_B, tmp_path).rename(path)
    assert read_part(path).size_bytes == path.stat().st_size != first.size_bytes


def test_a_file_that_could_not_be_read_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(GgufError, match="empty"):
            read_part(path)
    path.unlink()
    with pytest.raises(GgufError, match="no such file"):
        read_part(path)
