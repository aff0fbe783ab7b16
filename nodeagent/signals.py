"""What the signals of the process ask for, from the start of the agent to its end.

SIGTERM, SIGINT ──> stop in good order: a start that goes on is cancelled, a node that serves is drained (`shutdown`)
again           ──> end at once: the servers are killed, and the exit code is 128 + the signal's number
SIGHUP          ──> the terminal was closed: as SIGINT. Where there is no terminal, it reloads the configuration
SIGUSR1, SIGUSR2 ─> nothing but a line in the log
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import trio

from nodeagent.errors import EndedAtOnce
from nodeagent.shutdown import EXIT_HUNG, exit_after

logger = logging.getLogger(__name__)

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_WITHOUT_MEANING = (signal.SIGUSR1, signal.SIGUSR2)
# Killed servers are gone at once. After this the process ends in any case, whatever holds it up.
_AT_ONCE_S = 1.0


class Signals:
    """The signals that the process gets while they are `caught`.

    The agent runs in `scope`: the first signal cancels it if the agent is still starting, a second one at any time.
    `last_resort_s` is how long an orderly end may take; then the process ends in any case.

    What changes: `_asked`, `_again` and `_timer` as signals arrive, `_is_starting` in `until_asked`; by the agent,
    `on_reload` and `on_kill`, which do what is due while there is something to reload or to kill.
    """

    def __init__(self, *, last_resort_s: float) -> None:
        self.scope = trio.CancelScope()
        self.on_reload: Callable[[], None] = lambda: None
        self.on_kill: Callable[[], None] = lambda: None
        self._last_resort_s = last_resort_s
        self._timer: threading.Timer | None = None
        self._terminal = has_terminal()
        self._asked: signal.Signals | None = None
        self._again: signal.Signals | None = None
        self._is_starting = True
        self._stop = trio.Event()

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals. Afterwards those that end a process are ignored: all that is left for it is to return its
        exit code. Raises EndedAtOnce at the end if there was a second signal, whatever else went wrong then.

        For the main thread, inside of `trio.run`.
        """
        token = trio.lowlevel.current_trio_token()

        def handle(signum: int, _frame: FrameType | None) -> None:
            token.run_sync_soon(self._deliver, signal.Signals(signum))

        for signum in (*_ENDING, *_WITHOUT_MEANING):
            signal.signal(signum, handle)
        try:
            yield
        except Exception:
            if self._again is None:
                raise
            logger.debug("while ending at once", exc_info=True)
        finally:
            for signum in (*_ENDING, *_WITHOUT_MEANING):
                signal.signal(signum, signal.SIG_IGN)
            if self._timer is not None:
                self._timer.cancel()
        if self._again is not None:
            raise EndedAtOnce(self._again)

    async def until_asked(self) -> signal.Signals:
        """The agent serves: wait for the signal that asks for its orderly end."""
        self._is_starting = False
        await self._stop.wait()
        assert self._asked is not None
        return self._asked

    def end_in_time(self) -> None:
        """The orderly end begins: from now on it may take `last_resort_s`."""
        if self._again is None:
            self._end_process_after(self._last_resort_s, EXIT_HUNG)

    def _end_process_after(self, after_s: float, code: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = exit_after(after_s, code)

    def _deliver(self, signum: signal.Signals) -> None:
        """Called in the event loop."""
        if signum in _WITHOUT_MEANING:
            logger.info("%s: ignored", signum.name)
        elif signum is signal.SIGHUP and not self._terminal:
            logger.info("SIGHUP: reloading the configuration")
            self.on_reload()
        elif self._asked is None:
            self._asked = signum
            self._stop.set()
            if self._is_starting:
                logger.info("%s: stopping before the start was complete", signum.name)
                self.end_in_time()
                self.scope.cancel()
        elif self._again is None and signum is not signal.SIGHUP:  # a terminal that closes may send several
            self._again = signum
            logger.warning("%s again: ending at once", signum.name)
            self._end_process_after(_AT_ONCE_S, 128 + signum)
            self.on_kill()
            self.scope.cancel()


def has_terminal() -> bool:
    """Whether this process belongs to a terminal, so that SIGHUP says that it was closed; not under nohup(1)."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return os.isatty(0) or os.isatty(2)
    return True
