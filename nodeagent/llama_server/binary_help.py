"""Asks llama-server binaries for their `--help`, which takes about 10 ms, and longer where drivers are slow."""

import functools
import logging
import os
import signal
import subprocess
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import trio

from nodeagent.config import Dialect, parse_dialect

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
_MAX_BYTES = 2**20
# A load waits no longer than this for the answer: with an older one, or none, the flags of the newest build are used.
_PATIENCE_S = 12.0


def read_help(binary: Path, timeout_s: float = _TIMEOUT_S) -> str:
    """The help text, at most 1 MiB of it; "" if the binary gives none. Blocks for up to 10 s."""
    try:
        process = subprocess.Popen(
            [binary, "--help"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a script's children are ended with it
        )
    except OSError as error:
        logger.warning("%s --help failed: %s", binary, error)
        return ""
    late = threading.Event()

    def end(*, is_late: bool) -> None:
        if is_late:
            late.set()
        with suppress(ProcessLookupError):  # it is not reaped before this has run for the last time
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(timeout_s, end, kwargs={"is_late": True})
    timer.daemon = True
    with process:
        timer.start()
        assert process.stdout is not None
        text = process.stdout.read(_MAX_BYTES)
        timer.cancel()
        timer.join()
        end(is_late=False)
    if late.is_set():
        logger.warning("%s --help failed: no end in %g s", binary, timeout_s)
        return ""
    return text.decode(errors="replace")


def dialect_of(binary: str) -> Dialect:
    """The dialect of a binary, which is asked once as long as it does not change. Blocks as `read_help` does."""
    try:
        changed_ns = Path(binary).stat().st_mtime_ns
    except OSError:
        return Dialect()
    return _dialect_of(binary, changed_ns)


@functools.lru_cache(maxsize=16)
def _dialect_of(binary: str, _changed_ns: int) -> Dialect:
    return parse_dialect(read_help(Path(binary)))


class Dialects:
    """The dialects of the binaries that matter, asked in threads: the event loop never waits for a binary.

    What changes: `_known`, in `of` (a binary that matters) and `look`.
    """

    def __init__(self, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._known: dict[str, Dialect] = {}
        # One thread for each binary: one that hangs must not use up the threads of others.
        self._threads = defaultdict[str, trio.CapacityLimiter](lambda: trio.CapacityLimiter(1))

    def of(self, binary: str) -> Dialect:
        """The dialect as it was when `look` asked last, the newest before that. From now on `look` asks this binary."""
        return self._known.setdefault(binary, Dialect())

    async def look(self) -> None:
        """Ask the binaries that are new or have changed, all at once, for `patience_s` at most."""
        async with trio.open_nursery() as nursery:
            for binary in list(self._known):
                nursery.start_soon(self._look_at, binary, name=f"ask {binary}")

    async def _look_at(self, binary: str) -> None:
        with trio.move_on_after(self._patience_s) as limit:
            self._known[binary] = await trio.to_thread.run_sync(
                dialect_of, binary, abandon_on_cancel=True, limiter=self._threads[binary]
            )
        if limit.cancelled_caught:
            logger.warning("%s does not answer: it is started with the flags of other builds", binary)
