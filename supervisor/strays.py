"""Descendants of a child that left its process group: they are found by a mark in their environment.

A subreaper inherits the orphans among its descendants (Linux, prctl(2) PR_SET_CHILD_SUBREAPER), so those that a child
leaves behind become our own children, where they can be seen and ended.
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
    """Inherit orphaned descendants from now on; False where the system has no such thing."""
    if sys.platform != "linux":
        return False
    return int(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)) == 0


def marked(env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The environment with a mark of its own, which every descendant inherits, and the mark."""
    mark = secrets.token_hex(8)
    return {**env, MARK_VARIABLE: mark}, mark


def end_strays(mark: str) -> list[int]:
    """Kill and reap what is left of a child that has ended: our own children that carry its mark. Returns their pids.

    Blocks for as long as the kernel takes to end them, a second at most, and only if there are any.
    """
    strays = [process for process in _descendants() if _mark_of(process) == mark]
    for process in strays:
        logger.warning("ending %s, which a child left behind outside of its group", process)
        try:
            process.kill()
        except psutil.NoSuchProcess:
            logger.debug("%s had just ended", process)
    psutil.wait_procs(strays, timeout=_GONE_WITHIN_S)
    return [process.pid for process in strays]


def _descendants() -> list[psutil.Process]:
    try:
        return psutil.Process().children(recursive=True)
    except OSError as error:  # no descriptor is left to look with
        logger.warning("what children leave behind can't be looked for: %s", error)
        return []


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK_VARIABLE)
    except (psutil.Error, OSError):
        return None
