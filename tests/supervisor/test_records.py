"""The children on disk, and what a later life does with those that a killed one left behind."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import trio

from supervisor.records import Records, sweep

SLEEP = (sys.executable, "-S", "-c", "import time; time.sleep(60)")


@pytest.fixture
def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(SLEEP, process_group=0)


def end(process: "subprocess.Popen[bytes]") -> int:
    process.kill()
    return process.wait(5)


async def recorded(path: Path, process: "subprocess.Popen[bytes]") -> None:
    records = Records(path)
    with trio.move_on_after(0.2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(records.run)
            while psutil.Process(process.pid).cmdline()[1:] != list(SLEEP[1:]):  # noqa: ASYNC110  (its exec)
                await trio.sleep(0.01)
            records.add(process.pid, SLEEP)
            await trio.sleep_forever()


async def test_what_a_dead_life_left_running_is_ended(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    path = tmp_path / "children.json"
    await recorded(path, sleeper)
    assert sweep(path) == [sleeper.pid]
    assert sleeper.wait(5) == -signal.SIGKILL
    assert sweep(path) == []


@pytest.mark.parametrize("field", ["started_at", "argv", "pid"])
async def test_what_only_looks_like_a_record_is_left_alone(
    field: str, tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    path = tmp_path / "children.json"
    await recorded(path, sleeper)
    [record] = json.loads(path.read_text())
    record[field] = {"started_at": record["started_at"] - 100, "argv": [*record["argv"], "x"], "pid": os.getpid()}[
        field
    ]
    path.write_text(json.dumps([record]))
    assert sweep(path) == []
    assert sleeper.poll() is None
    assert end(sleeper) == -signal.SIGKILL


async def test_a_child_that_ended_is_no_longer_recorded(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    path = tmp_path / "children.json"
    records = Records(path)
    with trio.move_on_after(0.2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(records.run)
            records.add(sleeper.pid, SLEEP)
            await trio.sleep(0.05)
            records.remove(sleeper.pid)
            await trio.sleep_forever()
    assert json.loads(path.read_text()) == []
    end(sleeper)


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"pid": 1}]', '"x"'])
def test_a_spoilt_file_is_a_warning_and_nothing_is_swept(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "children.json"
    path.write_text(content)
    assert sweep(path) == []
    assert "nothing is swept" in caplog.text


async def test_a_disk_that_is_full_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    records = Records(Path("/dev/full/children.json"))
    with trio.move_on_after(0.2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(records.run)
            for _ in range(3):
                records.add(os.getpid(), SLEEP)
                await trio.sleep(0.03)
    assert caplog.text.count("can't be recorded") == 1
