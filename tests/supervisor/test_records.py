"""The running children on disk, and how the next run kills those that a killed supervisor left behind."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import trio

from supervisor import records
from supervisor.probe import ProcessView
from supervisor.records import Records, sweep
from supervisor.spec import ChildSpec
from supervisor.supervisor import Supervisor


class AtOnce:
    """Ready as soon as it is spawned."""

    async def check(self, _process: ProcessView) -> str:
        return "here"


SLEEP = (sys.executable, "-S", "-c", "import time; time.sleep(60)")


@pytest.fixture
def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(SLEEP, process_group=0)


def end(process: "subprocess.Popen[bytes]") -> int:
    process.kill()
    return process.wait(5)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what a thread or another process does."""
    with trio.fail_after(20):
        while not holds():  # noqa: ASYNC110
            await trio.sleep(0.01)


def on_record(path: Path) -> list[int]:
    return [record["pid"] for record in json.loads(path.read_text())] if path.exists() else []


async def recorded(path: Path, process: "subprocess.Popen[bytes]") -> None:
    recording = Records(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recording.run)
        await until(lambda: psutil.Process(process.pid).cmdline()[1:] == list(SLEEP[1:]))  # its exec
        recording.add(process.pid, SLEEP)
        await until(lambda: on_record(path) == [process.pid])
        nursery.cancel_scope.cancel()


async def test_a_recorded_process_that_still_runs_is_killed(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    path = tmp_path / "children.json"
    await recorded(path, sleeper)
    assert sweep(path) == [sleeper.pid]
    assert sleeper.wait(5) == -signal.SIGKILL
    assert sweep(path) == []


@pytest.mark.parametrize("field", ["started_at", "argv", "pid"])
async def test_a_process_that_does_not_match_its_record_is_left_alone(
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


async def test_a_supervisor_that_ended_leaves_no_record(tmp_path: Path) -> None:
    path = tmp_path / "children.json"
    supervisor = Supervisor(records=Records(path))
    env = dict(os.environ)
    spec = ChildSpec(child_id="child", group="group", argv=SLEEP, env=env, probe=AtOnce(), start_timeout_s=10)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.run)
            await supervisor.start(spec)
            await until(lambda: on_record(path) != [])
            nursery.cancel_scope.cancel()
    assert json.loads(path.read_text()) == []


@pytest.mark.real
def test_killing_a_process_that_has_just_exited_does_nothing(sleeper: "subprocess.Popen[bytes]") -> None:
    end(sleeper)
    records._kill(sleeper.pid)


async def test_a_child_that_exited_is_no_longer_recorded(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    path = tmp_path / "children.json"
    recording = Records(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recording.run)
        recording.add(sleeper.pid, SLEEP)
        await until(lambda: on_record(path) == [sleeper.pid])
        recording.remove(sleeper.pid)
        await until(lambda: on_record(path) == [])
        nursery.cancel_scope.cancel()
    end(sleeper)


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"pid": 1}]', '"x"'])
def test_a_damaged_file_is_a_warning_and_no_process_is_killed(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "children.json"
    path.write_text(content)
    assert sweep(path) == []
    assert "no left-over process is killed" in caplog.text


HOSTILE = [
    "[" * 100_000,
    '[{"pid": ' + "9" * 5000 + "}]",
    "\udcff",
    json.dumps([{"pid": 10**30, "started_at": 0, "argv": ["x"]}]),
    json.dumps([{"pid": -1, "started_at": 0, "argv": ["x"]}]),
    json.dumps([{"pid": 0, "started_at": 0, "argv": ["x"]}]),
    json.dumps([{"pid": 1, "started_at": 0, "argv": ["x"]}]),
    json.dumps([{"pid": True, "started_at": 0, "argv": ["x"]}]),
    json.dumps([{"pid": 2.5, "started_at": 0, "argv": ["x"]}]),
    json.dumps([{"pid": 4000, "started_at": "now", "argv": ["x"]}]),
    '[{"pid": 4000, "started_at": 1e999, "argv": ["x"]}]',
    '[{"pid": 4000, "started_at": NaN, "argv": ["x"]}]',
    json.dumps([{"pid": 4000, "started_at": 10**400, "argv": ["x"]}]),
    json.dumps([{"pid": 4000, "started_at": 0, "argv": []}]),
    json.dumps([{"pid": 4000, "started_at": 0, "argv": ["x", 7]}]),
    json.dumps([{"pid": 4000, "started_at": 0, "argv": "x"}]),
    json.dumps({"pid": 4000}),
]


@pytest.mark.parametrize("content", HOSTILE, ids=[text[:40] for text in HOSTILE])
def test_a_hostile_file_is_a_warning_and_no_process_is_killed(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "children.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert sweep(path) == []
    assert "no left-over process is killed" in caplog.text


# In a container, a group or a session that began outside of it has the id 0, which is no process.
# The leader of a group or session may have ended.
@pytest.mark.parametrize(
    "pid",
    sorted(pid for pid in {1, os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0)} - {0} if psutil.pid_exists(pid)),
)
def test_a_record_that_matches_ourselves_our_group_or_the_first_process_is_damaged(pid: int, tmp_path: Path) -> None:
    process = psutil.Process(pid)
    record = {"pid": pid, "started_at": process.create_time(), "argv": process.cmdline() or ["init"]}
    path = tmp_path / "children.json"
    path.write_text(json.dumps([record]))
    assert sweep(path) == []


async def test_a_damaged_record_does_not_save_the_process_of_another_one(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    path = tmp_path / "children.json"
    await recorded(path, sleeper)
    path.write_text(json.dumps(["?", *json.loads(path.read_text()), {"pid": -1}]))
    assert sweep(path) == [sleeper.pid]
    assert sleeper.wait(5) == -signal.SIGKILL


def test_a_pipe_a_folder_and_a_huge_file_in_place_of_the_records_are_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(2**40)
    for name in ("pipe", "folder", "huge"):
        assert sweep(tmp_path / name) == []
    assert caplog.text.count("no left-over process is killed") == 3


async def test_a_full_disk_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    recording = Records(Path("/dev/full/children.json"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recording.run)
        recording.add(os.getpid(), SLEEP)
        await until(lambda: "can't be recorded" in caplog.text)
        for _ in range(3):
            recording.add(os.getpid(), SLEEP)
            await trio.sleep(0.03)
        nursery.cancel_scope.cancel()
    assert caplog.text.count("can't be recorded") == 1
