"""Strays: descendants of a child that left its process group. They are found and ended when the child has ended.

On Linux a subreaper inherits its orphaned descendants (prctl(2), PR_SET_CHILD_SUBREAPER). So whatever a child leaves
behind becomes our own child, which we can see, kill and reap. What shows that a process comes from a child:

- a mark in its environment, which every descendant inherits;
- it was seen below the child before (`Kin`);
- it is in the child's session, or holds the pipe of its output;
- it is an orphan that became our own child, and no other child is old enough to be its ancestor.

An orphan: a process that we spawned ourselves is in our session, or the leader of its own. Only an adopted one can be
in any other.
"""

import ctypes
import logging
import os
import secrets
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

MARK_VARIABLE = "SUPERVISED_AS"
_PR_SET_CHILD_SUBREAPER = 36
_GONE_WITHIN_S = 1.0
# Killing an orphan can make orphans of its own children, and so on.
_ROUNDS = 5
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """A process as /proc/<pid>/stat has it (proc_pid_stat(5)), also if it is a zombie. `started` is in clock ticks."""

    pid: int
    state: str
    parent: int
    session: int
    started: int

    @property
    def is_adopted(self) -> bool:
        """Whether it became our child as an orphan: what we spawned is in our session or leads its own."""
        return self.parent == os.getpid() and self.session not in (os.getsid(0), self.pid)


def become_subreaper() -> bool:
    """Inherit orphaned descendants from now on; False on systems other than Linux, or if the kernel refuses."""
    if sys.platform != "linux":
        return False
    return int(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)) == 0


def marked(env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The environment with a unique mark, which every descendant inherits, and that mark."""
    mark = secrets.token_hex(8)
    return {**env, MARK_VARIABLE: mark}, mark


def stat_of(pid: int) -> Stat | None:
    """The process, None if it is gone or can't be looked at."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The name before the last parenthesis may contain anything.
    fields = text.rpartition(b")")[2].split()
    return Stat(
        pid=pid, state=fields[0].decode(), parent=int(fields[1]), session=int(fields[3]), started=int(fields[19])
    )


class Kin:
    """The descendants of one child, as far as they were ever seen. What changes: `_seen`, in `look`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen: set[tuple[int, int]] = set()

    def look(self) -> None:
        """Remember the descendants that the child has now, and forget those that are gone."""
        if sys.platform != "linux":
            return
        known = {(stat.pid, stat.started) for pid, _started in self._seen if (stat := stat_of(pid)) is not None}
        below = {(stat.pid, stat.started) for stat in _below(self._pid)}
        self._seen = (self._seen & known) | below

    def includes(self, stat: Stat) -> bool:
        return (stat.pid, stat.started) in self._seen


def reap_orphans(kin: Kin) -> None:
    """Reap the zombies among the orphans that we adopted, and never the exit status that somebody else waits for."""
    if sys.platform != "linux":
        return
    try:
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if not _reap_orphan(ended.si_pid, kin):
                break  # it is somebody else's, and hides those behind it
        else:
            return
        for pid in _children(os.getpid()):
            _reap_orphan(pid, kin)
    except (OSError, psutil.Error) as error:
        logger.debug("can't look for zombies: %s", error)


def _reap_orphan(pid: int, kin: Kin) -> bool:
    stat = stat_of(pid)
    if stat is None or stat.state != "Z" or not (stat.is_adopted or kin.includes(stat)):
        return False
    return os.waitpid(pid, os.WNOHANG)[0] == pid


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What shows that a process comes from one child; `pipe` is the inode of the pipe of its output."""

    pid: int
    mark: str
    pipe: int
    kin: Kin

    def is_of(self, process: psutil.Process, older_than: int | None) -> bool:
        """Whether it is a stray of this child. `older_than` is when the oldest of the other children started."""
        if _mark_of(process) == self.mark:
            return True
        stat = stat_of(process.pid)
        if stat is None or sys.platform != "linux":
            return False
        if stat.session == self.pid or self.kin.includes(stat) or self.pipe in _pipes_of(process.pid):
            return True
        # As the first process of a container we also adopt what others start in there.
        alone = older_than is None or stat.started < older_than
        return stat.is_adopted and alone and os.getpid() != 1 and _mark_of(process) is None


def reap_strays(origin: Origin, others: Collection[int] = ()) -> list[int]:
    """Kill and reap what a child that has exited left behind; return the pids. `others` are the other children's.

    Blocks until the kernel has ended them, for a second at most, and only if there are any.
    """
    ended: list[int] = []
    started = [stat.started for pid in others if (stat := stat_of(pid)) is not None]
    for _ in range(_ROUNDS):
        strays = [it for it in _descendants() if it.pid not in others and origin.is_of(it, min(started, default=None))]
        if not strays:
            break
        _end(strays)
        ended += [process.pid for process in strays]
    reap_orphans(origin.kin)
    return ended


def _end(strays: list[psutil.Process]) -> None:
    for process in strays:
        logger.warning("killing %s, which a child left behind outside its process group", process)
        try:
            process.kill()
        except psutil.Error as error:
            logger.debug("%s can't be killed: %s", process, error)
    psutil.wait_procs(strays, timeout=_GONE_WITHIN_S)


def _descendants() -> list[psutil.Process]:
    if not _has_children():
        return []
    try:
        return [process for process in psutil.Process().children(recursive=True) if _runs(process)]
    except (OSError, psutil.Error) as error:  # no file descriptor is free
        logger.warning("can't look for processes that children left behind: %s", error)
        return []


def _has_children() -> bool:
    """Whether we have any child. One system call, where the search looks at every process of the host: it stands
    between the end of a server and the start of the next, and there the answer mostly is no. Whoever has no child has
    no other descendant either, since orphans become our own children."""
    if sys.platform != "linux":
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, OSError):
        return False


def _below(pid: int) -> Iterator[Stat]:
    pending, seen = [pid], {pid}
    while pending:
        for child in _children(pending.pop()):
            stat = stat_of(child)
            if stat is not None and child not in seen:
                seen.add(child)
                pending.append(child)
                yield stat


def _children(pid: int) -> list[int]:
    """The children of a process; empty if it is gone."""
    try:
        tasks = os.listdir(_PROC / str(pid) / "task")
    except OSError:
        return []
    lists = [_list_of_children(pid, task) for task in tasks]
    if lists and None in lists and not any(lists):
        return _children_by_search(pid)
    return [int(child) for children in lists for child in (children or b"").split()]


def _list_of_children(pid: int, task: str) -> bytes | None:
    """The children of one thread; None if it has ended, or the kernel has no such lists (CONFIG_PROC_CHILDREN)."""
    try:
        with open(f"{_PROC}/{pid}/task/{task}/children", "rb", buffering=0) as children:
            return children.read()
    except OSError:
        return None


def _children_by_search(pid: int) -> list[int]:
    """The same by a look at every process."""
    try:
        return [process.pid for process in psutil.Process(pid).children()]
    except (psutil.Error, OSError):
        return []


def _pipes_of(pid: int) -> set[int]:
    """The inodes of the pipes that a process holds open."""
    try:
        links = [os.readlink(link.path) for link in os.scandir(_PROC / str(pid) / "fd")]
    except OSError:
        return set()
    return {int(link[6:-1]) for link in links if link.startswith("pipe:[")}


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK_VARIABLE)
    except (psutil.Error, OSError):
        return None
