"""What real children leave behind: orphans are reaped, strays are ended, and nobody else's process is touched."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from fakes.real_children import READY_THEN_SLEEP, Watched, gone, spec
from supervisor import strays
from supervisor.lifecycle import Cause, Exited, Started
from supervisor.spawn import spawn
from supervisor.supervisor import StartFailed


@pytest.fixture
async def watched(nursery: trio.Nursery) -> AsyncIterator[Watched]:
    watched = Watched()
    with trio.fail_after(30):
        await nursery.start(watched.supervisor.run)
        yield watched
        nursery.cancel_scope.cancel()


LEAVES_ORPHANS = """
import os, time
for number in range(300):
    first = os.fork()
    if first == 0:
        {in_first}
        if os.fork() == 0:
            time.sleep(0.2)
        os._exit(0)
    os.waitpid(first, 0)
print('at home', flush=True)
time.sleep(60)
"""


def popen(argv: list[str], **more: Any) -> "subprocess.Popen[bytes]":
    """A process that is not the supervisor's."""
    return subprocess.Popen(argv, **more)


def zombies() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.parametrize("in_first", ["pass", "os.setsid()"], ids=["in the child's session", "in their own session"])
async def test_hundreds_of_orphans_leave_no_zombie(in_first: str, watched: Watched) -> None:
    others = popen([sys.executable, "-c", "raise SystemExit(7)"])
    leader = popen([sys.executable, "-c", "raise SystemExit(8)"], start_new_session=True)
    await watched.supervisor.start(spec(LEAVES_ORPHANS.format(in_first=in_first)))
    with trio.fail_after(2.2):
        while [it for it in zombies() if it.pid not in (others.pid, leader.pid)]:  # noqa: ASYNC110
            await trio.sleep(0.02)
    assert (others.wait(), leader.wait()) == (7, 8), "nobody else's exit status is taken"


DAEMON = """
import os, sys, time
read, write = os.pipe()
first = os.fork()
if first == 0:
    {in_first}
    if {forks_again} and os.fork():
        os._exit(0)
    os.setsid() if not {forks_again} else None
    os.write(write, str(os.getpid()).encode())
    {in_daemon}
    os.execve('/bin/sleep', ['sleep', '60'], {{}})
if {forks_again}:
    os.waitpid(first, 0)
print('at', os.read(read, 20).decode(), flush=True)
time.sleep({lives_s})
"""
CLOSES_ALL = "os.closerange(0, 100)"


def daemon(*, forks_again: bool, closes_all: bool, lives_s: float = 60.0) -> str:
    in_first = "os.setsid()" if forks_again else "pass"
    in_daemon = CLOSES_ALL if closes_all else "pass"
    return DAEMON.format(in_first=in_first, forks_again=forks_again, in_daemon=in_daemon, lives_s=lives_s)


@pytest.mark.parametrize("forks_again", [True, False], ids=["orphan", "still its child"])
@pytest.mark.parametrize("closes_all", [True, False], ids=["without output", "with its output"])
async def test_a_descendant_that_cleared_its_environment_and_left_the_group_ends_with_its_child(
    forks_again: bool, closes_all: bool, watched: Watched
) -> None:
    ready = await watched.supervisor.start(spec(daemon(forks_again=forks_again, closes_all=closes_all)))
    stray = psutil.Process(int(ready.address))
    with trio.fail_after(5):
        while stray.name() != "sleep":  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert stray.environ() == {}
    await watched.supervisor.stop("child")
    assert not psutil.pid_exists(stray.pid)


async def test_an_orphan_of_another_child_is_left_alone(watched: Watched) -> None:
    script = daemon(forks_again=True, closes_all=True)
    older = await watched.supervisor.start(spec(script, child_id="older"))
    await watched.supervisor.start(spec(READY_THEN_SLEEP, child_id="other"))
    await watched.supervisor.stop("other")
    assert not gone(int(older.address))
    await watched.supervisor.stop("older")
    assert gone(int(older.address))


async def test_processes_that_we_spawned_ourselves_are_left_alone(watched: Watched) -> None:
    with (
        popen(["/bin/sleep", "60"]) as ours,
        popen(["/bin/sleep", "60"], start_new_session=True, env={}) as leader,
    ):
        await watched.supervisor.start(spec(READY_THEN_SLEEP))
        await watched.supervisor.stop("child")
        assert (ours.poll(), leader.poll()) == (None, None)
        ours.kill()
        leader.kill()


async def test_a_child_has_a_session_of_its_own_and_no_terminal(watched: Watched) -> None:
    await watched.supervisor.start(spec(READY_THEN_SLEEP))
    child = psutil.Process((await watched.until(Started)).pid)
    assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid != os.getsid(0)
    assert child.terminal() is None


async def test_the_processes_of_a_childs_group_are_known(watched: Watched) -> None:
    family = "import subprocess, time\nprint('at', subprocess.Popen(['sleep', '60']).pid, flush=True)\ntime.sleep(60)"
    process = spawn("child", 1, [sys.executable, "-c", family], env=dict(os.environ))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.attend)
        await process.output.more_than(0)
        grandchild = int(process.output.lines()[0].removeprefix("at "))
        assert set(process.group_pids()) == {process.pid, grandchild}
        process.kill()
    assert process.group_pids() == []


@pytest.mark.parametrize("error", [RuntimeError("unforeseen"), RecursionError("unforeseen")])
async def test_a_process_whose_attendance_fails_is_killed_and_reaped(error: Exception) -> None:
    def on_line(_line: str) -> None:
        raise error

    process = spawn("child", 1, [sys.executable, "-c", READY_THEN_SLEEP], env=dict(os.environ), on_line=on_line)
    with trio.fail_after(10), pytest.raises(ExceptionGroup):
        await process.attend()
    assert process.ended.is_set()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("argument", ["lone \udc80 surrogate \ud800", "a\0b"])
@pytest.mark.parametrize("place", ["argv", "env"])
async def test_what_no_program_can_be_given_is_a_failed_start_with_the_reason(
    argument: str, place: str, watched: Watched
) -> None:
    child = spec(argument)
    if place == "env":
        child = dataclasses.replace(spec(READY_THEN_SLEEP), env={**os.environ, "X": argument})
    with pytest.raises(StartFailed, match=r"surrogates not allowed|null byte|null character") as failed:
        await watched.supervisor.start(child)
    assert failed.value.exit.cause is Cause.SPAWN_FAILED
    assert (await watched.until(Exited)).exit.cause is Cause.SPAWN_FAILED


UNDER_A_LOW_LIMIT = """
import os, resource, sys, trio
sys.path[:0] = {path!r}
from supervisor.probe import NotReady
from supervisor.restart import RestartPolicy
from supervisor.supervisor import Supervisor
from supervisor.probe import LivenessPolicy
from supervisor.spec import ChildSpec

PORT = {port}
SERVER = (
    "import socket, sys\\n"
    "with socket.create_server(('127.0.0.1', int(sys.argv[1]))) as it:\\n"
    "    while True: it.accept()[0].close()"
)

class Tcp:
    async def check(self, process):
        try:
            await (await trio.open_tcp_stream("127.0.0.1", PORT)).aclose()
        except OSError as error:
            raise NotReady("refused") from error
        return "here"

async def main():
    events = []
    supervisor = Supervisor(on_event=events.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        spec = ChildSpec(
            child_id="child", group="group", argv=(sys.executable, "-S", "-c", SERVER, str(PORT)),
            env=dict(os.environ), probe=Tcp(), start_timeout_s=20,
            liveness=LivenessPolicy(interval_s=0.05, timeout_s=2, failures=2), restart=RestartPolicy(max_restarts=0),
        )
        ready = await supervisor.start(spec)
        await trio.sleep(0.5)  # some liveness probes
        kinds = [type(event).__name__ for event in events]
        print(len(taken) > 20, kinds)
        for fd in taken:
            os.close(fd)
        nursery.cancel_scope.cancel()

trio.run(main)
"""


@pytest.mark.real
def test_a_child_is_spawned_and_probed_although_everything_else_took_all_descriptors(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = [str(Path(__file__).parent.parent.parent)]
    script = UNDER_A_LOW_LIMIT.format(path=path, port=port)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "True ['Started', 'Ready']\n", ended.stderr


async def test_the_children_of_a_process_are_found_with_and_without_the_kernels_lists(watched: Watched) -> None:
    family = "import subprocess, time\nprint('at', subprocess.Popen(['sleep', '60']).pid, flush=True)\ntime.sleep(60)"
    grandchild = int((await watched.supervisor.start(spec(family))).address)
    child = (await watched.until(Started)).pid
    assert strays._children(child) == strays._children_by_search(child) == [grandchild]
    kin = strays.Kin(child)
    kin.look()
    seen = strays.stat_of(grandchild)
    assert seen is not None
    assert kin.includes(seen)
    assert not kin.includes(dataclasses.replace(seen, started=seen.started + 1)), "a pid is used again"
    await watched.supervisor.stop("child")
    assert strays._children(child) == strays._children_by_search(child) == []
    assert strays.stat_of(grandchild) is None
    kin.look()
    assert not kin.includes(seen)


async def test_what_can_not_be_looked_at_is_no_stray(watched: Watched) -> None:
    await watched.supervisor.start(spec(READY_THEN_SLEEP))
    child = psutil.Process((await watched.until(Started)).pid)
    await watched.supervisor.stop("child")
    assert strays._mark_of(child) is None
    assert strays._pipes_of(child.pid) == set()
    assert not strays._runs(child)
    origin = strays.Origin(pid=1, mark="mark", pipe=0, kin=strays.Kin(child.pid))
    assert not origin.is_of(child, None)


LOOKS_FOR_STRAYS = """
import os, subprocess, sys
from supervisor import strays

looked = []
origin = strays.Origin(pid=2, mark="none", pipe=0, kin=strays.Kin(2))
sys.addaudithook(lambda event, arguments: looked.append(event) if event == "os.listdir" else None)
strays.reap_strays(origin)
print("without a child:", len(looked))
child = subprocess.Popen(["sleep", "60"])
strays.reap_strays(origin)
print("with a child:", bool(looked))
child.kill()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says at once that a process has no children")
def test_a_process_without_children_does_not_search_the_host_for_strays() -> None:
    done = subprocess.run([sys.executable, "-c", LOOKS_FOR_STRAYS], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["without a child: 0", "with a child: True"], done.stderr
