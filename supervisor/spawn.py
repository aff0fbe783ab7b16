"""One process with everything that belongs to it: its own group, its output, its end.

On Linux a child is tied to our life by its parent-death signal: the kernel kills it when the thread that spawned it
ends. So it has to be spawned by the main thread. (`trio.open_process` spawns in a worker thread, and such a thread
ends after 10 s without work: its children would be killed with it.)
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import trio

logger = logging.getLogger(__name__)

_LINES_KEPT = 1000
_LINE_BYTES = 4096
_READ_BYTES = 65536
# So many lines are taken in before others get their turn: each costs a call of whoever logs it.
_LINES_A_TURN = 32
# After its end a child's last words are still in the pipe; reading them takes no time, unless somebody outside its
# group holds the pipe open.
_LAST_WORDS_S = 0.5
# A killed process is gone at once, but for one that hangs inside a driver.
_KILL_WAIT_S = 10.0
_REAP_S = 1.0
_REAP_PAUSE_S = 0.002

# The signal is set a moment after the fork, and a parent that died before that moment sends none: so it is looked at
# once more, before the program begins.
_UNLESS_ORPHANED = '[ "$PPID" = "$0" ] && exec "$@"'

# Where there is no setpriv: the same in Python (PR_SET_PDEATHSIG is 1), which takes longer to start.
_TIE_BY_PYTHON = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Output:
    """What a process printed: the last lines, each cut to 4 KiB; bytes that are no UTF-8 are replaced.

    What changes: everything, in `feed` alone.
    """

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.count = 0
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._on_line = on_line
        self._unfinished = b""
        self._more = trio.Event()

    def lines(self, last: int = _LINES_KEPT) -> list[str]:
        """The last lines, the oldest first."""
        return list(self._lines)[-last:]

    async def more_than(self, count: int) -> None:
        """Return once more than `count` lines were printed in all."""
        while self.count <= count:
            await self._more.wait()

    def feed(self, data: bytes) -> None:
        """Take in what was read; b"" is the end, which ends the last line too."""
        *ended, rest = (self._unfinished + data).split(b"\n")
        for line in ended:
            self._add(line)
        # No more is kept of a line than will be shown, however long it gets.
        self._unfinished = rest[: _LINE_BYTES + 1]
        if not data and rest:
            self._add(rest)
            self._unfinished = b""

    def _add(self, line: bytes) -> None:
        cut = " [cut]" if len(line) > _LINE_BYTES else ""
        text = line[:_LINE_BYTES].decode("utf-8", errors="replace").rstrip("\r") + cut
        self._lines.append(text)
        self.count += 1
        self._more.set()
        self._more = trio.Event()
        self._on_line(text)


class Process:
    """A spawned process. `attend` must run as long as the process does; `ended` is set when it is gone and reaped."""

    def __init__(self, name: str, generation: int, popen: "subprocess.Popen[bytes]", read_end: int, output: Output):
        self.name = name
        self.generation = generation
        self.pid = popen.pid
        self.output = output
        self.ended = trio.Event()
        self._popen = popen
        self._pipe = trio.lowlevel.FdStream(read_end)
        self._attending = trio.CancelScope(shield=True)

    def __str__(self) -> str:
        return f"{self.name} (generation {self.generation}, pid {self.pid})"

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal that ended it; None while it runs, or if it would not die."""
        return self._popen.returncode

    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP, a debugger) holds it: it can't answer, and won't obey SIGTERM either."""
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        except (psutil.Error, OSError):  # gone, or no descriptor is left to look with
            return False

    async def attend(self) -> None:
        """Read the output and notice the end. Shielded: it returns when the process is gone, see `terminate`."""
        with self._attending:
            async with self._pipe, trio.open_nursery() as nursery:
                read_all = trio.Event()
                nursery.start_soon(self._read, read_all)
                await _wait_exit(self._popen)
                # While the leader is not reaped its number can't mean another group.
                self._signal_group(signal.SIGKILL)
                self._popen.wait()
                with trio.move_on_after(_LAST_WORDS_S):
                    await read_all.wait()
                nursery.cancel_scope.cancel()
            await self._reap_group()
        self.output.feed(b"")
        self.ended.set()

    async def terminate(self, grace_s: float) -> None:
        """SIGTERM to the group, SIGKILL to the group after `grace_s`; return when it is gone. To be called shielded."""
        if self.ended.is_set():
            return
        if not self.is_stopped():
            self._signal_group(signal.SIGTERM)
            with trio.move_on_after(grace_s):
                await self.ended.wait()
                return
            logger.warning("%s did not end within %g s of SIGTERM; killing it", self, grace_s)
        self._signal_group(signal.SIGKILL)
        with trio.move_on_after(_KILL_WAIT_S):
            await self.ended.wait()
            return
        logger.error(
            "%s is still there %g s after SIGKILL (does a driver hang?); it is left behind", self, _KILL_WAIT_S
        )
        self._attending.cancel()
        await self.ended.wait()

    async def _reap_group(self) -> None:
        """What the leader left in its group is ours to reap where we are its subreaper; it has been killed already.

        While one of them is there, even as a zombie, the number can't mean another group.
        """
        with trio.move_on_after(_REAP_S):
            while _any_left(self.pid):  # noqa: ASYNC110  (there is no event for their end)
                await trio.sleep(_REAP_PAUSE_S)

    def _signal_group(self, signum: signal.Signals) -> None:
        if self._popen.returncode is not None:
            return  # reaped: the number may be another's by now
        try:
            os.killpg(self.pid, signum)
        except ProcessLookupError:
            logger.debug("%s: nobody is left in the group", self)
        except PermissionError:  # macOS says this of a group in which only zombies are left
            logger.debug("%s: the group can't be signalled any more", self)

    async def _read(self, read_all: trio.Event) -> None:
        try:
            while data := await self._pipe.receive_some(_READ_BYTES):
                for piece in _in_turns(data):
                    self.output.feed(piece)
                    await trio.lowlevel.checkpoint()
        except OSError as error:
            logger.warning("%s: its output can't be read any more: %s", self, error)
        read_all.set()


def _any_left(group: int) -> bool:
    """Reap those of our children in that group that have ended; whether others are still to come."""
    try:
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _in_turns(data: bytes) -> Iterator[bytes]:
    """The data in pieces of equal length, on average with as many lines as may be taken in at once."""
    size = max(1, len(data) * _LINES_A_TURN // max(_LINES_A_TURN, data.count(b"\n")))
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
    """Start the program in a process group of its own, with no input, and both outputs in one pipe.

    Must be called from the main thread. Raises OSError where the program or the CPUs are not there.
    """
    program = shutil.which(argv[0], path=env.get("PATH"))
    if program is None:
        raise FileNotFoundError(f"{argv[0]} is not there, or can't be run")
    read_end, write_end = os.pipe()
    try:
        with _on_cpus(cpus):
            popen = subprocess.Popen(
                [*_tie(), os.path.abspath(program), *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env=dict(env),
                cwd=cwd,
                process_group=0,
            )
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    return Process(name, generation, popen, read_end, Output(on_line))


def _tie() -> list[str]:
    """The command that ties what follows it to our life, where the system can."""
    if sys.platform != "linux":
        return []
    setpriv = shutil.which("setpriv")
    # busybox has a setpriv too, that does not know the signal.
    if setpriv is not None and "busybox" not in os.path.realpath(setpriv):
        return [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _UNLESS_ORPHANED, str(os.getpid())]
    return [sys.executable, "-I", "-S", "-c", _TIE_BY_PYTHON, str(os.getpid())]


@contextmanager
def _on_cpus(cpus: frozenset[int] | None) -> Iterator[None]:
    """Lend the calling thread the affinity that a child spawned now is to inherit: no moment without it."""
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
    """Wait until the process has ended, without reaping it."""
    try:
        pidfd = os.pidfd_open(popen.pid)
    except (AttributeError, OSError):  # not in this Python, in this kernel, or no descriptor is left
        await _wait_in_thread(popen.pid)
    else:
        await _wait_pidfd(pidfd)


async def _wait_pidfd(pidfd: int) -> None:
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


async def _wait_in_thread(pid: int) -> None:
    options = os.WEXITED | os.WNOWAIT
    await trio.to_thread.run_sync(os.waitid, os.P_PID, pid, options, abandon_on_cancel=True)
