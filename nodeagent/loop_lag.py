"""How late the event loop is, and which step holds it up.

A task wakes up at intervals and notes how late it was. While it is late, a thread looks at what the main thread does.
That costs a request nothing, whereas timing each step of each task (a trio Instrument) makes a step a third slower.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

import trio

from nodeagent.containment import REPEAT_S
from nodeagent.histogram import Histogram

logger = logging.getLogger(__name__)

BOUNDS_S: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the histogram's buckets, in seconds."""

_BEAT_S: Final = 0.2
# From here on every stream of the node visibly stutters.
SLOW_S: Final = 0.25
# Said while it lasts: it may never end.
HANGS_S: Final = 5.0

_TRIO: Final = str(Path(trio.__file__).parent)
_RUN: Final = str(Path(_TRIO, "_core", "_run.py"))
_ROOT: Final = str(Path(__file__).parent.parent)
_OURS: Final = (str(Path(_ROOT, "nodeagent")), str(Path(_ROOT, "supervisor")))


class LoopLag:
    """Adds the lag of the loop in which it runs to `seconds`, and warns of a slow step at most once a minute.

    What changes: `_due_at` (when the loop's next beat is due), in `run`; `_step`, what held it up then, in the thread,
    until the beat takes it; `_told_at`, in `_warn`; `_hangs`, in the thread.
    """

    def __init__(self, seconds: Histogram) -> None:
        self._seconds = seconds
        self._due_at = 0.0
        self._step: str | None = None
        self._told_at = -REPEAT_S
        self._hangs = False

    async def run(self) -> None:
        """Watch this loop until cancelled. For the main thread."""
        over = threading.Event()
        loop_thread = threading.get_ident()
        self._due_at = time.monotonic() + _BEAT_S
        watcher = threading.Thread(target=self._watch, args=(loop_thread, over), name="loop watch", daemon=True)
        watcher.start()
        try:
            while True:
                await trio.sleep(_BEAT_S)
                lag_s = max(0.0, time.monotonic() - self._due_at)
                self._due_at = time.monotonic() + _BEAT_S
                step, self._step = self._step, None
                self._seconds.observe(lag_s)
                if lag_s >= SLOW_S and step is not None:
                    self._warn(lag_s, step)
        finally:
            over.set()

    def _warn(self, lag_s: float, step: str) -> None:
        now = time.monotonic()
        if now - self._told_at >= REPEAT_S:
            self._told_at = now
            logger.warning("a step held up the event loop, and every request with it, for %.2f s: %s", lag_s, step)

    def _watch(self, loop_thread: int, over: threading.Event) -> None:
        """In a thread: look at the loop's thread while its beat is late."""
        looked_at = time.monotonic()
        while not over.wait(_BEAT_S):
            before, looked_at = looked_at, time.monotonic()
            late_s = looked_at - self._due_at
            # If this thread was late too, the whole process was suspended: no step is to blame.
            if late_s < SLOW_S or looked_at - before > 2 * _BEAT_S:
                self._hangs = False
                continue
            if self._step is None:
                self._step = step_of(sys._current_frames().get(loop_thread))
            if late_s >= HANGS_S and not self._hangs and self._step is not None:
                self._hangs = True
                logger.error("the event loop hangs, so far for %.0f s: %s", late_s, self._step)


def step_of(innermost: FrameType | None) -> str | None:
    """The step of a task in which a thread is that runs trio: its task's function, then ours and the innermost one that
    it has called. None while no task runs there."""
    frames = list(_within_the_task(innermost))
    called = [frame for frame in frames if not frame.f_code.co_filename.startswith(_TRIO)]
    if not called:
        return None
    ours = [frame for frame in called if frame.f_code.co_filename.startswith(_OURS)]
    shown = dict.fromkeys([called[-1], *ours[:1], called[0]])  # the same one only once
    return " > ".join(map(_place, shown))


def _within_the_task(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost frame to that of the task's function."""
    found: list[FrameType] = []
    while frame is not None:
        if frame.f_code.co_filename == _RUN and frame.f_code.co_name == "unrolled_run":
            yield from found
            return
        found.append(frame)
        frame = frame.f_back


def _place(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    shown = Path(file).relative_to(_ROOT) if file.startswith(_OURS) else Path(*Path(file).parts[-2:])
    return f"{frame.f_code.co_qualname} ({shown}:{frame.f_lineno})"
