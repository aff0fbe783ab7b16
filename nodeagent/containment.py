"""Keeps an unforeseen error at an edge of the node from ending the node.

A task in the node's nursery that raises ends every other task with it. So the tasks at the edges (a connection, the
dispatcher, the stall watch, a reload, ...) run inside a `Containment`: it lets `Cancelled` and the like pass, and
handles any `Exception`.
"""

import errno
import logging
import resource
import time
from collections.abc import Callable
from types import TracebackType

from supervisor.containment import causes

logger = logging.getLogger(__name__)

# Between two log lines about the same error: an error in a loop must not fill the log.
REPEAT_S = 60.0

_SHORTAGES = {
    errno.EMFILE: "out of file descriptors",
    errno.ENFILE: "this host is out of file descriptors",
    errno.ENOMEM: "out of memory",
    errno.ENOBUFS: "out of network buffers",
    errno.EAGAIN: "out of processes or threads",  # as fork(2) and pthread_create(3) report it
}


class Containment:
    """A context manager, used any number of times: `with containment: await ...`.

    Each kind of error is logged with its traceback the first time; while it repeats, one line a minute says how often.
    A shortage of the agent's own (see `own_shortage`) is logged as a plain warning. `on_failure` is called with the
    error. What changes: `_seen`, in `__exit__`.
    """

    def __init__(
        self,
        what: str,
        *,
        on_failure: Callable[[Exception], None] = lambda _error: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._on_failure = on_failure
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._report(error)
        self._on_failure(error)
        return True

    def _report(self, error: Exception) -> None:
        shortage = own_shortage(error)
        kind = shortage or type(error).__name__
        last_at, repeats = self._seen.get(kind, (None, 0))
        now = self._clock()
        if last_at is not None and now - last_at < REPEAT_S:
            self._seen[kind] = (last_at, repeats + 1)
            return
        self._seen[kind] = (now, 0)
        again = f" ({repeats} more times since the last report)" if repeats else ""
        if shortage is not None:
            logger.warning("%s while %s%s", shortage, self._what, again)
        elif last_at is None:
            logger.error("unexpected error while %s; the node goes on", self._what, exc_info=error)
        else:
            logger.error("unexpected error while %s: %r%s", self._what, error, again)


def own_shortage(error: BaseException) -> str | None:
    """What this process itself has run out of, if that is why the error happened, else None."""
    for cause in causes(error):
        if isinstance(cause, MemoryError):
            return "out of memory"
        if isinstance(cause, OSError) and cause.errno in _SHORTAGES:
            return _described(cause.errno)
    return None


def _described(code: int) -> str:
    if code == errno.EMFILE:
        soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{_SHORTAGES[code]} (limit {soft})"
    return _SHORTAGES[code]
