"""The supervisor with real children: small scripts, real signals, the real clock."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

from fakes.real_children import READY_THEN_SLEEP, PrintedAddress, Watched, gone, spec
from supervisor.lifecycle import Cause, Exited, GaveUp, Ready, Restarting, Started, Unhealthy
from supervisor.output import Output
from supervisor.probe import LivenessPolicy, NotReady, ProcessView
from supervisor.restart import RestartPolicy
from supervisor.spec import ChildSpec, StopPolicy
from supervisor.supervisor import ChildState, GivenUp, StartFailed


def wait_gone(pid: int) -> None:
    """For a process that is not our child: no event tells of its exit."""
    until = time.monotonic() + 5
    while not gone(pid):
        assert time.monotonic() < until, f"process {pid} is still there after 5 s"
        time.sleep(0.01)


@pytest.fixture
async def watched(nursery: trio.Nursery) -> AsyncIterator[Watched]:
    watched = Watched()
    with trio.fail_after(30):
        await nursery.start(watched.supervisor.run)
        yield watched
        nursery.cancel_scope.cancel()


async def test_start_returns_the_address_that_the_child_printed_once_the_probe_passes(watched: Watched) -> None:
    ready = await watched.supervisor.start(spec(READY_THEN_SLEEP))
    assert (ready.address, ready.generation) == ("home", 1)
    snapshot = watched.supervisor.snapshot()["child"]
    assert (snapshot.state, snapshot.address) == (ChildState.READY, "home")
    assert watched.lines == ["at home"]
    assert watched.supervisor.lines("child") == ["at home"]


async def test_concurrent_starts_are_joined(watched: Watched) -> None:
    readies: list[Ready] = []

    async def start() -> None:
        readies.append(await watched.supervisor.start(spec(READY_THEN_SLEEP)))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(start)
    assert len(readies) == 3
    assert len(set(readies)) == 1
    assert sum(isinstance(event, Started) for event in watched.events) == 1


async def test_a_child_that_exits_while_starting_fails_the_start_at_once_with_its_last_lines(watched: Watched) -> None:
    before = trio.current_time()
    with pytest.raises(StartFailed) as failed:
        await watched.supervisor.start(spec("print('no such file')\nraise SystemExit(3)"))
    assert trio.current_time() - before < 5
    assert failed.value.exit.code == 3
    assert failed.value.exit.last_lines == ("no such file",)
    assert "exited with code 3" in failed.value.exit.reason
    assert failed.value.exit.cause is Cause.EXITED


async def test_a_missing_program_is_a_failed_start(watched: Watched) -> None:
    missing = dataclasses.replace(spec(READY_THEN_SLEEP), argv=("/no/such/program",))
    with pytest.raises(StartFailed, match="/no/such/program does not exist") as failed:
        await watched.supervisor.start(missing)
    assert failed.value.exit.cause is Cause.SPAWN_FAILED


async def test_a_child_that_is_never_ready_is_ended_at_the_start_timeout(watched: Watched) -> None:
    with pytest.raises(StartFailed, match=r"not ready 0\.3 s after its spawn") as failed:
        await watched.supervisor.start(spec("import time; time.sleep(60)", start_timeout_s=0.3))
    assert failed.value.exit.cause is Cause.START_TIMEOUT
    started = await watched.until(Started)
    assert gone(started.pid)


async def test_a_crash_is_followed_by_one_restart_at_once_then_back_off_then_giving_up(watched: Watched) -> None:
    child = spec("print('at home', flush=True)\nimport time\ntime.sleep(0.7)\nraise SystemExit(7)")
    await watched.supervisor.start(child)
    gave_up = await watched.until(GaveUp)
    assert "3 exits in 60 s" in gave_up.reason
    assert "exited with code 7" in gave_up.reason
    delays = [event.delay_s for event in watched.events if isinstance(event, Restarting)]
    assert delays[0] == 0
    assert 0.01 <= delays[1] <= 0.02
    assert [event.generation for event in watched.events if isinstance(event, Started)] == [1, 2, 3]
    assert watched.state() is ChildState.FAILED
    with pytest.raises(GivenUp) as given_up:
        await watched.supervisor.start(child)
    assert given_up.value.retry_at == gave_up.retry_at
    await trio.sleep_until(gave_up.retry_at)
    assert (await watched.supervisor.start(child)).generation == 4


async def test_a_start_after_the_cool_down_gives_up_again_at_once_if_it_fails(watched: Watched) -> None:
    child = spec("raise SystemExit(7)", restart=RestartPolicy(max_restarts=0, cooldown_s=0.1))
    with pytest.raises(StartFailed):
        await watched.supervisor.start(child)
    await trio.sleep(0.1)
    with pytest.raises(StartFailed):
        await watched.supervisor.start(child)
    assert watched.state() is ChildState.FAILED
    assert sum(isinstance(event, Started) for event in watched.events) == 2


async def test_a_failed_child_starts_at_once_with_a_different_spec(watched: Watched) -> None:
    once = RestartPolicy(max_restarts=0, cooldown_s=60)
    with pytest.raises(StartFailed):
        await watched.supervisor.start(spec("raise SystemExit(7)", restart=once))
    with pytest.raises(GivenUp):
        await watched.supervisor.start(spec("raise SystemExit(7)", restart=once))
    repaired = spec(READY_THEN_SLEEP, restart=once)
    assert (await watched.supervisor.start(repaired)).generation == 2


async def test_a_failed_child_that_is_forgotten_can_be_started_at_once(watched: Watched) -> None:
    child = spec("raise SystemExit(7)", restart=RestartPolicy(max_restarts=0, cooldown_s=60))
    with pytest.raises(StartFailed):
        await watched.supervisor.start(child)
    watched.supervisor.forget("child")
    assert watched.supervisor.snapshot() == {}
    with pytest.raises(StartFailed) as failed:
        await watched.supervisor.start(child)
    assert failed.value.generation == 2


async def test_a_running_child_is_not_forgotten(watched: Watched) -> None:
    await watched.supervisor.start(spec(READY_THEN_SLEEP))
    watched.supervisor.forget("child")
    watched.supervisor.forget("unknown")
    assert watched.state() is ChildState.READY


async def test_a_killed_child_is_restarted_unasked(watched: Watched) -> None:
    await watched.supervisor.start(spec(READY_THEN_SLEEP))
    os.kill((await watched.until(Started)).pid, signal.SIGKILL)
    ready = await watched.until(Ready, 2)
    assert ready.generation == 2
    assert (await watched.until(Exited)).exit.reason == "was killed by SIGKILL"
    assert (await watched.until(Exited)).exit.cause is Cause.KILLED_BY_SIGNAL


async def test_stop_ends_the_whole_group(watched: Watched) -> None:
    family = "import subprocess\np = subprocess.Popen(['sleep', '60'])\nprint('at', p.pid, flush=True)\np.wait()"
    grandchild = int((await watched.supervisor.start(spec(family))).address)
    child = (await watched.until(Started)).pid
    await watched.supervisor.stop("child")
    assert gone(child)
    assert gone(grandchild)
    assert (await watched.until(Exited)).exit.cause is Cause.STOPPED
    assert not psutil.pid_exists(grandchild)  # it is reaped, not left as a zombie
    assert watched.state() is ChildState.STOPPED
    await watched.supervisor.stop("child")  # once more does no harm


async def test_processes_that_a_dead_child_left_in_its_group_are_killed(watched: Watched) -> None:
    family = "import subprocess, time\nprint('at', subprocess.Popen(['sleep', '60']).pid, flush=True)\ntime.sleep(60)"
    grandchild = int((await watched.supervisor.start(spec(family))).address)
    os.kill((await watched.until(Started)).pid, signal.SIGKILL)
    await watched.until(Exited)
    assert not psutil.pid_exists(grandchild)


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(watched: Watched) -> None:
    ignores_sigterm = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY_THEN_SLEEP
    await watched.supervisor.start(spec(ignores_sigterm, stop=StopPolicy(grace_s=0.2)))
    before = trio.current_time()
    await watched.supervisor.stop("child")
    assert 0.2 <= trio.current_time() - before < 5
    assert (await watched.until(Exited)).exit.code == -signal.SIGKILL


async def test_kill_all_ends_every_child_and_its_group_at_once(watched: Watched) -> None:
    ignores_sigterm = (
        "import signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('at', subprocess.Popen(['sleep', '60']).pid, flush=True)\n"
        "time.sleep(60)"
    )
    patient = StopPolicy(grace_s=60.0)
    first = await watched.supervisor.start(spec(ignores_sigterm, child_id="a", stop=patient))
    second = await watched.supervisor.start(spec(ignores_sigterm, child_id="b", stop=patient))
    async with trio.open_nursery() as stopping:
        stopping.start_soon(watched.supervisor.stop, "a")
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(5):
            await watched.supervisor.kill_all()
    pids = [int(first.address), int(second.address), *(it.pid for it in watched.events if isinstance(it, Started))]
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert (watched.state("a"), watched.state("b")) == (ChildState.STOPPED, ChildState.STOPPED)


async def test_stop_ends_a_start_and_a_back_off(watched: Watched) -> None:
    async def expect_failure(child: ChildSpec) -> None:
        with pytest.raises(StartFailed):
            await watched.supervisor.start(child)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_failure, spec("import time; time.sleep(60)"))
        started = await watched.until(Started)
        await watched.supervisor.stop("child")
    assert gone(started.pid)
    slow = RestartPolicy(backoff_initial_s=60, backoff_max_s=60)
    await expect_failure(spec("raise SystemExit(1)", child_id="other", restart=slow))
    assert watched.state("other") is ChildState.BACKING_OFF
    await watched.supervisor.stop("other")
    assert watched.state("other") is ChildState.STOPPED


async def test_a_different_spec_for_a_running_child_is_an_error(watched: Watched) -> None:
    await watched.supervisor.start(spec(READY_THEN_SLEEP))
    with pytest.raises(ValueError, match="stop it first"):
        await watched.supervisor.start(spec(READY_THEN_SLEEP + " # other"))


async def test_children_of_a_group_share_one_series_of_generations(watched: Watched) -> None:
    first = await watched.supervisor.start(spec(READY_THEN_SLEEP, child_id="a"))
    second = await watched.supervisor.start(spec(READY_THEN_SLEEP, child_id="b"))
    assert (first.generation, second.generation) == (1, 2)


async def test_a_suspended_child_fails_its_liveness_and_is_replaced(watched: Watched) -> None:
    quick = LivenessPolicy(interval_s=0.05, timeout_s=1, failures=2)
    await watched.supervisor.start(spec(READY_THEN_SLEEP, liveness=quick, stop=StopPolicy(grace_s=0.1)))
    os.kill((await watched.until(Started)).pid, signal.SIGSTOP)
    assert (await watched.until(Unhealthy)).reason == "suspended by a stop signal"
    assert (await watched.until(Unhealthy)).cause is Cause.SUSPENDED
    assert (await watched.until(Restarting)).cause is Cause.SUSPENDED
    assert (await watched.until(Exited)).exit.code == -signal.SIGKILL  # at once: it could not obey SIGTERM
    assert (await watched.until(Ready, 2)).generation == 2


async def test_a_child_that_is_suspended_while_it_starts_is_a_failed_start(watched: Watched) -> None:
    quick = LivenessPolicy(interval_s=0.05)
    async with trio.open_nursery() as nursery:

        async def start() -> None:
            with pytest.raises(StartFailed, match="suspended by a stop signal") as failed:
                await watched.supervisor.start(spec("import time; time.sleep(60)", liveness=quick, start_timeout_s=60))
            assert failed.value.exit.cause is Cause.SUSPENDED

        nursery.start_soon(start)
        os.kill((await watched.until(Started)).pid, signal.SIGSTOP)
    assert (await watched.until(Exited)).exit.code == -signal.SIGKILL


async def test_a_child_that_no_longer_passes_its_probe_is_replaced(watched: Watched) -> None:
    class SometimesIll(PrintedAddress):
        ill = False

        async def check(self, process: ProcessView) -> str:
            if self.ill and process.generation == 1:
                raise NotReady("ill")
            return await super().check(process)

    probe = SometimesIll()
    quick = LivenessPolicy(interval_s=0.05, timeout_s=1, failures=3)
    child = dataclasses.replace(spec(READY_THEN_SLEEP, liveness=quick), probe=probe)
    await watched.supervisor.start(child)
    probe.ill = True
    assert (await watched.until(Unhealthy)).reason == "3 liveness probes in a row failed, the last: ill"
    assert (await watched.until(Exited)).exit.cause is Cause.LIVENESS_FAILED
    assert (await watched.until(Ready, 2)).generation == 2


async def test_a_child_can_be_failed_for_a_reason_that_its_probe_does_not_see(watched: Watched) -> None:
    await watched.supervisor.start(spec(READY_THEN_SLEEP))
    watched.supervisor.fail("child", 7, "another generation")
    watched.supervisor.fail("other", 1, "unknown child")
    watched.supervisor.fail("child", 1, "it makes no progress")
    assert (await watched.until(Unhealthy)).reason == "it makes no progress"
    assert (await watched.until(Exited)).exit.cause is Cause.STALLED
    assert (await watched.until(Ready, 2)).generation == 2


async def test_a_descendant_that_left_the_group_ends_with_its_child(watched: Watched) -> None:
    daemon = (
        "import os, time\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.write(write, str(os.getpid()).encode())\n"
        "        time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print('at', os.read(read, 20).decode(), flush=True)\n"
        "time.sleep(60)"
    )
    stray = int((await watched.supervisor.start(spec(daemon))).address)
    assert os.getpgid(stray) != (await watched.until(Started)).pid
    os.kill((await watched.until(Started)).pid, signal.SIGKILL)
    await watched.until(Exited)
    assert gone(stray)
    assert not psutil.pid_exists(stray)  # it is reaped, not left as a zombie


async def test_endless_output_without_a_newline_takes_little_memory(watched: Watched) -> None:
    flood = "import os\nfor _ in range(800): os.write(1, b'x' * 65536)\nprint()\n" + READY_THEN_SLEEP
    before = psutil.Process().memory_info().rss
    await watched.supervisor.start(spec(flood))
    assert psutil.Process().memory_info().rss - before < 20 * 2**20
    assert [len(line) for line in watched.lines] == [4096 + len(" [cut]"), len("at home")]


async def test_a_flood_of_short_lines_lets_other_tasks_run(watched: Watched) -> None:
    flood = "import os\nos.write(1, b'\\n' * 32768)\nprint()\n" + READY_THEN_SLEEP
    most_at_once = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.supervisor.start, spec(flood))
        while watched.lines[-1:] != ["at home"]:
            before = len(watched.lines)
            await trio.lowlevel.checkpoint()
            most_at_once = max(most_at_once, len(watched.lines) - before)
    assert len(watched.lines) == 32768 + 2
    assert most_at_once < 200


async def test_lines_that_come_soon_after_each_other_are_read_together(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    feed = Output.feed

    def counted(output: Output, data: bytes) -> None:
        nonlocal reads
        reads += 1
        feed(output, data)

    monkeypatch.setattr(Output, "feed", counted)
    began = trio.current_time()
    script = "import time\nfor n in range(200): print(n, flush=True); time.sleep(0.0002)\n"
    await watched.supervisor.start(spec(script + READY_THEN_SLEEP))
    assert watched.lines == [*map(str, range(200)), "at home"]
    assert reads <= (trio.current_time() - began) / 0.005 + 1


async def test_running_out_of_file_descriptors_costs_a_failed_start_and_nothing_else(watched: Watched) -> None:
    class PrintedHome(PrintedAddress):
        async def check(self, process: ProcessView) -> str:
            if "at home" not in process.output.lines():
                raise NotReady("it has not printed its address")
            return "home"

    child = dataclasses.replace(
        spec(READY_THEN_SLEEP, liveness=LivenessPolicy(interval_s=0.01)),
        probe=PrintedHome(),
        restart=RestartPolicy(backoff_initial_s=0.02, backoff_max_s=0.05, max_restarts=1000),
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.supervisor.start, child)
        try:
            started = await watched.until(Started)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            await watched.until(Ready)
            await trio.sleep(0.1)
            assert watched.state() is ChildState.READY
            os.kill(started.pid, signal.SIGKILL)
            assert "Too many open files" in (await watched.until(Exited, 2)).exit.reason
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await watched.until(Ready, 2)


async def test_a_child_runs_on_its_cpus_and_the_supervisor_on_its_own(watched: Watched) -> None:
    ours = os.sched_getaffinity(0)
    await watched.supervisor.start(spec(READY_THEN_SLEEP, cpus=frozenset({min(ours)})))
    assert os.sched_getaffinity((await watched.until(Started)).pid) == {min(ours)}
    assert os.sched_getaffinity(0) == ours


async def test_missing_cpus_are_a_failed_start(watched: Watched) -> None:
    with pytest.raises(StartFailed, match=r"can't run on CPUs \[4000\]"):
        await watched.supervisor.start(spec(READY_THEN_SLEEP, cpus=frozenset({4000})))


async def test_a_child_outlives_the_idle_time_of_worker_threads(watched: Watched) -> None:
    # The parent-death signal follows the spawning thread; trio's worker threads end after 10 s without work.
    await watched.supervisor.start(spec(READY_THEN_SLEEP))
    await trio.sleep(12)
    assert watched.state() is ChildState.READY
    assert sum(isinstance(event, Started) for event in watched.events) == 1


async def test_cancelling_start_leaves_the_child_starting_and_cancelling_run_ends_it(nursery: trio.Nursery) -> None:
    watched = Watched()
    with trio.fail_after(20):
        async with trio.open_nursery() as owner:
            await owner.start(watched.supervisor.run)
            with trio.move_on_after(0.3):
                await watched.supervisor.start(spec("import time; time.sleep(60)"))
            assert watched.state() is ChildState.STARTING
            owner.cancel_scope.cancel()
        assert watched.state() is ChildState.STOPPED
        assert gone((await watched.until(Started)).pid)


@pytest.mark.parametrize("steps", range(12))
async def test_cancelling_run_at_any_step_leaves_no_process(steps: int) -> None:
    watched = Watched()
    with trio.fail_after(20):
        async with trio.open_nursery() as owner:
            await owner.start(watched.supervisor.run)
            with trio.move_on_after(0.05):
                async with trio.open_nursery() as starting:
                    starting.start_soon(watched.supervisor.start, spec(READY_THEN_SLEEP))
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    starting.cancel_scope.cancel()
            owner.cancel_scope.cancel()
    assert all(gone(event.pid) for event in watched.events if isinstance(event, Started))
    assert all(child.state is ChildState.STOPPED for child in watched.supervisor.snapshot().values())


SUPERVISING = """
import os, sys, trio
sys.path[:0] = {path!r}
from fakes.real_children import READY_THEN_SLEEP, spec
from supervisor.supervisor import Supervisor

async def main():
    async with trio.open_nursery() as nursery:
        supervisor = Supervisor()
        await nursery.start(supervisor.run)
        await supervisor.start(spec(READY_THEN_SLEEP))
        print(supervisor.snapshot()["child"].pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def test_no_child_outlives_a_killed_supervisor() -> None:
    path = [str(Path(__file__).parent.parent)]
    with subprocess.Popen([sys.executable, "-c", SUPERVISING.format(path=path)], stdout=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        child = int(ours.stdout.readline())
        ours.kill()
        ours.wait()
    wait_gone(child)


DIES_AT_ONCE = """
import os, signal, sys, trio
sys.path[:0] = {path!r}
from supervisor.spawn import spawn

async def main():
    print(spawn("child", 1, ["/bin/sleep", "60"], env=dict(os.environ)).pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

trio.run(main)
"""


@pytest.mark.parametrize("programs", [os.environ["PATH"], "/nowhere"], ids=["setpriv", "without setpriv"])
def test_no_child_outlives_a_supervisor_that_is_killed_right_after_the_spawn(programs: str) -> None:
    path = [str(Path(__file__).parent.parent.parent)]
    for _ in range(5):
        argv = [sys.executable, "-c", DIES_AT_ONCE.format(path=path)]
        ended = subprocess.run(argv, stdout=subprocess.PIPE, env={**os.environ, "PATH": programs}, check=False)
        assert ended.returncode == -signal.SIGKILL
        wait_gone(int(ended.stdout))
