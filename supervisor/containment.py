"""Keeps an unforeseen error in one child's task from ending the supervisor and the other children.

And tells apart what this process itself has run out of: that is no fault of a child.
"""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from supervisor.output import printable

logger = logging.getLogger(__name__)

_SHOWN_CHARS = 300

_SHORTAGES = {
    errno.EMFILE: "this process is out of file descriptors",
    errno.ENFILE: "this host is out of file descriptors",
    errno.ENOMEM: "this host is out of memory",
    errno.ENOBUFS: "this host is out of network buffers",
}
# What fork(2) reports. A connect(2) to a Unix socket with a full queue reports the same, and that is the child's fault.
_SPAWN_SHORTAGES = {**_SHORTAGES, errno.EAGAIN: "this user is out of processes"}


def own_shortage(error: BaseException, *, while_spawning: bool = False) -> str | None:
    """What this process itself has run out of, if that is why the error happened, else None."""
    shortages = _SPAWN_SHORTAGES if while_spawning else _SHORTAGES
    for cause in causes(error):
        if isinstance(cause, MemoryError):
            return "this process is out of memory"
        if isinstance(cause, OSError) and cause.errno in shortages:
            return shortages[cause.errno]
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error itself, each cause and context of it (an HTTP client's own ConnectError has some), and the members of
    each group; each once."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            pending += current.exceptions


def described(error: Exception) -> str:
    """The error on one short line, for a reason."""
    return printable(repr(error))[:_SHOWN_CHARS]


class Containment:
    """Turns unforeseen errors into a log line: each kind of error in each place has its traceback logged once.

    What changes: `_logged`, in `report`.
    """

    def __init__(self, child_id: str) -> None:
        self._child_id = child_id
        self._logged: set[tuple[str, type[Exception]]] = set()

    @contextmanager
    def contained(self, place: str, on_error: Callable[[Exception], None] = lambda _error: None) -> Iterator[None]:
        """Report any Exception of the block and hand it to `on_error`; let Cancelled and the like pass."""
        try:
            yield
        except* Exception as group:
            error = _only(group)
            self.report(place, error)
            on_error(error)

    def report(self, place: str, error: Exception) -> None:
        """Log the error with its traceback, if it is the first of its kind in that place."""
        kind = (place, type(error))
        if kind in self._logged:
            logger.debug("%s: unexpected error in %s again: %r", self._child_id, place, error)
            return
        self._logged.add(kind)
        logger.error("%s: unexpected error in %s", self._child_id, place, exc_info=error)


def _only(group: ExceptionGroup[Exception]) -> Exception:
    """The only error in the group, if it has just one."""
    error: Exception = group
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        [error] = error.exceptions
    return error
