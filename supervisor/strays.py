"""Strays: descendants of a child that left its process group. They are found by a mark in their environment.

On Linux a subreaper inherits its orphaned descendants (prctl(2), PR_SET_CHILD_SUBREAPER). So whatever a child leaves
behind becomes our own child, which we can see and reap.
"""

import ctypes
import logging
import secrets
import sys
from collections.abc import Mapping

import psutil

logger = logging.getLogger(__name__)

MARK_VARIABLE = "SUPERVISED_AS"
_PR_SET_CHILD_SUBREAPER = 36
_GONE_WITHIN_S = 1.0


def become_subreaper() -> bool:
    """Inherit orphaned descendants from now on; False on systems other than Linux, or if the kernel refuses."""
    if sys.platform != "linux":
        return False
    return int(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)) == 0


def marked(env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The environment with a unique mark, which every descendant inherits, and that mark."""
    mark = secrets.token_hex(8)
    return {**env, MARK_VARIABLE: mark}, mark


def reap_strays(mark: str) -> list[int]:
    """Kill and reap our descendants that carry the mark of a child that has exited; return their pids.

    Blocks until the kernel has ended them, for a second at most, and only if there are any.
    """
    strays = [process for process in _descendants() if _mark_of(process) == mark]
    for process in strays:
        logger.warning("killing %s, which a child left behind outside its process group", process)
        try:
            process.kill()
        except psutil.NoSuchProcess:
            logger.debug("%s has just ended", process)
    psutil.wait_procs(strays, timeout=_GONE_WITHIN_S)
    return [process.pid for process in strays]


def _descendants() -> list[psutil.Process]:
    try:
        return psutil.Process().children(recursive=True)
    except OSError as error:  # no file descriptor is free
        logger.warning("can't look for processes that children left behind: %s", error)
        return []


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK_VARIABLE)
    except (psutil.Error, OSError):
        return None
