"""One process with everything that belongs to it: its session and process group, its output, its exit.

On Linux a child dies with us by its parent-death signal (prctl(2), PR_SET_PDEATHSIG): the kernel kills it when the
thread that spawned it ends. So the main thread has to spawn it. (`trio.open_process` spawns in a worker thread, and
such a thread ends after 10 s without work: the kernel would then kill its children.)
"""

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import trio

from supervisor.memory import OomWatch
from supervisor.output import Output
from supervisor.strays import Kin, Origin, marked, reap_orphans, reap_strays

logger = logging.getLogger(__name__)

_READ_BYTES = 65536
# Programs write their lines one by one. What comes within this time is read together: to wake up for each line costs
# more than to handle it.
_READ_PAUSE_S = 0.005
# A child that prints much must not wait for that. A pipe can be full with less than _READ_BYTES in it: each write that
# does not fit into the rest of a page starts a new one (pipe(7)).
_MANY_BYTES = 16384
# After about this many lines other tasks get to run: each line costs a call of `on_line`.
_LINES_PER_CHUNK = 32
# After the exit of a child its last output is still in the pipe. Reading that takes no time, unless a process outside
# its group holds the pipe open.
_LAST_OUTPUT_S = 0.5
# A killed process is gone at once, except for one that hangs in a driver.
_KILL_WAIT_S = 10.0
_REAP_S = 1.0
_REAP_PAUSE_S = 0.002
_EXIT_PAUSE_S = 0.05
# How often zombies are reaped (one system call if there are none), and how often the child's descendants are listed
# (one small file for each of its threads).
_LOOK_S = 1.0
_LOOKS_PER_WALK = 5

# The parent-death signal is set a moment after the fork, and a parent that died before that moment sends none. So this
# checks that the parent (its pid is $0) still lives before it runs the program.
_EXEC_UNLESS_ORPHANED = '[ "$PPID" = "$0" ] && exec "$@"'

# The same in Python (PR_SET_PDEATHSIG is 1), which takes longer to start: for systems without setpriv.
_SETPRIV_IN_PYTHON = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Process:
    """A spawned process; implements `supervisor.spawner.ChildProcess`.

    `attend` must run as long as the process does. `ended` is set when the process is gone and reaped.
    """

    def __init__(
        self,
        name: str,
        generation: int,
        popen: "subprocess.Popen[bytes]",
        read_end: int,
        output: Output,
        mark: str,
    ) -> None:
        self.name = name
        self.generation = generation
        self.pid = popen.pid
        self.output = output
        self.ended = trio.Event()
        self._popen = popen
        self._pipe = trio.lowlevel.FdStream(read_end)
        self._attending = trio.CancelScope(shield=True)
        self._exited = trio.Event()
        self._grace = trio.CancelScope()
        self._killed = False
        self._kin = Kin(popen.pid)
        self._origin = Origin(pid=popen.pid, mark=mark, pipe=os.fstat(read_end).st_ino, kin=self._kin)
        self._oom = OomWatch()

    def __str__(self) -> str:
        return f"{self.name} (generation {self.generation}, pid {self.pid})"

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the number of the signal that killed the process; None while it exists."""
        return self._popen.returncode

    def is_suspended(self) -> bool:
        """Whether a stop signal (SIGSTOP) holds it: it can't answer, and can't obey SIGTERM either."""
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        except (psutil.Error, OSError):  # gone, or no file descriptor is free
            return False

    def group_pids(self) -> list[int]:
        """The processes of its process group; empty if it is gone, or no file descriptor is free."""
        if self._popen.returncode is not None:
            return []  # another group may have the number by now
        try:
            return [pid for pid in psutil.pids() if _group_of(pid) == self.pid]
        except OSError:
            return []

    def out_of_memory(self) -> str | None:
        """The limit that was hit, if the kernel has just killed a process in our cgroup for want of memory."""
        self._oom.look(trio.current_time())
        return self._oom.limit() if self._oom.just_killed(trio.current_time()) else None

    def reap_strays(self, others: Collection[int]) -> None:
        """End what left the process group and is still there, once the process is gone (Linux only).

        `others` are the pids of the other children that run.
        """
        reap_strays(self._origin, others)

    async def attend(self) -> None:
        """Read the output and reap the process; return when it is gone. Shielded from cancellation: use `terminate`."""
        try:
            await self._attend()
        except Exception:  # whatever it is, no process is left
            await self._kill_unattended()
            raise
        finally:
            self.ended.set()

    async def _attend(self) -> None:
        with self._attending:
            async with self._pipe, trio.open_nursery() as nursery:
                read_all = trio.Event()
                nursery.start_soon(self._read, read_all, name=f"read output of {self}")
                nursery.start_soon(self._look_after, name=f"look after {self}")
                await _wait_exit(self._popen)
                self._exited.set()
                # Until the leader is reaped, no other process group can get its number.
                self._signal_group(signal.SIGKILL)
                self._popen.wait()
                with trio.move_on_after(_LAST_OUTPUT_S):
                    await read_all.wait()
                nursery.cancel_scope.cancel()
            await self._reap_group()
        self.output.feed(b"")

    async def _kill_unattended(self) -> None:
        self._signal_group(signal.SIGKILL)
        with trio.CancelScope(shield=True), trio.move_on_after(_KILL_WAIT_S):
            while self._popen.poll() is None:  # noqa: ASYNC110
                await trio.sleep(_REAP_PAUSE_S)

    async def _look_after(self) -> None:
        """Reap its orphans, and remember its descendants and the kills for want of memory."""
        for looks in itertools.count(1):
            await trio.sleep(_LOOK_S)
            self._oom.look(trio.current_time())
            reap_orphans(self._kin)
            if looks % _LOOKS_PER_WALK == 0:
                self._kin.look()

    async def terminate(self, grace_s: float) -> None:
        """SIGTERM to the group, SIGKILL after `grace_s` (at once if suspended); return when the process is gone.

        Call it once, in a shielded scope. `kill` cuts the grace short.
        """
        if self.ended.is_set():
            return
        self._kin.look()
        if not self.is_suspended():
            self._signal_group(signal.SIGTERM)
            if await self._ends_by(trio.current_time() + grace_s):
                return
            if not self._killed:
                logger.warning("%s did not exit within %g s of SIGTERM, killing it", self, grace_s)
        self._signal_group(signal.SIGKILL)
        with trio.move_on_after(_KILL_WAIT_S):
            await self.ended.wait()
            return
        logger.error(
            "%s still exists %g s after SIGKILL, giving up on it (it may hang in a driver)", self, _KILL_WAIT_S
        )
        self._attending.cancel()
        await self.ended.wait()

    def kill(self) -> None:
        """SIGKILL to the group at once; a `terminate` that is waiting goes on without the rest of its grace."""
        self._killed = True
        self._grace.cancel()
        self._signal_group(signal.SIGKILL)

    async def _ends_by(self, deadline: float) -> bool:
        """Wait for the end of the process until then, or until `kill` is called; return whether it has ended."""
        self._grace.deadline = deadline
        with self._grace:
            await self.ended.wait()
        return self.ended.is_set()

    async def _reap_group(self) -> None:
        """Reap the killed processes that the leader left in its group: as their subreaper we are their parent.

        As long as one of them exists, even as a zombie, no other process group can get its number.
        """
        with trio.move_on_after(_REAP_S):
            while _reap_ended(self.pid):  # noqa: ASYNC110  (no event tells of their exit)
                await trio.sleep(_REAP_PAUSE_S)

    def _signal_group(self, signum: signal.Signals) -> None:
        if self._popen.returncode is not None:
            return  # reaped: another process may have the pid by now
        try:
            os.killpg(self.pid, signum)
        except ProcessLookupError:
            logger.debug("%s: its process group is empty", self)
        except PermissionError:  # macOS says this of a group that has only zombies
            logger.debug("%s: its process group can't be signalled", self)

    async def _read(self, read_all: trio.Event) -> None:
        try:
            while data := await self._pipe.receive_some(_READ_BYTES):
                first, *others = _chunks(data)
                self.output.feed(first)
                for piece in others:
                    await trio.lowlevel.checkpoint()
                    self.output.feed(piece)
                if len(data) < _MANY_BYTES:
                    with trio.move_on_after(_READ_PAUSE_S):
                        await self._exited.wait()
        except OSError as error:
            logger.warning("%s: can't read its output: %s", self, error)
        read_all.set()


def _reap_ended(group: int) -> bool:
    """Reap our children in that process group that have exited; return whether others still run."""
    try:
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _chunks(data: bytes) -> Iterator[bytes]:
    """The data in chunks of equal length, with `_LINES_PER_CHUNK` lines each on average."""
    size = max(1, len(data) * _LINES_PER_CHUNK // max(_LINES_PER_CHUNK, data.count(b"\n")))
    return (data[at : at + size] for at in range(0, len(data), size))


def spawn(
    name: str,
    generation: int,
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    cpus: frozenset[int] | None = None,
    on_line: Callable[[str], None] = lambda _line: None,
) -> Process:
    """Start the program in its own session and process group, with an empty stdin, and stdout and stderr in one pipe.

    Call it from the main thread only. Raises OSError if the program or the CPUs don't exist, or the spawn fails,
    and ValueError if an argument or a variable can't be given to a program (a NUL byte, a lone surrogate).

    In its own session the child gets no signal from our terminal: no Ctrl-C, no hang-up, no job control.
    """
    env, mark = marked(env)
    program = shutil.which(argv[0], path=env.get("PATH"))
    if program is None:
        raise FileNotFoundError(f"{argv[0]} does not exist or is not executable")
    read_end, write_end = os.pipe()
    try:
        with _on_cpus(cpus):
            popen = subprocess.Popen(
                [*_dies_with_us(), os.path.abspath(program), *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    return Process(name, generation, popen, read_end, Output(on_line), mark)


def _dies_with_us() -> list[str]:
    """The command that sets the parent-death signal and then runs the arguments after it; empty except on Linux."""
    if sys.platform != "linux":
        return []
    setpriv = shutil.which("setpriv")
    # busybox has a setpriv too, without --pdeathsig.
    if setpriv is not None and "busybox" not in os.path.realpath(setpriv):
        return [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _EXEC_UNLESS_ORPHANED, str(os.getpid())]
    return [sys.executable, "-I", "-S", "-c", _SETPRIV_IN_PYTHON, str(os.getpid())]


@contextmanager
def _on_cpus(cpus: frozenset[int] | None) -> Iterator[None]:
    """Give the calling thread the CPU affinity that a child spawned now inherits, so that it has it from the start."""
    if cpus is None or sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise OSError(error.errno, f"can't run on CPUs {sorted(cpus)}: {error.strerror}") from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def _wait_exit(popen: "subprocess.Popen[bytes]") -> None:
    """Wait until the process has exited, without reaping it."""
    try:
        pidfd = os.pidfd_open(popen.pid)
    except (AttributeError, OSError):  # this Python or kernel has no pidfds, or no file descriptor is free
        await _poll_exit(popen.pid)
    else:
        await _wait_pidfd(pidfd)


async def _wait_pidfd(pidfd: int) -> None:
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


async def _poll_exit(pid: int) -> None:
    # Not in a thread: when descriptors run out, threads often do so as well.
    while not _has_exited(pid):  # noqa: ASYNC110  (without a pidfd no event tells of its exit)
        await trio.sleep(_EXIT_PAUSE_S)


def _has_exited(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None
